"""What others did to our things and when it was undone: the last thousand repairs, and how many there were.

The same is in the log, one line each. This is for asking: ``flannelctl audit``.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

ENTRIES = 1000
"""Kept, about 300 bytes each."""


class Entry(NamedTuple):
    """One repair."""

    seen: float
    """When the damage was noticed, in seconds since the epoch."""
    kind: str
    """``link``, ``address``, ``route``, ``neighbour``, ``fdb``, ``sysctl``, ``rules``, ``file``, ``data path``."""
    what: str
    """The object, as it should be."""
    was: str
    """What stood in its place; empty = nothing."""
    after_ms: float
    """From the notice to the repair."""
    by: str
    """Who did it, where the kernel told; empty else."""
    text: str
    """The line in the log."""


class Audit:
    """The ring.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: deque[Entry] = deque(maxlen=ENTRIES)
        self.counts: Counter[str] = Counter()
        """Repairs since the start, by kind."""

    def note(
        self, kind: str, text: str, what: str = "", was: str = "", after_s: float = 0.0, by: str = "", times: int = 1
    ) -> None:
        """Take one repair that has just been made, or several of one object that one line stands for."""
        self.counts[kind] += times
        self._entries.append(Entry(self._clock() - after_s, kind, what, was, after_s * 1000, by, text))

    def entries(self) -> Sequence[Entry]:
        """Those that are kept, the oldest first."""
        return list(self._entries)
