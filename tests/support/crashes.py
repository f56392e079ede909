"""A daemon that is killed before everything it does, and started again; and one that is restarted again and again.

``python -m tests.support.crashes`` does it completely, for each backend, and prints what happened
(``flanneld/design/figures/etcd-faults.md``); tests take a sample.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from flanneld.lab import Lab, LabSpec
from flanneld.lab.daemon import own_command
from flanneld.lab.node import Host
from flanneld.lab.probe import ping_matrix
from flanneld.lab.spec import SUBNETS_KEY
from tests.faults.probe import Outcome, Probe, Route
from tests.support import crash_at
from tests.support.live import until
from tests.support.snapshot import Snapshot, differences, snapshot

COMMAND = (sys.executable, crash_at.__file__)
DEADLINE_S = 20.0
RIGHT_S = 5.0
"""From readiness after a crash until nothing is wrong any more; the firewall may be a little behind."""
COMPLAINTS = 8
"""Told of one crash."""
LATE_S = 1.5
"""After the start is over, what it does in the background: the memory of leases."""


class Phase(NamedTuple):
    """When the daemon is killed, and in what world."""

    name: str
    counts_from: str
    """For ``CRASH_FROM``."""
    cold: bool = False
    """The kernel has forgotten everything, as after a reboot; else it holds what an earlier run left."""


PHASES = (
    Phase("first start after a reboot", "start", cold=True),
    Phase("start over a running data path", "start"),
    Phase("changes and damage", "ready"),
    Phase("stop", "stop"),
)
BACKENDS = ("vxlan", "host-gw", "udp")


class Killed(NamedTuple):
    """One death and what came of it."""

    phase: str
    point: str
    complaints: tuple[str, ...]
    back_s: float
    """From the start after it to readiness."""


def power_cut(host: Host) -> None:
    """What a reboot leaves: the disk, and containers' own devices; no daemon, no device, no rules, no ``/run``."""
    host.daemon.kill()
    for link in json.loads(host.run("ip", "-j", "link", "show").stdout):
        if link["ifname"].startswith("flannel"):
            host.run("ip", "link", "del", link["ifname"], check=False)  # a veth goes with its peer
    host.run("tc", "qdisc", "del", "dev", "eth0", "clsact", check=False)
    for family in ("-4", "-6"):
        host.run("ip", family, "route", "flush", "proto", "86", check=False)
    host.run("nft", "flush", "ruleset")
    for name in ("subnet.env", "subnet.sock"):
        (host.directory / name).unlink(missing_ok=True)


class Bed:
    """Three hosts; the first one's daemon dies. A context manager.

    Args:
        backend: ``Backend.Type``.
    """

    def __init__(self, backend: str) -> None:
        self.lab = Lab(LabSpec(f"c{secrets.token_hex(4)}", hosts=3, ephemeral=True, backend={"Type": backend}))
        self.host = self.lab.host(1)
        self.deaths = 0
        self._base: Snapshot = {}
        self._subnet = ""

    def __enter__(self) -> Bed:
        self.lab.up()
        try:
            power_cut(self.host)  # so that what is compared with is a start after a reboot, too
            self._start()
            self._subnet = self.host.subnet_env()["FLANNEL_SUBNET"]
            until(lambda: not [*self._wrong()], "everything is right before the first crash")
            until(lambda: [*self.host.daemon.state_dir.rglob("*.cache")], "leases are remembered")
            self._base = _without_numbers(snapshot(self.host))
        except BaseException:
            self.lab.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.down()

    def _start(self) -> float:
        self.host.daemon.command = own_command()
        began = time.monotonic()
        self.host.daemon.start()
        self.host.daemon.wait_ready(DEADLINE_S)
        return time.monotonic() - began

    def points(self, phase: Phase) -> list[str]:
        """Run through a phase without dying; what the daemon does in it."""
        trace = self.host.directory / "flanneld.trace"
        trace.unlink(missing_ok=True)
        self._run(phase, {"CRASH_TRACE": str(trace)})
        self.host.daemon.kill()
        found = trace.read_text().splitlines() if trace.exists() else []
        trace.unlink(missing_ok=True)
        self._start()
        return found

    def kill(self, phase: Phase, point: int) -> Killed:
        """Die before the given thing, start again, and look."""
        self._run(phase, {"CRASH_AT": str(point)})
        died = not self.host.daemon.is_running() and "killed before" in self.host.daemon.log()
        where = self.host.daemon.log().rpartition("killed before ")[2].splitlines()[0] if died else "(not reached)"
        self.deaths += died
        self.host.daemon.kill()
        back_s = self._start()
        complaints: list[str] = []

        def is_right() -> bool:
            complaints[:] = self._wrong()
            return not complaints

        with contextlib.suppress(AssertionError):  # told as complaints
            until(is_right, "the right state", RIGHT_S)
        return Killed(phase.name, where, tuple(complaints), back_s)

    def _run(self, phase: Phase, env: dict[str, str]) -> None:
        """Start, and do what the phase is about, until the daemon has died or there is nothing more to come."""
        daemon = self.host.daemon
        power_cut(self.host) if phase.cold else daemon.kill()
        daemon.command = COMMAND
        before = len(daemon.log())
        daemon.start(env={"CRASH_FROM": phase.counts_from, **env})
        until(lambda: not daemon.is_running() or daemon.is_ready(), "the start is over")
        if phase.counts_from == "ready" and daemon.is_running():
            self._disturb()
        if phase.counts_from == "stop" and daemon.is_running():
            daemon.stop()
        deadline = time.monotonic() + LATE_S
        while daemon.is_running() and time.monotonic() < deadline and "killed before" not in daemon.log()[before:]:
            time.sleep(0.02)

    def _disturb(self) -> None:
        """Other hosts come and go, and somebody breaks things."""
        value = '{"PublicIP":"198.18.0.77","PublicIPv6":null,"BackendType":"host-gw"}'
        taken = self.lab.etcd.items(SUBNETS_KEY)
        free = [key for n in range(201, 210) if (key := f"{SUBNETS_KEY}10.244.{n}.0-24") not in taken][:3]
        for key in free:
            self.lab.etcd.put(key, value)
        for key in free:
            self.lab.etcd.delete(key)
        self.host.run("nft", "flush", "ruleset", check=False)
        self.host.run("ip", "link", "del", "flannel.1", check=False)
        self.host.run("ip", "link", "set", "flannel0", "down", check=False)
        self.host.run("ip", "route", "flush", "proto", "86", check=False)
        self.host.daemon.subnet_file.unlink(missing_ok=True)

    def _wrong(self) -> Iterator[str]:
        if self._subnet and self.host.subnet_env().get("FLANNEL_SUBNET") != self._subnet:
            yield f"another subnet: {self.host.subnet_env()}"
        yield from (f"left over: {path}" for path in self.host.directory.rglob(".*"))
        keys = self.lab.etcd.items(SUBNETS_KEY)
        if len(keys) != len(self.lab.hosts):
            yield f"keys in etcd: {sorted(keys)}"
        orphans = self.orphans()
        if orphans > self.deaths:
            yield f"{orphans} orphan leases in etcd after {self.deaths} crashes"
        if self._base:
            yield from differences(self._base, _without_numbers(snapshot(self.host)))
        lost = {pair for pair, ping in ping_matrix(self.lab, self.lab.spec.families[0]).items() if ping.lost}
        if lost:
            yield f"no way between pods {sorted(lost)}"

    def orphans(self) -> int:
        """Leases in etcd that no key is attached to."""
        listed = self.lab.etcd.ctl("lease", "list").splitlines()[1:]
        return len(listed) - len(self.lab.hosts)

    def route(self, source: int, target: int) -> Route:
        """A stream between two pods, for the probe."""
        a, b = self.lab.host(source), self.lab.host(target)
        return Route(f"pod{source} to pod{target}", a.pod.netns, a.pod_address(), b.pod.netns, b.pod_address())


def _without_numbers(found: Snapshot) -> Snapshot:
    """What the kernel chooses anew with each device and program left out."""
    chosen = re.compile(r"(?<=flannel0c[01]\", null, )\"[0-9a-f:]{17}\"|fe80::[0-9a-f:]+|\bid \d+|\btag [0-9a-f]+")
    return {kind: sorted(chosen.sub("…", line) for line in lines) for kind, lines in found.items()}


class Report(NamedTuple):
    """Outcome of ``crash_everywhere``."""

    backend: str
    seed: int
    points: dict[str, int]
    """How many things there are to die before, by phase."""
    killed: list[Killed]
    bystanders: list[Outcome]
    """The stream between two other hosts, during all of it."""
    through: list[Outcome]
    """The streams from and to the host itself, while it had a data path and only its daemon died."""
    orphans: int


def crash_everywhere(backend: str, per_phase: int | None = None, seed: int | None = None) -> Report:
    """Kill the daemon before each thing it does, or before ``per_phase`` of them chosen at random."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    choice = random.Random(seed)
    counts: dict[str, int] = {}
    killed: list[Killed] = []
    through: list[Outcome] = []
    with Bed(backend) as bed, Probe([bed.route(2, 3)]) as bystanders:
        for phase in PHASES:
            counts[phase.name] = len(bed.points(phase))
            every = range(1, counts[phase.name] + 1)
            some = every if per_phase is None else sorted(choice.sample(every, min(per_phase, len(every))))
            if phase.cold or phase.counts_from == "ready":  # the data path itself is broken then
                killed += [bed.kill(phase, point) for point in some]
                continue
            with Probe([bed.route(1, 2), bed.route(2, 1)]) as probe:
                killed += [bed.kill(phase, point) for point in some]
                through += probe.end()
        return Report(backend, seed, counts, killed, bystanders.end(), through, bed.orphans())


class Restarts(NamedTuple):
    """Outcome of ``restart``."""

    backend: str
    times: int
    seconds: float
    outcomes: list[Outcome]


def restart(backend: str, count: int) -> Restarts:
    """Restart a daemon, by SIGTERM and by SIGKILL in turn, under a thousand packets a second each way (failure F45)."""
    with Bed(backend) as bed, Probe([bed.route(1, 2), bed.route(2, 1), bed.route(2, 3)]) as probe:
        began = time.monotonic()
        for number in range(count):
            bed.host.daemon.signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
            until(lambda: not bed.host.daemon.is_running(), "the daemon ends")
            bed._start()
        seconds = time.monotonic() - began
        return Restarts(backend, count, seconds, probe.end())


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.crashes")
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--per-phase", type=int, help="a sample of so many; without it, all")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--restarts", type=int, default=100)
    given = parser.parse_args()
    bad = 0
    for backend in given.backend or BACKENDS:
        report = crash_everywhere(backend, given.per_phase, given.seed)
        print(f"{backend}: seed {report.seed}, points {report.points}, orphan leases {report.orphans}")
        wrong = [death for death in report.killed if death.complaints]
        slowest = max(report.killed, key=lambda death: death.back_s)
        print(
            f"  killed {len(report.killed)} times, bad ends {len(wrong)}, ready again in {slowest.back_s:.2f} s at most"
        )
        for death in wrong:
            print(f"  {death.phase}, before {death.point}: {death.complaints[:COMPLAINTS]}")
        for outcome in report.bystanders + report.through:
            print(f"  {outcome.name}: sent {outcome.sent} lost {outcome.lost()}")
        bad += len(wrong) + sum(outcome.lost() for outcome in report.bystanders + report.through)
        if given.restarts:
            done = restart(backend, given.restarts)
            print(f"  {done.times} restarts in {done.seconds:.0f} s")
            for outcome in done.outcomes:
                print(
                    f"  {outcome.name}: sent {outcome.sent} lost {outcome.lost()} longest {outcome.outage_ms():.0f} ms"
                )
                bad += outcome.lost()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
