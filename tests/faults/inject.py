"""Makes one fault in one cluster under traffic, and judges: what was lost, how long it took, whether all is right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from tests.faults.bed import DEADLINE_S, QUIET_S, Bed, await_none
from tests.faults.fault import Fault
from tests.faults.probe import Outcome


class Round(NamedTuple):
    """What one fault cost once."""

    lost: int
    """Packets, on the stream that lost most."""
    outage_ms: float
    """The longest wait of a packet, on any stream."""
    repair_ms: float | None
    """From the fault, or from when the surroundings are whole, to the last repair; None when nothing was to be done.

    The last of: a repair in the audit, a change of a table in a log, the end of the outage.
    """


class Result(NamedTuple):
    """A fault in a cluster, made once or several times."""

    fault: Fault
    case: str
    rounds: tuple[Round, ...]
    complaints: tuple[str, ...]
    """What is not as it must be; empty = green."""

    @property
    def is_green(self) -> bool:
        """Whether everything that must hold held."""
        return not self.complaints


def inject(bed: Bed, fault: Fault, rounds: int = 1) -> Result:
    """Make a fault so many times; the cluster is as before, or the result says what is not, and it is spoilt."""
    made: list[Round] = []
    complaints: list[str] = []
    for _ in range(rounds):
        sizes = bed.log_sizes()
        try:
            one, wrong = _once(bed, fault)
        except AssertionError as error:
            complaints.append(str(error))
            break
        made.append(one)
        complaints += wrong + _too_much(fault, one, forwards=bed.name != "udp basic") + bed.log_complaints(sizes)
        if complaints:
            break
    complaints += await_none(bed.changes, 5.0)
    return Result(fault, bed.name, tuple(made), tuple(dict.fromkeys(complaints)))


def others_changed(bed: Bed) -> list[str]:
    """At the end of all faults: what is not as it was on the hosts that no fault has hit."""
    return await_none(lambda: bed.changes(everywhere=True), 5.0)


def _once(bed: Bed, fault: Fault) -> tuple[Round, list[str]]:
    if fault.before:
        fault.before(bed)
    harm, whole = (bed.shell(script.format(**bed.words)) if script else None for script in (fault.harm, fault.whole))
    pid, told = bed.host.daemon.pid, bed.status().get("repairs", {})
    with bed.probe(fault.egress) as probe:
        time.sleep(QUIET_S)  # traffic before, so that all is warm; nothing is waited for
        since = harm() if harm else time.time()
        if fault.act:
            fault.act(bed)
        if whole:
            since = whole()
        complaints = []
        if fault.is_told and bed.is_ours and bed.name not in fault.quiet:
            complaints += await_none(
                lambda: [] if bed.has_repaired(since, told) else ["no repair was told"], DEADLINE_S
            )
        if fault.after:
            fault.after(bed)
        complaints += bed.await_right()
        time.sleep(QUIET_S)
        outcomes = probe.end()
    repaired = [repair.at for repair in bed.repairs() if repair.at >= since]
    repaired += filter(None, [bed.last_change(since)])
    if fault.undo:
        bed.run(fault.undo.format(**bed.words))
    if fault.undo_act:
        fault.undo_act(bed)
    if fault.undo or fault.undo_act:
        complaints += bed.await_right()
    if fault.act is None and bed.host.daemon.pid != pid:
        complaints.append("the daemon has ended")
    return _figures(outcomes, since, repaired), complaints


def _figures(outcomes: Sequence[Outcome], since: float, repaired: Sequence[float]) -> Round:
    repaired = [
        *repaired,
        *(one.through for outcome in outcomes for one in outcome.late if one.lost and one.sent >= since),
    ]
    return Round(
        max(outcome.lost(since) for outcome in outcomes),
        max(outcome.outage_ms(since) for outcome in outcomes),
        (max(repaired) - since) * 1000 if repaired else None,
    )


def _too_much(fault: Fault, one: Round, forwards: bool) -> list[str]:
    found = []
    if fault.lost_at_most is not None and forwards and one.lost > fault.lost_at_most:
        found.append(f"{one.lost} packets lost, {fault.lost_at_most} are allowed")
    if one.outage_ms > fault.outage_at_most_ms:
        found.append(f"no packet got through for {one.outage_ms:.0f} ms")
    return found
