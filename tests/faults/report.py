"""The table of a run: a row for each fault in each cluster, for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from flanneld.report.table import render_table
from tests.faults.cases import CASES
from tests.faults.fault import Fault
from tests.faults.inject import Result

REPAIR_MS, OUTAGE_MS = 50.0, 100.0
"""Targets for each row of the damage table: the slowest repair, the longest outage."""
HEADING = ("fault", "cluster", "lost", "outage ms", "repair ms", "verdict", "Go flanneld")


def rows(results: Iterable[Result]) -> Iterator[list[str]]:
    """One row each: medians, and the worst behind a slash where rounds differ."""
    for result in results:
        yield [
            result.fault.name + (" *" if result.fault.in_table else ""),
            result.case,
            _figures([one.lost for one in result.rounds]),
            _figures([one.outage_ms for one in result.rounds]),
            _figures([one.repair_ms for one in result.rounds if one.repair_ms is not None]),
            verdict(result),
            go(result.fault, result.case),
        ]


def verdict(result: Result) -> str:
    """``ok``, or what is not."""
    if not result.is_green:
        return f"RED: {result.complaints[0]}"
    return "ok" if not result.fault.in_table or meets_targets(result) else "ok, slow"


def meets_targets(result: Result) -> bool:
    """Whether no round took longer than the targets."""
    return all(
        one.outage_ms <= OUTAGE_MS and (one.repair_ms is None or one.repair_ms <= REPAIR_MS) for one in result.rounds
    )


def go(fault: Fault, case: str) -> str:
    """What Go flanneld does about it; empty where we do not know."""
    return fault.go.get(case) or fault.go.get(CASES[case].backend, "")


def text(results: Sequence[Result], head: Sequence[str]) -> str:
    """For a terminal."""
    table = render_table([name.upper() for name in HEADING], list(rows(results)))
    return "\n".join([*head, "", table, "", *_notes(results)])


def markdown(results: Sequence[Result], head: Sequence[str]) -> str:
    """For a README: outages by fault and cluster, then every row."""
    return "\n".join(
        [
            *(f"> {line}  " for line in head),
            "",
            "Longest time in which nothing sent got through, in ms:",
            "",
            *_table(*_matrix(results)),
            "",
            "All figures:",
            "",
            *_table(HEADING, list(rows(results))),
            "",
            *_notes(results),
            "",
        ]
    )


def _matrix(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Faults down, clusters across, for clusters that have the damage table; Go flanneld beside ours."""
    cases = [case for case in CASES if any(result.case == case and result.fault.in_table for result in results)]
    cells = {(result.fault.name, result.case): result for result in results}
    faults = list(dict.fromkeys(result.fault for result in results if result.case in cases))
    lines = [
        [
            fault.name,
            fault.go.get("vxlan", ""),
            fault.go.get("host-gw", ""),
            *(_outage(cells.get((fault.name, case))) for case in cases),
        ]
        for fault in faults
    ]
    return ["fault", "Go vxlan", "Go host-gw", *cases], lines


def _outage(result: Result | None) -> str:
    if result is None:
        return ""
    return _figures([one.outage_ms for one in result.rounds]) if result.is_green else "RED"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def to_json(results: Iterable[Result]) -> list[dict[str, object]]:
    """One object for each row, with every round."""
    return [
        {
            "fault": result.fault.name,
            "failures": result.fault.failures,
            "cluster": result.case,
            "in_damage_table": result.fault.in_table,
            "rounds": [one._asdict() for one in result.rounds],
            "complaints": result.complaints,
            "meets_targets": meets_targets(result),
            "go": go(result.fault, result.case),
        }
        for result in results
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    green = sum(result.is_green for result in results)
    listed = [result for result in results if result.fault.in_table and result.rounds]
    quick = sum(meets_targets(result) for result in listed)
    return [
        f"{green} of {len(results)} rows are as they must be: nothing of ours is missing, wrong or left over, and "
        "everything of others is as before.",
        f"* rows of the damage table: {quick} of {len(listed)} with every repair within {REPAIR_MS:.0f} ms and every "
        f"outage within {OUTAGE_MS:.0f} ms.",
    ]


def _figures(values: Sequence[float]) -> str:
    if not values:
        return "–"
    middle, worst = _figure(statistics.median(values)), _figure(max(values))
    return middle if middle == worst else f"{middle} / {worst}"


def _figure(value: float) -> str:
    return f"{value:.0f}"
