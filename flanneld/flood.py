"""Lines of which somebody else decides how many there are: the first ones as lines, the others as a count.

Whoever writes to the store can write fifty thousand keys that are no leases; the log must neither hide that nor
drown in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

BURST = 100
"""Lines at once."""
REFILL_S = 6.0
"""Seconds until one more line may come."""
COUNT_S = 5.0
"""Seconds between two lines that only count."""


class Flood:
    """One kind of line.

    Args:
        log: where the lines go.
        rest: what is counted, as in ``and 49900 more leases that are not used``.
        remedy: where to find the others, or what to do.
        level: severity.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        log: logging.Logger,
        rest: str,
        remedy: str = "flannelctl leases shows all",
        *,
        level: int = logging.WARNING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._rest, self._remedy, self._level, self._clock = log, rest, remedy, level, clock
        self._lines = float(BURST)
        self._at = clock()
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def line(self, text: str, *args: object) -> None:
        """Log a line, or count it."""
        now = self._clock()
        self._lines = min(BURST, self._lines + (now - self._at) / REFILL_S)
        self._at = now
        if self._lines >= 1:
            self._lines -= 1
            self._log.log(self._level, text, *args)
            return
        self._left_out += 1
        if self._timer is None:
            with contextlib.suppress(RuntimeError):  # no loop runs, so nothing comes on and on
                self._timer = asyncio.get_running_loop().call_later(COUNT_S, self.tell)

    def tell(self) -> None:
        """Log how many were left out since the last time, if any."""
        self._timer = None
        if self._left_out:
            self._log.log(self._level, "and %d more %s; %s", self._left_out, self._rest, self._remedy)
        self._left_out = 0
