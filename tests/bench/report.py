"""The figures of a run: gathering, medians and spread, and the table in text, Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flanneld.report.table import render_table
from tests.bench.metrics import GO, METRICS, TARGETS, Cell, Metric

NOT_IN_TIME = "not in time"


class Summary(NamedTuple):
    """All values that one daemon had in one cell."""

    values: tuple[float | None, ...]

    @property
    def median(self) -> float | None:
        """Median; None if a round failed in most of them."""
        known = [value for value in self.values if value is not None]
        return statistics.median(known) if 2 * len(known) > len(self.values) else None

    def spread(self) -> str:
        """Smallest and largest, with the number of rounds."""
        known = [value for value in self.values if value is not None]
        if len(known) < 2:
            return ""
        return f"{figure(min(known))}–{figure(max(known))}, n={len(known)}"


class Results:
    """What has been measured so far."""

    def __init__(self, daemons: Sequence[str]) -> None:
        self.daemons = list(daemons)
        self._values: dict[tuple[Cell, str], list[float | None]] = {}
        self.failures: list[str] = []

    def add(self, cell: Cell, daemon: str, value: float | None) -> None:
        """Take one figure."""
        self._values.setdefault((cell, daemon), []).append(value)

    def cells(self) -> list[Cell]:
        """All cells measured, in the order of the metrics, then backend, then size."""
        order = list(METRICS)
        return sorted({cell for cell, _ in self._values}, key=lambda cell: (order.index(cell[0]), cell[1], cell[2]))

    def get(self, cell: Cell, daemon: str) -> Summary | None:
        """The figures of a daemon in a cell."""
        values = self._values.get((cell, daemon))
        return Summary(tuple(values)) if values else None

    def to_json(self) -> Iterator[dict[str, object]]:
        """One object for each cell and daemon."""
        for cell in self.cells():
            for daemon in self.daemons:
                if found := self.get(cell, daemon):
                    yield {
                        "metric": cell[0],
                        "title": METRICS[cell[0]].title,
                        "unit": METRICS[cell[0]].unit,
                        "backend": cell[1],
                        "leases": cell[2],
                        "daemon": daemon,
                        "values": found.values,
                        "median": found.median,
                        "target": TARGETS.get(cell),
                        "go_reference": GO.get(cell),
                        "verdict": verdict(METRICS[cell[0]], found.median, TARGETS.get(cell)),
                    }


def figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NOT_IN_TIME
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(metric: Metric, value: float | None, target: float | None) -> str:
    """``ok``, or by which factor the target is missed; empty without a target."""
    if target is None:
        return ""
    if value is None:
        return "missed"
    if value >= target if metric.higher_is_better else value <= target:
        return "ok"
    if not value or not target:
        return "missed"
    return f"missed ×{value / target if not metric.higher_is_better else target / value:.2f}"


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: one for each cell, daemons side by side; the verdict is about the first."""
    heading = ["what", "backend", "leases", "unit"]
    for daemon in results.daemons:
        heading += [daemon, "spread"]
    heading += ["target", "verdict", "Go (reference)"]
    table = []
    for cell in results.cells():
        metric = METRICS[cell[0]]
        row = [metric.title, cell[1], str(cell[2] or ""), metric.unit]
        for daemon in results.daemons:
            found = results.get(cell, daemon)
            row += [figure(found.median), found.spread()] if found else ["", ""]
        own = results.get(cell, results.daemons[0])
        target = TARGETS.get(cell)
        reference = GO.get(cell)
        row += [
            "" if target is None else ("≥ " if metric.higher_is_better else "≤ ") + figure(target),
            verdict(metric, own.median, target) if own else "",
            "" if reference is None else figure(reference),
        ]
        table.append(row)
    return heading, table


def text(results: Results, head: Sequence[str]) -> str:
    """For a terminal."""
    heading, table = rows(results)
    return "\n".join([*head, "", render_table([name.upper() for name in heading], table), *_failures(results)])


def markdown(results: Results, head: Sequence[str], plots: Sequence[str]) -> str:
    """For a README."""
    heading, table = rows(results)
    lines = [f"> {line}  " for line in head]
    lines += ["", "| " + " | ".join(heading) + " |", "|" + " --- |" * len(heading)]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    lines += ["", *_failures(results), *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines) + "\n"


def _failures(results: Results) -> list[str]:
    return [f"Not measured: {failure}" for failure in results.failures]
