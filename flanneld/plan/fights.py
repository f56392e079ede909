"""Notices that another program undoes our repairs again and again, and says how long to hold back. Pure.

Repairing at once is right once; a program that puts its own idea back each time would keep both of us busy for
ever. So the same repair, made often, is made less and less often, until it is left alone (failures F31).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

BURST, WINDOW_S = 20, 10.0
"""More repairs of one object than this within this time are too many. A person with a shell stays below it."""

GAP_S = (0.05, 30.0)
"""Between two repairs from then on: from the first to the last value, doubling.

The first is short, for it may be ``ip route flush``, which deletes until it finds nothing more to delete.
"""

FIGHT_S = 1.0
"""With gaps of this length it is a fight, and worth telling."""

CALM_S = 60.0
"""So long after the last repair a fight is over; longer than the longest gap."""

OBJECTS = 4096
"""Objects kept in mind; in damage beyond it each is repaired once, which is no fight."""


@dataclass(slots=True)
class _Record:
    began: float
    count: int = 0
    last: float = 0.0
    gap_s: float = 0.0
    """0 = nothing is held back."""
    refused: bool = False
    """Whether a repair was held back since the last one, so that another look is due."""


class Fights:
    """What was repaired lately. Times are seconds of any clock that goes forward."""

    def __init__(self) -> None:
        self._records: dict[Hashable, _Record] = {}

    def may_repair(self, about: Hashable, now: float) -> bool:
        """Whether to repair it now; counts it if so. No means: look again after ``due_s``."""
        record = self._records.get(about)
        if record is None:
            if len(self._records) < OBJECTS:
                self._records[about] = _Record(now, 1, now)
            return True
        if record.gap_s:
            if now < record.last + record.gap_s:
                record.refused = True
                return False
            record.gap_s = min(record.gap_s * 2, GAP_S[1])
        elif now - record.began > WINDOW_S:
            record.began, record.count = now, 0
        record.count += 1
        record.last = now
        record.refused = False
        if not record.gap_s and record.count > BURST:
            record.gap_s = GAP_S[0]
        return True

    def is_fight(self, about: Hashable) -> bool:
        """Whether somebody has insisted for so long that repairs of it are rare by now."""
        record = self._records.get(about)
        return record is not None and record.gap_s >= FIGHT_S

    def wait_s(self, about: Hashable, now: float) -> float:
        """Seconds until it may be repaired again; 0 = now."""
        record = self._records.get(about)
        return max(0.0, record.last + record.gap_s - now) if record is not None else 0.0

    def due_s(self, now: float) -> float | None:
        """Seconds until the next look at what was held back, or at whether a fight is over; None = no reason for one.

        What was held back is a reason once: a look that finds it right, or holds it back again, is the end of it.
        """
        times = []
        for record in self._records.values():
            if record.refused:
                times.append(record.last + record.gap_s)
                record.refused = times[-1] > now
            elif record.gap_s >= FIGHT_S:
                times.append(record.last + CALM_S)
        return max(0.0, min(times) - now) if times else None

    def settle(self, now: float) -> list[Hashable]:
        """Forget what has been calm for long; returns the fights among it, which are over."""
        calm = [
            about
            for about, record in self._records.items()
            if now >= record.last + (CALM_S if record.gap_s >= FIGHT_S else WINDOW_S)
        ]
        over = [about for about in calm if self.is_fight(about)]
        for about in calm:
            del self._records[about]
        return over
