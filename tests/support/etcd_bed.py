"""A whole daemon before a real etcd whose members can be cut off, each in a namespace of its own.

::

    host (flanneld, host-gw) ──┐
    m0, m1, m2 (etcd) ─────────┤ br0 in switch, where tests and etcdctl are
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import NamedTuple

from flanneld.lab import http
from flanneld.lab.daemon import own_command
from tests.support.etcd import Certificates, Cluster, Member
from tests.support.netns import Netns

HOST, SWITCH = "198.18.5.11", "198.18.5.1"
KEYS = "/coreos.com/network/"
CONFIG = {"Network": "10.5.0.0/16", "SubnetMin": "10.5.7.0", "SubnetMax": "10.5.7.0", "Backend": {"Type": "host-gw"}}
OURS = "10.5.7.0-24"
HEALTH_PORT = 8471
FAKETIME = "/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1"
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
Condition = Callable[[], object]


class Cost(NamedTuple):
    """What something cost the daemon."""

    cpu_s: float
    lines: list[str]
    """That it logged, but for the one that each batch of changed leases gets."""


class EtcdBed:
    """See above; a context manager.

    Args:
        members: of etcd.
        tls: with certificates on both sides.
        users: passwords; authentication is on when there are any. ``root`` must be among them.
        flags: of the daemon.
        extra: flags of etcd.
        has_own_clock: the daemon's wall clock can be set by ``set_clock``.
    """

    def __init__(
        self,
        members: int = 3,
        *,
        tls: bool = False,
        users: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        extra: Sequence[str] = (),
        has_own_clock: bool = False,
    ) -> None:
        self._has_own_clock = has_own_clock
        self._stack = contextlib.ExitStack()
        self._tls, self._flags, self._extra = tls, flags, extra
        self._users = dict(users or {})
        self.switch, self.host = Netns("fe-sw"), Netns("fe-h")
        self._places = [(Netns(f"fe-m{number}"), f"198.18.5.{101 + number}") for number in range(members)]
        self.directory = Path()
        self.process: subprocess.Popen[bytes] | None = None
        self._log = Path()

    def __enter__(self) -> EtcdBed:
        try:
            self._build()
            self.configure()
            self.start()
            self.until(self.is_ready, "the daemon is ready")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take all of it down."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self._stack.close()

    def _build(self) -> None:
        enter = self._stack.enter_context
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.directory = Path(enter(TemporaryDirectory(prefix="fe-", dir=memory)))
        self._log = self.directory / "flanneld.log"
        enter(self.switch)
        self.switch.run("ip", "link", "add", "br0", "type", "bridge")
        self.switch.run("ip", "addr", "add", f"{SWITCH}/24", "dev", "br0")
        self.switch.run("ip", "link", "set", "br0", "up")
        for number, (netns, address) in enumerate([(self.host, HOST), *self._places]):
            enter(netns)
            peer = ("peer", "name", "eth0", "netns", netns.name)
            self.switch.run("ip", "link", "add", f"p{number}", "type", "veth", *peer)
            self.switch.run("ip", "link", "set", f"p{number}", "master", "br0", "up")
            netns.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            netns.run("ip", "link", "set", "eth0", "up")
        self.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # else that is a remark on being ready
        certificates = Certificates(self.directory / "tls") if self._tls else None
        cluster = Cluster(
            certificates=certificates,
            client_cert=self._tls,
            extra=self._extra,
            at=[(netns.name, address) for netns, address in self._places],
        )
        cluster.home = self.switch.name
        self.etcd = enter(cluster)
        if self._users:
            root = self._users["root"]
            self.etcd.enable_auth(root, **{name: word for name, word in self._users.items() if name != "root"})
            self.etcd.allow("flannel", KEYS, root)

    @property
    def root(self) -> str:
        """Value for etcdctl's ``--user``."""
        return f"root:{self._users['root']}" if self._users else ""

    def configure(self, **more: object) -> None:
        """Write the network configuration."""
        self.etcd.ctl("put", KEYS + "config", json.dumps({**CONFIG, **more}), user=self.root)

    # ---- the daemon ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemon; does not wait."""
        flags = [f"--etcd-endpoints={self.etcd.endpoints}", "--iface=eth0", f"--healthz-port={HEALTH_PORT}"]
        flags += [f"--subnet-file={self.directory / 'subnet.env'}", f"--state-dir={self.directory / 'state'}"]
        flags += ["--iptables-forward-rules=false"]
        if files := self.etcd.certificates:
            flags += [f"--etcd-cafile={files.ca}", f"--etcd-certfile={files.cert}", f"--etcd-keyfile={files.key}"]
        if self._users:
            flags += ["--etcd-username=flannel", f"--etcd-password={self._users['flannel']}"]
        argv = ["ip", "netns", "exec", self.host.name, *own_command(), *flags, *self._flags]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **self._clock()})

    def _clock(self) -> dict[str, str]:
        if not self._has_own_clock:
            return {}
        self.set_clock("+0")
        # the monotonic clocks stay as they are, as when an operator or NTP sets the time
        return {
            "LD_PRELOAD": FAKETIME.format(os.uname().machine),
            "FAKETIME_TIMESTAMP_FILE": str(self.directory / "clock"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set_clock(self, offset: str) -> None:
        """Set the daemon's wall clock, as ``faketime -f`` takes it: ``+3d``, ``-50y``."""
        path = self.directory / "clock.new"
        path.write_text(offset + "\n")
        path.rename(self.directory / "clock")

    def log(self) -> str:
        """All that it logged."""
        return self._log.read_text()

    def is_running(self) -> bool:
        """Whether the first daemon still runs."""
        return self.process is not None and self.process.poll() is None

    def readyz(self) -> tuple[int, str]:
        """Status and text of ``/readyz``."""
        return http.get(self.host.name, "127.0.0.1", HEALTH_PORT, "/readyz")

    def is_ready(self) -> bool:
        """Whether it is ready, with nothing to remark."""
        return self.readyz() == (200, "flanneld is ready")

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        assert self.process
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[Cost]]:
        """Around a fault; the list holds its cost afterwards."""
        cost: list[Cost] = []
        cpu_s, log = self.cpu_s(), self.log()
        yield cost
        lines = [line for line in self.log().removeprefix(log).splitlines() if " reconciled reason=leases " not in line]
        cost.append(Cost(self.cpu_s() - cpu_s, lines))

    def until(self, condition: Condition, what: str, timeout_s: float = 20.0) -> float:
        """Wait for a condition; seconds that it took. Fails with the words and the end of the log."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}; log:\n{self.log()[-3000:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    # ---- leases -------------------------------------------------------------------------------

    def add_peer(self, number: int) -> float:
        """Lease subnet 10.5.``number``.0/24 to a host that does not exist; seconds until etcd took that."""
        value = f'{{"PublicIP":"198.18.5.{number}","PublicIPv6":null,"BackendType":"host-gw"}}'
        return self.insist("put", f"{KEYS}subnets/10.5.{number}.0-24", value)

    def remove_peer(self, number: int) -> float:
        """End that lease."""
        return self.insist("del", f"{KEYS}subnets/10.5.{number}.0-24")

    def insist(self, *arguments: str) -> float:
        """Run etcdctl until it succeeds; seconds that this took."""

        def succeeds() -> bool:
            with contextlib.suppress(AssertionError):
                self.etcd.ctl(*arguments, "--dial-timeout=1s", "--command-timeout=1s", user=self.root)
                return True
            return False

        return self.until(succeeds, f"etcd takes {arguments[0]}", 30.0)

    def routes(self) -> set[int]:
        """Numbers of the peers that the host has routes for."""
        text = self.host.run("ip", "route", "show", "proto", "86")
        return {int(number) for number in re.findall(r"^10\.5\.(\d+)\.0/24", text, re.MULTILINE)}

    def until_route(self, number: int, timeout_s: float = 20.0) -> float:
        """Wait until a peer's route is there; seconds."""
        return self.until(lambda: number in self.routes(), f"a route to peer {number}", timeout_s)

    def own_key(self) -> dict[str, object]:
        """Our key as etcd has it: value, lease, revisions; empty without it."""
        text = ""

        def is_read() -> bool:
            nonlocal text
            with contextlib.suppress(AssertionError):  # members may be finding together just now
                text = self.etcd.ctl("get", f"{KEYS}subnets/{OURS}", "-w", "json", user=self.root)
            return bool(text)

        self.until(is_read, "etcd tells our key")
        found: list[dict[str, object]] = json.loads(text).get("kvs", [])
        return found[0] if found else {}

    # ---- faults -------------------------------------------------------------------------------

    def watched(self) -> Member:
        """The member that the daemon's connection goes to."""
        text = self.host.run("ss", "-Htn", "state", "established", "dport", "=", ":2379")
        addresses = re.findall(r"(198\.18\.5\.\d+):2379", text)
        assert addresses, "the daemon is not connected"
        return self.etcd.member(addresses[0])

    def leader(self) -> Member:
        """The member that leads."""
        text = self.etcd.ctl("endpoint", "status", "-w", "json", user=self.root)
        for status in json.loads(text):
            if status["Status"]["leader"] == status["Status"]["header"]["member_id"]:
                return self.etcd.member(status["Endpoint"].rpartition("/")[2].partition(":")[0])
        raise AssertionError("nobody leads")

    def cut_off(self, member: Member) -> None:
        """Let no packet in or out of a member, without a word to anybody."""
        chains = [
            f"chain {hook} {{ type filter hook {hook} priority 0; policy drop; {way} lo accept; }}"
            for hook, way in (("input", "iif"), ("output", "oif"))
        ]
        rules = "\n".join(["table inet cut {", *chains, "}", ""])
        self._netns(member).run("nft", "-f", "-", stdin=rules)

    def heal(self, member: Member) -> None:
        """End that."""
        self._netns(member).run("nft", "delete table inet cut")

    def _netns(self, member: Member) -> Netns:
        return next(netns for netns, _address in self._places if netns.name == member.netns)
