"""The loop: whatever happens sets a reason; a cycle makes the kernel right and reports.

A *full* cycle reads everything of ours, compares and repairs: so a lost event, a deleted device, a crash
and a first start are all the same case. A *short* cycle does what is already known to have changed, a
lease or an entry that somebody deleted, and costs what that weighs; a full one follows when things calm
down and proves it right. Imports no I/O module: kernel and data path come in as contracts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from flanneld.contracts import DataPath, Failure, Kernel
from flanneld.errors import KernelError
from flanneld.flood import Flood
from flanneld.model.lease import Lease, LeaseTable
from flanneld.model.objects import Address, Fdb, KernelObject, Link, Neighbour, Offload, Route, Sysctl, subject
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb, plan, plan_changes
from flanneld.plan.drift import Entry, Repair, device_of, repairs
from flanneld.plan.fights import FIGHT_S, GAP_S, Fights
from flanneld.problems import Notices, Remarks
from flanneld.retry import backoff
from flanneld.wake import Reasons, Wake

log = logging.getLogger("flanneld.reconcile")

SLOW_CHECK_S = 60.0
"""A full look without any reason: the net under everything that a notification might miss."""

SLOW_SHARE = 0.005
"""Longest share of one processor that slow checks may take: where one costs much, they come less often."""

CALM_S = 2.0
"""After a short cycle: this long without another one, then a full look."""

RETRY_S = 1.0
"""After a failed operation or a failed read; then longer and longer, up to ``SLOW_CHECK_S``."""

AUDIT_LINES = 20
"""Repairs told one by one in a cycle; a flush of thousands is told as a number."""

LARGE = 1000
"""Operations in one cycle after which there is memory to give back."""

FIGHT_CHECK_S = 0.02
"""Shortest time between two looks because of a fight."""

LEASES = "leases"
DAMAGE = "damage"
SHORT = frozenset({LEASES, DAMAGE})
"""Reasons for which a short cycle is enough."""


class Tell(NamedTuple):
    """Where the loop's findings go."""

    report: Callable[[str | None], None]
    """What is wrong, or None."""
    remark: Remarks = lambda _: None
    """What works but is not as it should be."""
    repaired: Callable[[Repair, float, str], None] = lambda _repair, _after_s, _by: None
    """Each repair, how many seconds after it was noticed, and who did the damage if that is known."""


class Reconciler:
    """Owns the writing side of the kernel; one task runs ``run``."""

    def __init__(
        self,
        kernel: Kernel,
        path: DataPath,
        table: LeaseTable,
        wake: Wake,
        tell: Tell,
        after_large: Callable[[], None] = lambda: None,
    ) -> None:
        self._kernel, self._path, self._table, self._wake = kernel, path, table, wake
        self._report, remark, self._repaired = tell
        self._notices = Notices(log, remark)
        self._after_large = after_large
        self._fights = Fights()
        self._fought: dict[Hashable, str] = {}
        """Fights under way, as sentences."""
        self._culprits: dict[tuple[object, ...], str] = {}
        """By subject, who changed it as far as the kernel told, since the last cycle."""
        self._settled: set[KernelObject] = set()
        """Devices, settings and addresses that were right after the last cycle: put again, they are repairs."""
        self._fresh: set[KernelObject] = set()
        """Entries that leases brought, changed or took since the last cycle; any other write is a repair."""
        self._was_right = False
        """Whether there was a cycle that left nothing undone, so that there is something to repair."""
        self._damaged: dict[KernelObject, Entry | Sysctl | None] = {}
        """Wanted entries and settings that were announced as gone or changed, and what is there instead."""
        self._mended: list[Op] = []
        """What was announced so and is right again when a full cycle looks: an answer to a miss, or a short cycle that
        failed in something else, has put it back. For telling only."""
        self._notes: dict[str, str] = {}
        self._flood = Flood(log, "leases that are not used")
        self._answers = Flood(
            log,
            "rounds of wrong answers removed",
            "does a pod make up neighbours? deploy/hardening keeps it from that",
            level=logging.INFO,
        )
        self._recreate: frozenset[str] = frozenset()
        self._full_cycles = 0
        self._full_cost_s = 0.0
        """How long the last full cycle took."""
        self._is_right = False
        """Whether the last cycle left nothing undone, so that a short one can build on it."""
        self._broken: dict[str, str] = {}

    async def run(self) -> None:
        """Turn reasons into cycles, for ever."""
        pause_s, retries = self._slow_s(), backoff(RETRY_S, SLOW_CHECK_S)
        while True:
            reasons = await self._wake.wait(pause_s)
            if await self.cycle(reasons):
                pause_s = next(retries)  # what others hold on to is not fought over every second for ever
            else:
                retries = backoff(RETRY_S, SLOW_CHECK_S)
                pause_s = CALM_S if reasons.names and SHORT.issuperset(reasons.names) else self._slow_s()
            if (due_s := self._fights.due_s(time.monotonic())) is not None:
                pause_s = min(pause_s, max(due_s, FIGHT_CHECK_S))

    def _slow_s(self) -> float:
        return max(SLOW_CHECK_S, self._full_cost_s / SLOW_SHARE)

    def damaged(self, want: Entry | Sysctl, instead: Entry | Sysctl | None) -> None:
        """What we want was announced as gone (or as changed to ``instead``): put it back in a short cycle."""
        self._damaged[want] = instead
        self._wake(DAMAGE)

    def blame(self, obj: KernelObject, who: str) -> None:
        """Who made the change of an object that was just announced."""
        if len(self._culprits) < AUDIT_LINES:
            self._culprits[subject(obj)] = who

    def take_leases(self) -> None:
        """Bring ``desired`` up to date with changed leases now, and write the difference soon."""
        if self._path.is_settled:
            self._take_changed()
        self._wake(LEASES)

    def _take_changed(self) -> None:
        path, table = self._path, self._table
        leases: dict[str, Lease | None] = {key: table.get(key) for key in table.take_changes()}
        direct = self._kernel.onlink(path.public_addresses(filter(None, leases.values())))
        self._tell_notes(path.update(leases, direct))

    async def cycle(self, reasons: Reasons) -> bool:
        """One round; tells whether something remains to be retried."""
        began = time.monotonic()
        try:
            if self._is_right and reasons.names and SHORT.issuperset(reasons.names):
                full = False
                ops, failures = await self._short()
            else:
                full = True
                ops, failures = await self._full()
                self._full_cost_s = time.monotonic() - began
        except KernelError as exc:
            if self._broken.get("") != str(exc):
                log.error("cannot make the data path right, trying again: %s", exc)
            self._broken = {"": str(exc)}
            self._is_right = False
            self._report(str(exc))
            return True
        self._is_right = self._full_cycles > 1 and not failures
        if failures and not full:
            # Something larger changed, a device for instance: whatever it is, a full look finds it.
            self._wake("a short cycle failed")
            return False
        self._tell(reasons, ops, failures, began)
        self._remember(failures)
        # A device that cannot be changed in place is made anew, once, in the next cycle.
        self._recreate = frozenset(
            f.op.obj.name for f in failures if f.op.verb is Verb.PUT and isinstance(f.op.obj, Link)
        )
        self._report(str(failures[0].error) if failures else None)
        if len(ops) >= LARGE:
            del ops
            self._after_large()
        return bool(failures)

    async def _full(self) -> tuple[list[Op], list[Failure]]:
        """Read, compare, repair."""
        path, table = self._path, self._table
        damaged, self._damaged = self._damaged, {}
        if path.runner is not None:
            path.runner.prepare()
        observed = await self._kernel.read(path.own, path.desired.sysctls)
        if table.usable:
            self._take_leases(observed)
        self._fresh.update(path.desired.take_changes())
        ops = plan(
            path.desired,
            observed,
            path.own,
            deletions=table.complete,
            answer_is_right=path.answer_is_right,
            recreate=self._recreate,
        )
        right = [obj for obj in damaged if obj in path.desired and obj in observed]
        put = {op.obj for op in ops} if right else set()
        self._mended = [Op(Verb.PUT, obj, damaged[obj]) for obj in right if obj not in put]
        ops = self._hold_back(ops)
        failures = await self._kernel.apply(ops)
        if table.usable:
            # What came while nobody listened (at start, after an overrun) is still being asked for.
            # (An address that nobody seems to have is left to the kernel to ask for again: see ``Pager``.)
            open_ = [(link, ip, None) for link, ip in observed.unresolved if not path.is_unknown(link, ip)]
            answers = path.answer(open_)
            failures += await self._kernel.apply(answers)
            self._full_cycles += 1
            if self._full_cycles == 1:
                self._wake("page ahead")
        if path.runner is not None and table.usable:
            path.runner.apply()
        return ops, failures

    def _take_leases(self, observed: State) -> None:
        """Bring ``desired`` up to date: all leases where routes or settings decide, else those that changed."""
        path, table = self._path, self._table
        if path.is_settled and not path.watches_routes:
            self._take_changed()
            return
        table.take_changes()
        direct = self._kernel.onlink(path.public_addresses(table))
        self._tell_notes(path.settle(table.by_key, observed, direct, fill=self._full_cycles > 0))

    async def _short(self) -> tuple[list[Op], list[Failure]]:
        """Do what is known to have changed."""
        path = self._path
        self._take_changed()
        changed = path.desired.take_changes()
        self._fresh.update(changed)
        ops = plan_changes(changed, path.desired)
        damaged, self._damaged = self._damaged, {}
        restored = plan_changes(_in_order(obj for obj in damaged if obj in path.desired), path.desired)
        ops += (op._replace(was=damaged[op.obj]) for op in restored)
        ops = self._hold_back(ops)
        failures = await self._kernel.apply(ops)
        if failures:
            self._damaged = damaged | self._damaged  # the full cycle that follows tells of all
        if path.runner is not None:
            path.runner.apply()
        return ops, failures

    def _hold_back(self, ops: list[Op]) -> list[Op]:
        """Leave out what would only go on with a fight; a device that is fought about takes its entries along."""
        if not self._was_right or not ops:
            return ops
        now = time.monotonic()
        held = {id(op): op for op in ops if self._is_repair(op) and not self._fights.may_repair(subject(op.obj), now)}
        for op in ops:
            about = subject(op.obj)
            if self._fights.is_fight(about) and about not in self._fought:
                self._fought[about] = _fight(op, self._culprits.get(about, ""))
                self._notices.say(self._fought.values())
        if not held:
            return ops
        devices = {op.obj.name for op in held.values() if isinstance(op.obj, Link) and op.verb is Verb.CREATE}
        return [op for op in ops if id(op) not in held and device_of(op.obj) not in devices]

    def _end_fights(self) -> None:
        over = [about for about in self._fights.settle(time.monotonic()) if about in self._fought]
        for about in over:
            del self._fought[about]
        self._notices.say(self._fought.values())

    # ---- telling ------------------------------------------------------------------------------

    def _tell(self, reasons: Reasons, ops: list[Op], failures: Sequence[Failure], began: float) -> None:
        failed = {f.op for f in failures}
        done = self._mended + [op for op in ops if op not in failed]
        made = list(repairs([op for op in done if self._is_repair(op)])) if done else []
        self._mended = []
        after_s = time.monotonic() - reasons.since
        for number, repair in enumerate(made):
            by = self._culprits.get(repair.about, "")
            self._repaired(repair, after_s, by)
            if number < AUDIT_LINES:
                log.info("%s, after %.0f ms%s", repair.text, after_s * 1000, f", by {by}" if by else "")
        if len(made) > AUDIT_LINES:
            log.info("and %d more repairs", len(made) - AUDIT_LINES)
        self._culprits.clear()
        self._end_fights()
        self._tell_failures(failures)
        if ops:
            deletions = [op.verb for op in ops].count(Verb.DELETE)
            say = self._answers.line if all(map(_takes_answer_back, ops)) else log.info
            say(
                "reconciled reason=%s leases=%d add=%d del=%d failed=%d took_ms=%.1f",
                ",".join(reasons.names) or "check",
                len(self._table),
                len(ops) - deletions,
                deletions,
                len(failures),
                (time.monotonic() - began) * 1000,
            )

    def _remember(self, failures: Sequence[Failure]) -> None:
        """Keep what is right now, to tell damage from change later."""
        failed = {f.op.obj for f in failures}
        desired = self._path.desired
        self._settled = {*desired.links.values(), *desired.offloads.values(), *desired.addresses.values()}
        self._settled.update(Sysctl(path, value) for path, value in desired.sysctls.items())
        self._settled -= failed
        self._fresh = failed
        self._was_right = self._was_right or not failures

    def _is_repair(self, op: Op) -> bool:
        """Whether an operation undoes what somebody else did, and not what a lease asked for."""
        if op.verb is Verb.DELETE:
            return op.obj not in self._fresh and not _takes_answer_back(op)
        if op.verb is Verb.CREATE:
            return any(isinstance(obj, Link) and obj.name == subject(op.obj)[1] for obj in self._settled)
        if isinstance(op.obj, Link | Address | Sysctl | Offload):
            return op.obj in self._settled
        return self._was_right and op.obj not in self._fresh

    def _tell_failures(self, failures: Sequence[Failure]) -> None:
        """One line when an operation begins to fail, one when it works again."""
        now = {str(f.op): str(f.error) for f in failures}
        for op, error in now.items():
            if op not in self._broken:
                log.error("cannot %s; trying again", error)
        for op in self._broken.keys() - now.keys():
            log.info("%s works again or is not needed any more", op)
        self._broken = now

    def _tell_notes(self, notes: dict[str, str]) -> None:
        for key, note in notes.items():
            if self._notes.get(key) != note:
                self._flood.line("%s", note)
        self._notes = notes


def _takes_answer_back(op: Op) -> bool:
    """Whether it removes an answer to a miss: outdated, or made up over the tunnel, thousands at a time if need be.

    It is no repair that people would want to read of one by one, or that could be fought about.
    """
    return op.verb is Verb.DELETE and isinstance(op.obj, Neighbour) and not op.obj.permanent


def _fight(op: Op, by: str) -> str:
    what = str(op.obj) if op.verb is Verb.DELETE or not isinstance(op.obj, Link) else f"link {op.obj.name}"
    who = f"{by} changes" if by else "another program changes"
    return (
        f"{who} {what} again and again, so it is put right only every {FIGHT_S:.0f} to {GAP_S[1]:.0f} s: stop that "
        "program, or have it leave our devices alone"
    )


def _in_order(objects: Iterable[KernelObject]) -> list[KernelObject]:
    """Entries in the order of writing."""
    rank = {Fdb: 0, Neighbour: 1, Route: 2}
    return sorted(objects, key=lambda obj: rank.get(type(obj), 3))
