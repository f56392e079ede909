"""A live cluster to break things in: three hosts, traffic, things of others, and the measures of what is right."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from flanneld.lab import Lab, LabSpec
from flanneld.lab.node import Host
from flanneld.lab.probe import full_size_ping, ping_matrix
from flanneld.lab.spec import OUTSIDE, SUBNETS_KEY
from flanneld.model.addr import Family
from flanneld.report import control
from tests.faults import foreign
from tests.faults.cases import CASES
from tests.faults.probe import Probe, Route
from tests.faults.tables import wrong_entries
from tests.support.snapshot import Snapshot, differences, snapshot

DEADLINE_S = 10.0
"""For anything that is to become right."""
QUIET_S = 0.15
"""Traffic before a fault, and after its repair."""
LINES_AT_MOST = 200
"""In the log of a host, for one fault."""


_RECONCILED = re.compile(r"^I(\d{4} \S+) .*\] reconciled ", re.MULTILINE)


class Repair(NamedTuple):
    """An entry of ``flannelctl audit``."""

    kind: str
    at: float
    """When it was made, seconds since the epoch."""
    text: str


class Bed:
    """A context manager; inside it the cluster is up and everything is right.

    Args:
        case: the kind of cluster, by name.
        spec: laid over the case's, for ``LabSpec``.
    """

    def __init__(self, case: str, **spec: object) -> None:
        self.name, self.case = case, CASES[case]
        name = f"f{secrets.token_hex(4)}"
        merged = {"hosts": 3, "ephemeral": True, **self.case.spec, **spec}
        self.lab = Lab(LabSpec(name, **merged))  # type: ignore[arg-type]
        self._tools = tempfile.TemporaryDirectory(prefix="flanneld-faults-")
        self._base: dict[str, Snapshot] = {}

    @property
    def is_ours(self) -> bool:
        """Whether the daemons are ours, and not another flanneld that is held beside it."""
        return not self.lab.spec.daemon

    @property
    def host(self) -> Host:
        """The host that faults hit."""
        return self.lab.host(1)

    @property
    def peer(self) -> Host:
        """The host at the other end of the traffic."""
        return self.lab.host(2)

    def __enter__(self) -> Self:
        try:
            self.lab.up(daemons=False)
            self.run(foreign.LINKS + foreign.plug_in(self.host))
            self.plant_firewall()
            for host in self.lab.hosts:
                host.daemon.start(env=self.env())
            for host in self.lab.hosts:
                host.daemon.wait_ready()
            self.lab.attach_pods()
            self.await_right(full_size=True)
            self.rebase()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the cluster down."""
        self.lab.down()
        self._tools.cleanup()

    # ---- doing --------------------------------------------------------------------------------

    def env(self) -> dict[str, str]:
        """Environment of the daemons, and of firewall tools: the case's iptables comes first."""
        if not self.case.iptables:
            return {}
        path = Path(self._tools.name)
        for stem in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                tool = path / (stem + suffix)
                if not tool.exists():
                    tool.write_text(f'#!/bin/sh\nexec /usr/sbin/{self.case.iptables} {stem}{suffix} "$@"\n')
                    tool.chmod(0o755)
        return {"PATH": f"{path}:{os.environ['PATH']}"}

    def shell(self, script: str, host: Host | None = None) -> Callable[[], float]:
        """A shell on a host that waits; the function returned lets it run to its end and tells when it began.

        So a fault's time does not begin with the start of ``ip netns exec`` and ``sh``.
        """
        node = host or self.host
        child = subprocess.Popen(
            node.command("sh", "-c", f"echo; read go; {{ {script}\n}}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.env(), "XTABLES_LOCKFILE": str(node.daemon.xtables_lock)},
        )
        assert child.stdout is not None
        child.stdout.readline()

        def go() -> float:
            at = time.time()
            _, errors = child.communicate("\n", timeout=60)
            assert child.returncode == 0, f"{script}: {errors}"
            return at

        return go

    def run(self, script: str, host: Host | None = None) -> float:
        """Run a script on a host; when it began."""
        return self.shell(script, host)() if script else time.time()

    def plant_firewall(self) -> None:
        """Make the firewall rules of others."""
        self.run(foreign.FIREWALL)

    def replant_firewall(self) -> None:
        """Put the firewall rules of others back that a flush has taken, without making any of them twice."""
        self.run(f"{foreign.FIREWALL_GONE}{foreign.FIREWALL}")

    def probe(self, egress: bool = False) -> Probe:
        """Traffic from and to the host that faults hit: both directions, all families; with new connections outside."""
        return Probe([*self._routes(), *(self._egress() if egress else ())])

    def _routes(self) -> list[Route]:
        return [
            Route(f"{a.pod.name} to {b.pod.name}, {family.label}", a.pod.netns, a.pod_address(family),
                  b.pod.netns, b.pod_address(family))
            for family in self.lab.spec.families
            for a, b in ((self.host, self.peer), (self.peer, self.host))
        ]  # fmt: skip

    def _egress(self) -> list[Route]:
        host, outside = self.host, self.lab.outside.netns
        return [
            Route(f"{host.pod.name} to outside, {family.label}", host.pod.netns, host.pod_address(family),
                  outside, OUTSIDE[family], True, host.address(family))
            for family in self.lab.spec.families[:1]
        ]  # fmt: skip

    # ---- measures -----------------------------------------------------------------------------

    @cached_property
    def words(self) -> dict[str, str]:
        """What scripts of faults may name in braces, as host 1 sees host 2."""
        family, host, peer = self.case.family, self.host, self.peer
        gateway, own = peer.gateway(family) or "", host.gateway(family) or ""
        base = _base(gateway)
        mac = ""
        if self.case.backend == "vxlan":
            entries = json.loads(host.run("bridge", "-j", "fdb", "show", "dev", self.case.device).stdout)
            mac = next(entry["mac"] for entry in entries if entry.get("dst") == peer.address(family))
        v4 = family is Family.V4
        return {
            "ip": "ip -4" if v4 else "ip -6",
            "v": "4" if v4 else "6",
            "dev": self.case.device or "eth0",
            "base": base.partition("/")[0],
            "subnet": base,
            "network": "10.244.0.0/16" if v4 else "fd00:244::/48",
            "own_subnet": _base(own),
            "own_base": _base(own).partition("/")[0],
            "bits": str(family.bits),
            "own": host.address(family),
            "host": peer.address(family),
            "nowhere": "198.18.0.99" if v4 else "2001:db8:18::99",
            "address": f"{host.address(family)}/{24 if v4 else 64}",
            "other": "198.18.0.77/24" if v4 else "2001:db8:18::77/64",
            "router": "198.18.0.1" if v4 else "2001:db8:18::1",
            "stray": "10.244.250.0/24" if v4 else "fd00:244:0:fa00::/64",
            "foreign": "192.168.1.125/24" if v4 else "2001:db8:99::125/64",
            "mac": mac,
            "port": foreign.port_of(host),
            "netns": host.netns,
            "switch": self.lab.spec.netns("switch"),
            "file": str(host.daemon.subnet_file),
            "plug_in": foreign.plug_in(host),
            "routes": foreign.routes_of_others(host, self.case.device),
            "firewall": foreign.FIREWALL,
        }

    def repairs(self, host: Host | None = None) -> list[Repair]:
        """All that ``flannelctl audit`` tells of the daemon's repairs."""
        return [
            Repair(entry["kind"], entry["seen"] + entry["after_ms"] / 1000, entry["text"])
            for entry in ask(host or self.host, "/audit")
        ]

    def has_repaired(self, since: float, before: Mapping[str, int]) -> bool:
        """Whether a repair was told after a moment, or is counted that was not counted before."""
        return self.status().get("repairs", {}) != before or any(repair.at >= since for repair in self.repairs())

    def last_change(self, since: float) -> float | None:
        """When tables of any host were last changed, after a moment: their logs tell to the microsecond."""
        year, last = datetime.now().year, None
        for host in self.lab.hosts:
            for stamp in _RECONCILED.findall(host.daemon.log()):
                at = datetime.strptime(f"{year}{stamp}", "%Y%m%d %H:%M:%S.%f").timestamp()
                if at >= since:
                    last = max(last or at, at)
        return last

    def status(self, host: Host | None = None) -> dict[str, Any]:
        """What ``flannelctl status`` tells; empty without a daemon."""
        found = ask(host or self.host, "/status")
        return found[0] if found else {}

    def wrong(self, full_size: bool = False, leases: Mapping[str, str] | None = None) -> list[str]:
        """What is not as it should be, cheapest first; empty when all is.

        Args:
            full_size: try full-size packets as well.
            leases: what etcd holds, where it cannot be asked.
        """
        for host in self.lab.hosts:
            if not host.daemon.is_ready():
                return [f"{host.name} is not ready: {' '.join(host.daemon.ask('/readyz')[1].split())}"]
        leases = self.lab.etcd.items(SUBNETS_KEY) if leases is None else leases
        if len(leases) < len(self.lab.hosts):
            return [f"{len(leases)} leases of {len(self.lab.hosts)} hosts"]
        found = [f"{host.name}: {entry}" for host in self.lab.hosts for entry in wrong_entries(host, self.case, leases)]
        if found:
            return found
        for family in self.lab.spec.families:
            for (a, b), outcome in ping_matrix(self.lab, family).items():
                if outcome.lost:
                    found.append(f"{family.label} from pod{a} to pod{b} is lost")
            if full_size:
                for a, b in ((1, 2), (2, 1)):
                    size, outcome = full_size_ping(self.lab, a, b, family)
                    if outcome.lost:
                        found.append(f"{size} bytes of {family.label} from pod{a} to pod{b} are lost")
        return found

    def lease_key(self, host: Host) -> str:
        """The key of a host's lease in etcd."""
        subnets = [_base(host.gateway(family) or "").replace("/", "-") for family in self.lab.spec.families]
        return SUBNETS_KEY + "&".join(subnets)

    def await_tables(self) -> list[str]:
        """Wait until the tables of all hosts are as the leases say; what is not at the deadline."""
        leases = self.lab.etcd.items(SUBNETS_KEY)
        return await_none(lambda: [one for host in self.lab.hosts for one in self._wrong_entries(host, leases)])

    def _wrong_entries(self, host: Host, leases: Mapping[str, str]) -> list[str]:
        """The covering route is ours alone: Go flanneld has none."""
        found = wrong_entries(host, self.case, leases)
        return [entry for entry in found if self.is_ours or " covering " not in entry]

    def await_right(self, timeout_s: float = DEADLINE_S, full_size: bool = False) -> list[str]:
        """Wait until nothing is wrong; what still is at the deadline."""
        return await_none(lambda: self.wrong(full_size), timeout_s)

    def rebase(self) -> None:
        """Take everything on every host as it stands for what it has to be."""
        self._base = {host.name: self._snapshot(host) for host in self.lab.hosts}

    def changes(self, everywhere: bool = False) -> list[str]:
        """What is not as it was before: ours, others', left over.

        Args:
            everywhere: look at all hosts; else at the one that faults hit, which is what costs less.
        """
        return [
            f"{host.name}: {line}"
            for host in (self.lab.hosts if everywhere else [self.host])
            for line in differences(self._base[host.name], self._snapshot(host))
        ]

    def _snapshot(self, host: Host) -> Snapshot:
        found = snapshot(host)
        del found["answers"]  # come with packets and go with time
        for kind in ("addresses", "routes", "routes6"):  # link-local ones are the kernel's, and come when it likes
            found[kind] = [line for line in found[kind] if "fe80:" not in line and "ff00::" not in line]
        found["files"] = [line for line in found["files"] if "/state/" not in line]
        found["routes"] = [line for line in found["routes"] if not line.startswith("unreachable")]
        found["routes6"] = [line for line in found["routes6"] if not line.startswith("unreachable")]
        own_local = re.compile(rf" dev {re.escape(self.case.device)} proto kernel metric")
        for kind in ("routes", "routes6"):  # to our own address, which the local table knows as well
            found[kind] = [line for line in found[kind] if not own_local.search(line)]
        found["filters"] = [re.sub(r" id \d+ name \S+ tag \w+ jited", "", line) for line in found["filters"]]
        found["links"] = [re.sub(r'("flannel0c.", \w+, )"[^"]+"', r"\1-", line) for line in found["links"]]  # made anew
        if self.case.is_on_demand:
            mine = f" dev {self.case.device} "
            for kind in ("routes", "neighbours", "fdb"):
                found[kind] = [line for line in found[kind] if mine not in f"{line} "]
        return found

    def log_sizes(self) -> dict[str, int]:
        """How long the log of each host is."""
        return {host.name: len(host.daemon.log()) for host in self.lab.hosts}

    def log_complaints(self, sizes: Mapping[str, int], lines_at_most: int = LINES_AT_MOST) -> list[str]:
        """What logs must not contain since then."""
        found = []
        for host in self.lab.hosts:
            text = host.daemon.log()[sizes[host.name] :]
            if "Traceback" in text:
                found.append(f"{host.name}: a traceback in its log: {text[text.index('Traceback') :][-300:]}")
            if (lines := text.count("\n")) > lines_at_most:
                found.append(f"{host.name}: {lines} lines in its log")
        return found


def ask(host: Host, page: str) -> list[dict[str, Any]]:
    """The JSON objects of a page of a daemon's own socket; none without a daemon."""
    try:
        _, body = asyncio.run(control.ask(control.socket_path(host.daemon.subnet_file), page))
    except (OSError, TimeoutError):
        return []
    return [json.loads(line) for line in body.decode().splitlines()]


def await_none(find: Callable[[], Sequence[str]], timeout_s: float = DEADLINE_S, pause_s: float = 0.02) -> list[str]:
    """Wait until nothing is found any more; what is still found at the deadline."""
    deadline = time.monotonic() + timeout_s
    while found := find():
        if time.monotonic() > deadline:
            return list(found)
        time.sleep(pause_s)
    return []


def _base(gateway: str) -> str:
    """The block that a gateway is of: ``10.244.7.1/24`` → ``10.244.7.0/24``."""
    return re.sub(r"1(/\d+)$", r"0\1" if "." in gateway else r"\1", gateway)
