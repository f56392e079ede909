"""Nodes of the lab: a namespace one can run commands in; a host with its daemon and its pod."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flanneld.errors import Unavailable
from flanneld.lab import wiring
from flanneld.lab.cni import Runtime
from flanneld.lab.daemon import Daemon
from flanneld.lab.spec import LabSpec
from flanneld.model.addr import Family

SUBNET_KEYS = {Family.V4: "FLANNEL_SUBNET", Family.V6: "FLANNEL_IPV6_SUBNET"}


class Node:
    """A namespace of the lab."""

    def __init__(self, spec: LabSpec, name: str) -> None:
        self.spec = spec
        self.name = name
        self.netns = spec.netns(name)

    def command(self, *argv: str) -> list[str]:
        """The command line that runs ``argv`` in this namespace, for a caller's own ``Popen``."""
        return ["ip", "netns", "exec", self.netns, *argv]

    def run(
        self, *argv: str, check: bool = True, timeout_s: float = 30.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        Raises:
            Unavailable: it failed and ``check`` is set; the sentence ends with what it said.
        """
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=timeout_s, input=stdin)
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise Unavailable(f"on {self.name}: {' '.join(argv)}: exit {done.returncode}: {said}")
        return done

    def ip(self, *argv: str) -> str:
        """Run iproute2's ``ip``, returning what it prints."""
        return self.run("ip", *argv).stdout


class Host(Node):
    """A host: its underlay addresses, its daemon, its pod."""

    def __init__(self, spec: LabSpec, number: int, directory: Path, daemon: Daemon) -> None:
        super().__init__(spec, f"h{number}")
        self.number = number
        self.directory = directory
        self.daemon = daemon
        self.pod = Node(spec, f"pod{number}")
        self.cni = Runtime(self.netns, daemon.cni_conf_dir, directory / "cni")

    def address(self, family: Family | None = None) -> str:
        """Underlay address; of the lab's first family unless told."""
        return self.spec.host_address(self.number, family or self.spec.families[0])

    def subnet_env(self) -> dict[str, str]:
        """``subnet.env`` as key and value; empty while there is none."""
        try:
            lines = self.daemon.subnet_file.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def gateway(self, family: Family) -> str | None:
        """Address of ``cni0`` with prefix length: the subnet's first; None while the host has no subnet."""
        return self.subnet_env().get(SUBNET_KEYS[family])

    def pod_address(self, family: Family | None = None) -> str:
        """The pod's address.

        Raises:
            Unavailable: no pod has been attached.
        """
        wanted = family or self.spec.families[0]
        flag = "-4" if wanted is Family.V4 else "-6"
        for line in self.pod.ip(flag, "-o", "addr", "show", "dev", "eth0", "scope", "global").splitlines():
            return line.split()[3].partition("/")[0]
        raise Unavailable(f"pod {self.number} has no {wanted.label} address: its host has no subnet yet")

    def attach_pod(self) -> None:
        """Connect the pod, by the CNI plugins or as they would do it: with addresses and MTU from ``subnet.env``.

        Raises:
            Unavailable: there is no usable ``subnet.env`` (contract 4.1), or a plugin refused.
        """
        values = self.subnet_env()
        gateways = [values.get(SUBNET_KEYS[family], "") for family in self.spec.families]
        if not all(gateways) or not values.get("FLANNEL_MTU", "").isdecimal():
            raise Unavailable(f"{self.name} has no complete {self.daemon.subnet_file}")
        if self.spec.cni:
            self._attach_by_cni(gateways)
        else:
            wiring.attach_pod(self.spec, self.number, gateways, int(values["FLANNEL_MTU"]))

    def _attach_by_cni(self, gateways: list[str]) -> None:
        self.cni.delete(self.pod.netns)
        # the bridge plugin refuses a bridge that has an earlier subnet's address; removing it is the operator's part
        addresses = self.run("ip", "-o", "addr", "show", "dev", "cni0", check=False).stdout.split()
        if addresses and not set(gateways) <= set(addresses):
            self.ip("link", "del", "cni0")
        self.pod.ip("link", "set", "lo", "up")
        self.cni.add(self.pod.netns)
