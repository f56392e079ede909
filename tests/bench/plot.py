"""Cost against cluster size as SVG, both axes logarithmic, without any library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from tests.bench.metrics import METRICS
from tests.bench.report import Results, figure

Curve = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 46, 52
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")


def plots(results: Results) -> Iterator[tuple[str, str]]:
    """File name and SVG of each metric that was measured at two sizes or more."""
    for name, metric in METRICS.items():
        if not metric.plotted:
            continue
        curves: dict[str, list[tuple[int, float]]] = {}
        for cell in results.cells():
            for daemon in results.daemons:
                found = results.get(cell, daemon)
                if cell[0] == name and found and found.median:
                    curves.setdefault(f"{daemon}, {cell[1]}", []).append((cell[2], found.median))
        if any(len(curve) > 1 for curve in curves.values()):
            yield f"{name}.svg", draw(metric.title, f"{metric.unit}, median", curves)


def draw(title: str, unit: str, curves: Mapping[str, Curve]) -> str:
    """One picture; leases run to the right."""
    points = [point for curve in curves.values() for point in curve]
    across = _Axis([size for size, _ in points], LEFT, WIDTH - RIGHT)
    up = _Axis([value for _, value in points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{escape(title)} ({escape(unit)})</text>',
    ]
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, "#eaeef2"))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{int(tick):,}</text>')
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#eaeef2"))
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{figure(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">leases in the cluster</text>')
    for number, (label, curve) in enumerate(curves.items()):
        parts += _curve(label, sorted(curve), across, up, number)
    return "\n".join([*parts, "</svg>\n"])


class _Axis:
    """A logarithmic scale that begins and ends at a round number."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        factors = (1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 4, 5, 7)  # a narrow range needs a finer scale
        steps = [factor * 10.0**power for power in range(-6, 9) for factor in factors]
        first = max((i for i, step in enumerate(steps) if step <= low), default=0)
        last = min((i for i, step in enumerate(steps) if step >= high), default=len(steps) - 1)
        self._steps = steps[first : max(last, first + 1) + 1]
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """Coordinate of a value."""
        low, high = math.log(self._steps[0]), math.log(self._steps[-1])
        return self._start + (math.log(value) - low) / (high - low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Values worth a line: all steps if there are few, else the powers of ten."""
        whole = [step for step in self._steps if math.isclose(math.log10(step) % 1, 0, abs_tol=1e-9)]
        return self._steps if len(self._steps) <= 9 or len(whole) < 3 else whole


def _curve(label: str, curve: Curve, across: _Axis, up: _Axis, number: int) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    points = [(across.at(size), up.at(value)) for size, value in curve]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for (x, y), (size, value) in zip(points, curve, strict=True):
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            f"<title>{size:,} leases: {figure(value)}</title></circle>"
        )
    legend = TOP + 12 + 22 * number
    yield _line(WIDTH - RIGHT + 14, legend - 4, WIDTH - RIGHT + 38, legend - 4, colour)
    yield f'<text x="{WIDTH - RIGHT + 44}" y="{legend}">{escape(label)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5"/>'
