"""The lab's Kubernetes: an API server in the switch namespace, a Node for each host, and the way there for daemons.

It also does what the kubelet and the node IPAM controller do: a host's Node is made with its pod CIDRs.
"""

from __future__ import annotations

import http.client
import ipaddress
import itertools
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab.child import Child, spawn
from flanneld.lab.kubeapi.access import ADMIN_TOKEN, FLANNEL_TOKEN
from flanneld.lab.kubeapi.tls import Authority
from flanneld.lab.netns import run_in
from flanneld.lab.spec import LabSpec
from flanneld.model.addr import Family

PORT = 6443
START_TIMEOUT_S = 20.0
POD_CIDR_LEN = {Family.V4: 24, Family.V6: 64}
"""What the controller gives a Node unless told: ``--node-cidr-mask-size-ipv4`` and ``-ipv6``."""
NETWORK_KEYS = {Family.V4: "Network", Family.V6: "IPv6Network"}

Json = dict[str, Any]


class Kube:
    """One API server and its Nodes, which are called as the hosts are: ``h1``, ``h2``, …"""

    title = "Kubernetes API: a Node with pod CIDRs for each host"

    def __init__(self, spec: LabSpec, directory: Path) -> None:
        self._spec = spec
        self._hosts_directory = directory
        self._directory = directory / "kube"
        self._netns = spec.netns("switch")
        self._address = spec.member_address(1)

    @property
    def url(self) -> str:
        """Where daemons find it."""
        return f"https://{f'[{self._address}]' if ':' in self._address else self._address}:{PORT}"

    @property
    def ca_file(self) -> Path:
        """What its certificate is verified with."""
        return self._directory / "ca.crt"

    @property
    def kubeconfig_file(self) -> Path:
        """The administrator's, for kubectl."""
        return self._directory / "kubeconfig"

    # the process

    def set_up(self) -> None:
        """Make certificates, start the server and give every host its Node.

        Raises:
            Unavailable: it does not serve within 20 s; the sentence quotes its log.
        """
        Authority(self._directory).issue(self._address)
        _write_secret(self.kubeconfig_file, self.kubeconfig(ADMIN_TOKEN))
        self.start()
        for number in range(1, self._spec.hosts + 1):
            self.add_node(number)

    def start(self) -> None:
        """Start the server, with the objects it had, and wait until it serves.

        Raises:
            Unavailable: it does not within 20 s; the sentence quotes its log.
        """
        host = f"[{self._address}]" if ":" in self._address else self._address
        argv = [
            *(sys.executable, "-m", "flanneld.lab.kubeapi", f"--listen={host}:{PORT}"),
            *(f"--state-dir={self._directory}", f"--client-ca-file={self.ca_file}"),
            f"--tls-cert-file={self._directory / 'server.crt'}",
            f"--tls-private-key-file={self._directory / 'server.key'}",
        ]
        child = spawn(self._netns, argv, self._log, self._pid_file, os.environ)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_serving():
            if not child.is_alive() or time.monotonic() > deadline:
                tail = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                raise Unavailable(f"the API server does not serve; its log ends: {' '.join(tail) or '(empty)'}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill it, as a power cut would; objects stay, events are lost."""
        if child := Child.read(self._pid_file):
            child.signal(signal.SIGKILL)
            child.wait_gone(5.0)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.stop()
        self.start()

    def pause(self, paused: bool = True) -> None:
        """Stop it from running without closing its connections (SIGSTOP), or let it go on."""
        if child := Child.read(self._pid_file):
            child.signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def is_running(self) -> bool:
        """Whether its process lives."""
        return Child.read(self._pid_file) is not None

    def is_serving(self) -> bool:
        """Whether it answers."""
        try:
            return self._exchange("GET", "/readyz")[0] == 200
        except Unavailable:
            return False

    def status(self) -> str:
        """For ``flannelctl lab status``."""
        return f"{'serving' if self.is_serving() else 'not serving'} at {self.url}"

    # what daemons need

    def daemon_flags(self, number: int) -> list[str]:
        """How the daemon of a host reaches its Node; writes the files that the flags name."""
        directory = self._hosts_directory / f"h{number}"
        directory.mkdir(parents=True, exist_ok=True)
        kubeconfig, net_conf = directory / "kubeconfig", directory / "net-conf.json"
        if not kubeconfig.exists():
            _write_secret(kubeconfig, self.kubeconfig(FLANNEL_TOKEN))
        if not net_conf.exists():
            net_conf.write_text(self._spec.network_config() + "\n")
        return ["--kube-subnet-mgr", f"--kubeconfig-file={kubeconfig}", f"--net-config-path={net_conf}"]

    def daemon_env(self, number: int) -> dict[str, str]:
        """The variables of a daemon's container."""
        return {"NODE_NAME": node_name(number)}

    def kubeconfig(self, token: str) -> Json:
        """A kubeconfig with one user's token."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {"server": self.url, "certificate-authority": str(self.ca_file)}}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
            "current-context": "lab",
        }

    # Nodes, as an administrator has them

    def pod_cidrs(self, number: int) -> list[str]:
        """The pod CIDRs of a host: subnet number ``number`` of the pod network, for each family.

        Raises:
            ConfigError: the pod network is too small.
        """
        config = json.loads(self._spec.network_config())
        return [_subnet(str(config[NETWORK_KEYS[family]]), number, family) for family in self._spec.families]

    def add_node(self, number: int, pod_cidrs: list[str] | None = None) -> None:
        """Register a host's Node, with its pod CIDRs unless others are given; ``[]`` leaves it without."""
        cidrs = self.pod_cidrs(number) if pod_cidrs is None else pod_cidrs
        body = {
            "metadata": {"name": node_name(number), "labels": {"kubernetes.io/hostname": node_name(number)}},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs} if cidrs else {},
        }
        self.ask("POST", "/api/v1/nodes", body)

    def delete_node(self, number: int) -> None:
        """Delete a host's Node, as when the machine leaves the cluster."""
        self.ask("DELETE", _path(number))

    def patch_node(self, number: int, patch: Mapping[str, Any]) -> None:
        """Change a Node by a JSON merge patch."""
        self.ask("PATCH", _path(number), patch)

    def node(self, number: int) -> Json:
        """A host's Node.

        Raises:
            Unavailable: there is none.
        """
        return self.ask("GET", _path(number))

    def nodes(self) -> list[Json]:
        """All Nodes, by name."""
        items: list[Json] = self.ask("GET", "/api/v1/nodes")["items"]
        return sorted(items, key=lambda node: int(node["metadata"]["name"].lstrip("h") or 0))

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Json:
        """One request with an administrator's rights.

        Raises:
            Unavailable: it was not answered, or refused; the sentence is the server's own.
        """
        status, answer = self._exchange(method, path, body)
        if status >= 300:
            raise Unavailable(f"the API server refused {method} {path}: {answer.get('message', answer)}")
        return answer

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Json]:
        media_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": media_type}

        def fetch() -> tuple[int, Json]:
            context = ssl.create_default_context(cafile=self.ca_file)
            connection = http.client.HTTPSConnection(self._address, PORT, timeout=5.0, context=context)
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else {"message": text}
            except (OSError, http.client.HTTPException) as error:
                raise Unavailable(f"the lab's API server at {self.url} does not answer: {error}") from error
            finally:
                connection.close()

        return run_in(self._netns, fetch)

    @property
    def _pid_file(self) -> Path:
        return self._directory / "kubeapi.pid"

    @property
    def _log(self) -> Path:
        return self._directory / "kubeapi.log"


def node_name(number: int) -> str:
    """The Node of a host."""
    return f"h{number}"


def _write_secret(path: Path, config: Json) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1) + "\n")  # JSON is YAML too


def _path(number: int) -> str:
    return f"/api/v1/nodes/{node_name(number)}"


def _subnet(network: str, number: int, family: Family) -> str:
    whole = ipaddress.ip_network(network)
    length = POD_CIDR_LEN[family]
    if whole.prefixlen > length or 2 ** (length - whole.prefixlen) <= number:
        raise ConfigError(f"the pod network {network} has no /{length} number {number}: name a larger one")
    return str(next(itertools.islice(whole.subnets(new_prefix=length), number, None)))
