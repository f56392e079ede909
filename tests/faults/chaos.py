"""``python -m tests.faults.chaos``: faults at random, of hosts, daemons and etcd, for as long as you like.

One cluster after another, each of a random kind, is attacked step by step; after each step everything must come right:
every pod reaches every other, tables are what the leases say, hosts keep their subnets, what others have is as it
was, nothing is left over, and logs and memory stay small. What is done follows from the seed and the number of the
cluster alone, so a failure can be repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flanneld.errors import FlannelError
from flanneld.lab.node import Host
from flanneld.lab.spec import SUBNETS_KEY
from tests.conftest import missing
from tests.faults.bed import Bed, await_none
from tests.faults.cases import ALL, CASES, TOOLS
from tests.faults.fault import Fault
from tests.faults.registry import FAULTS
from tests.support.snapshot import Snapshot

STEPS = 12
"""In one cluster."""
DEADLINE_S = 20.0
"""For everything to come right after a step."""
RSS_AT_MOST_KIB = 96 << 10
LINES_AT_MOST = 400
"""In the log of one host in one step."""
MEMBERS = range(1, 4)
"""Of etcd."""
HOLLOW = range(200, 250)
"""Third bytes of the subnets of hosts that are only a lease; real ones are below."""
HOLLOW_MAC = "02:00:00:0c:"


class Broken(AssertionError):
    """Something has not come right."""


class Chaos:
    """The attack on one cluster.

    Args:
        seed: of the whole run.
        number: of the cluster; what is done in it follows from both.
        tell: takes each line of the report.
    """

    def __init__(self, seed: int, number: int, tell: Callable[[str], None], backend: Sequence[str] = ()) -> None:
        self._choose = random.Random(f"{seed}/{number}")
        self.case = self._choose.choice([case for case in ALL if not backend or case in backend])
        self.steps: list[str] = []
        self._tell = tell
        self._down: set[int] = set()
        """Members of etcd that have been killed."""
        self._hanging: set[int] = set()
        """Members that have been stopped."""
        self._apart: set[int] = set()
        """Members that hosts cannot reach."""
        self._leases: Mapping[str, str] = {}
        self._subnets: dict[str, str] = {}

    def run(self, steps: int, until: float) -> None:
        """Attack it.

        Args:
            steps: how many.
            until: a moment of the monotonic clock, after which no further step begins.

        Raises:
            Broken: something has not come right; ``steps`` has what was done.
        """
        with ChaosBed(self.case) as bed:
            self._subnets = {host.name: str(host.subnet_env()) for host in bed.lab.hosts}
            for _ in range(steps):
                if time.monotonic() >= until:
                    return
                self._step(bed)
            self._step(bed, self._ease_all)
            if wrong := await_none(lambda: bed.changes(everywhere=True), DEADLINE_S):
                raise Broken("; ".join(wrong[:10]))

    def _step(self, bed: Bed, act: Callable[[Bed], str] | None = None) -> None:
        sizes = bed.log_sizes()
        act = act or self._choose.choices(*zip(*self._actions(bed), strict=True))[0]
        begun = time.monotonic()
        try:
            said = act(bed)
        except (FlannelError, AssertionError) as error:
            self.steps.append(act.__name__)
            raise Broken(str(error)) from error
        self.steps.append(said)
        self._tell(f"  {said}")
        wrong = await_none(lambda: self._wrong(bed), DEADLINE_S)
        wrong += self._too_much(bed, sizes)
        wrong += await_none(bed.changes, DEADLINE_S)
        if wrong:
            raise Broken("; ".join(wrong[:10]))
        self._tell(f"      right after {time.monotonic() - begun:.1f} s")

    def _actions(self, bed: Bed) -> list[tuple[Callable[[Bed], str], int]]:
        """What may be done now, with weights."""
        return [
            (self._fault, 10),
            (self._two_faults, 4),
            (self._kill_daemon, 4),
            (self._pause_daemon, 2),
            (self._delete_lease, 2 if self._works else 0),
            (self._churn, 5 if self._works else 0),
            (self._kill_member, 2 if len(self._troubled) < len(MEMBERS) else 0),
            (self._hang_member, 2 if len(self._troubled) < len(MEMBERS) else 0),
            (self._part_member, 2 if len(self._troubled) < len(MEMBERS) else 0),
            (self._ease, 6 if self._down | self._hanging | self._apart else 0),
        ]

    # ---- what is done -------------------------------------------------------------------------

    def _applicable(self) -> list[Fault]:
        return [
            fault
            for fault in FAULTS
            if self.case in fault.cases and fault.harm and not (fault.before or fault.act or fault.undo)
        ]

    def _hurts(self) -> list[Fault]:
        """What may happen to a host whose daemon does not run.

        Without etcd one that starts must not take anything for stale that a host might have leased meanwhile.
        """
        return [
            fault
            for fault in self._applicable()
            if not fault.whole and not fault.egress and (self._works or "F13" not in fault.failures)
        ]

    def _fault(self, bed: Bed) -> str:
        fault = self._choose.choice(self._applicable())
        self._make(bed, fault)
        return f"fault: {fault.name}"

    def _two_faults(self, bed: Bed) -> str:
        """The second in the middle of the repair of the first."""
        gentle = [fault for fault in self._applicable() if not fault.whole and "main table" not in fault.name]
        first, second = self._choose.sample(gentle, 2)
        pause_ms = self._choose.randrange(30)
        going = bed.shell(_tolerant(first, bed)), bed.shell(_tolerant(second, bed))
        going[0]()
        time.sleep(pause_ms / 1000)
        going[1]()
        for fault in (first, second):
            if fault.after:
                fault.after(bed)
        return f"faults {pause_ms} ms apart: {first.name}; {second.name}"

    def _make(self, bed: Bed, fault: Fault) -> None:
        bed.run(_tolerant(fault, bed))
        bed.run(fault.whole.format(**bed.words))
        if fault.after:
            fault.after(bed)

    def _kill_daemon(self, bed: Bed) -> str:
        host = self._choose.choice(bed.lab.hosts)
        end = self._choose.choice(("kill", "stop"))
        # a start takes a surviving device's MAC for the host's own, as after Go flanneld, and tells the peers of it
        hurt = self._choose.choice([None, *(fault for fault in self._hurts() if not fault.name.startswith("MAC of"))])
        getattr(host.daemon, end)()
        if hurt and host is bed.host:
            bed.run(_tolerant(hurt, bed))
        host.daemon.start(env=bed.env())
        host.daemon.wait_ready()
        return f"{end} the daemon of {host.name}{f', {hurt.name},' if hurt and host is bed.host else ''} and start it"

    def _pause_daemon(self, bed: Bed) -> str:
        host, seconds = self._choose.choice(bed.lab.hosts), self._choose.uniform(0.2, 3.0)
        fault = self._choose.choice(self._hurts())
        host.daemon.signal(signal.SIGSTOP)
        if host is bed.host:
            bed.run(_tolerant(fault, bed))
        time.sleep(seconds)
        host.daemon.signal(signal.SIGCONT)
        return f"stop the daemon of {host.name} for {seconds:.1f} s{f', {fault.name}' if host is bed.host else ''}"

    def _delete_lease(self, bed: Bed) -> str:
        host = self._choose.choice(bed.lab.hosts)
        bed.lab.etcd.delete(bed.lease_key(host))
        return f"delete the lease of {host.name}"

    def _churn(self, bed: Bed) -> str:
        """Hosts that are nothing but a lease come, move and go."""
        some = self._choose.sample(HOLLOW, self._choose.randrange(1, 12))
        gone = 0
        for third in some:
            key = _hollow_key(third, bed)
            if key in self._leases and self._choose.random() < 0.5:
                bed.lab.etcd.delete(key)
                gone += 1
            else:
                bed.lab.etcd.put(key, _hollow_lease(third, self._choose.randrange(256), bed))
        return f"{len(some) - gone} hollow hosts come or move, {gone} go"

    # ---- etcd ---------------------------------------------------------------------------------

    @property
    def _troubled(self) -> set[int]:
        return self._down | self._hanging | self._apart

    @property
    def _works(self) -> bool:
        """Whether etcd has a leader, and a member that hosts reach."""
        return len(self._down | self._hanging) < 2 and len(self._troubled) < len(MEMBERS)

    def _healthy_member(self) -> int:
        return self._choose.choice([member for member in MEMBERS if member not in self._troubled])

    def _ask_the_healthy(self, bed: Bed) -> None:
        """What is asked of etcd goes to members that can answer."""
        silent = self._down | self._hanging
        bed.lab.etcd.asked = [member for member in MEMBERS if member not in silent] or MEMBERS

    def _kill_member(self, bed: Bed) -> str:
        member = self._healthy_member()
        bed.lab.etcd.stop_member(member)
        self._down.add(member)
        self._ask_the_healthy(bed)
        return f"kill member {member} of etcd"

    def _hang_member(self, bed: Bed) -> str:
        member = self._healthy_member()
        bed.lab.etcd.pause(member)
        self._hanging.add(member)
        self._ask_the_healthy(bed)
        return f"SIGSTOP to member {member} of etcd"

    def _part_member(self, bed: Bed) -> str:
        member = self._healthy_member()
        self._apart.add(member)
        self._cut(bed)
        self._ask_the_healthy(bed)
        return f"member {member} of etcd is cut off from hosts"

    def _cut(self, bed: Bed) -> None:
        """Drop what hosts send to members. (Members share a namespace and an address to send from.)"""
        rules = ["table inet chaos { chain in { type filter hook input priority 0"]
        for member in self._apart:
            address = bed.lab.spec.member_address(member)
            rules.append(f"iifname != lo {'ip6' if ':' in address else 'ip'} daddr {address} drop")
        switch = bed.lab.switch
        switch.run("nft", "delete table inet chaos", check=False)
        switch.run("nft", "-f", "-", stdin="\n".join([*rules, "}", "}", ""]))

    def _ease(self, bed: Bed) -> str:
        member = self._choose.choice(sorted(self._troubled))
        self._mend(bed, member)
        return f"member {member} of etcd is well again"

    def _ease_all(self, bed: Bed) -> str:
        for member in sorted(self._troubled):
            self._mend(bed, member)
        hollow = [key for key in bed.lab.etcd.items(SUBNETS_KEY) if _is_hollow(key)]
        for key in hollow:
            bed.lab.etcd.delete(key)
        return "etcd is well again, hollow hosts go"

    def _mend(self, bed: Bed, member: int) -> None:
        if member in self._down:
            bed.lab.etcd.start_member(member)
        if member in self._hanging:
            bed.lab.etcd.pause(member, paused=False)
        for troubled in (self._down, self._hanging, self._apart):
            troubled.discard(member)
        self._cut(bed)
        self._ask_the_healthy(bed)
        if not self._troubled:
            bed.lab.etcd.wait_healthy()

    # ---- what must hold -----------------------------------------------------------------------

    def _wrong(self, bed: Bed) -> list[str]:
        if self._works:
            try:
                self._leases = bed.lab.etcd.items(SUBNETS_KEY)
            except (FlannelError, OSError) as error:  # members are electing
                return [str(error)]
        for host in bed.lab.hosts:
            if str(host.subnet_env()) != self._subnets[host.name]:
                return [f"{host.name} has another subnet.env: {host.subnet_env()}"]
        return bed.wrong(leases=self._leases)

    def _too_much(self, bed: Bed, sizes: Mapping[str, int]) -> list[str]:
        found = bed.log_complaints(sizes, LINES_AT_MOST)
        for host in bed.lab.hosts:
            if (kib := _rss_kib(host)) > RSS_AT_MOST_KIB:
                found.append(f"the daemon of {host.name} has {kib} KiB")
        return found


class ChaosBed(Bed):
    """A cluster with three members of etcd, whose hosts lease another part of the network than hollow ones."""

    def __init__(self, case: str) -> None:
        conf: dict[str, object] = {"SubnetMax": f"10.244.{HOLLOW.start - 1}.0", "IPv6SubnetMin": "fd00:244:0:1000::"}
        super().__init__(case, etcd_members=len(MEMBERS), config={**CASES[case].spec.get("config", {}), **conf})  # type: ignore[dict-item]

    def _snapshot(self, host: Host) -> Snapshot:
        found = super()._snapshot(host)
        return {kind: [line for line in lines if not _is_hollow(line)] for kind, lines in found.items()}


def _tolerant(fault: Fault, bed: Bed) -> str:
    """A fault's script, where an earlier fault, or the repair of its own first half, may have taken what it breaks."""
    return f"{{ {fault.harm.format(**bed.words)}\n}} 2>/dev/null; true"


def _hollow_key(third: int, bed: Bed) -> str:
    v6 = f"&fd00:244:0:{third:x}::-64" if len(bed.lab.spec.families) == 2 else ""
    return f"{SUBNETS_KEY}10.244.{third}.0-24{v6}"


def _hollow_lease(third: int, last: int, bed: Bed) -> str:
    lease: dict[str, object] = {"PublicIP": f"198.18.0.{third}", "BackendType": bed.case.backend}
    if bed.case.backend == "vxlan":
        lease["BackendData"] = {"VNI": 1, "VtepMAC": f"{HOLLOW_MAC}{third:02x}:{last:02x}"}
    if len(bed.lab.spec.families) == 2:
        lease |= {"PublicIPv6": f"2001:db8:18::{third:x}", "BackendV6Data": lease.get("BackendData")}
    return json.dumps(lease)


_HOLLOW = re.compile(rf"10\.244\.2[0-4]\d\.|198\.18\.0\.2[0-4]\d|{HOLLOW_MAC}|fd00:244:0:[c-f][0-9a-f]::")


def _is_hollow(line: str) -> bool:
    return _HOLLOW.search(line) is not None


def _rss_kib(host: Host) -> int:
    try:
        status = Path(f"/proc/{host.daemon.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) if found else 0


class Report(NamedTuple):
    """What became of a run."""

    clusters: int
    steps: int
    failure: str
    """Empty when all went well; else everything that is needed to repeat it."""


def attack(
    seed: int,
    minutes: float,
    tell: Callable[[str], None],
    first: int = 0,
    steps: int = STEPS,
    backend: Sequence[str] = (),
) -> Report:
    """Attack cluster after cluster until the time is over or something has not come right."""
    until = time.monotonic() + minutes * 60
    number, done = first, 0
    while time.monotonic() < until:
        chaos = Chaos(seed, number, tell, backend)
        if lack := next(filter(None, map(missing, (*TOOLS, *CASES[chaos.case].needs))), ""):
            tell(f"cluster {number}, {chaos.case}: left out, this machine lacks {lack}")
            number += 1
            continue
        tell(f"cluster {number}, {chaos.case}")
        try:
            chaos.run(steps, until)
        except (Broken, FlannelError) as error:
            again = f"python -m tests.faults.chaos --seed {seed} --first {number} --steps {steps}"
            if backend:
                again += f" --backend {','.join(backend)!r}"
            lines = [f"{at}. {step}" for at, step in enumerate(chaos.steps, 1)]
            story = "\n".join([f"cluster {number}, {chaos.case}:", *lines, f"NOT RIGHT: {error}", f"again: {again}"])
            return Report(number - first, done + len(chaos.steps), story)
        done += len(chaos.steps)
        number += 1
    return Report(number - first, done, "")


def main(argv: Sequence[str]) -> int:
    """Attack and tell; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31), metavar="N", help="default: at random")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="how long (default 5)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="begin with this cluster, to repeat a failure"
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"in each cluster (default {STEPS})")
    parser.add_argument(
        "--backend", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=", ".join(ALL)
    )
    given = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("faults are made in network namespaces, so this must run as root", file=sys.stderr)
        return 1
    print(f"seed {given.seed}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    report = attack(
        given.seed, given.minutes, lambda line: print(line, flush=True), given.first, given.steps, given.backend
    )
    print(report.failure or f"{report.steps} steps in {report.clusters} clusters, everything came right each time")
    return 1 if report.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
