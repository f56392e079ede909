"""A streak of failures as few log lines: one at its start, a count now and then, one at its end.

A loop that retries for ever must not fill the disk (failures F26: 7.7 GB of log a day).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_FIRST_REMINDER_S = 60.0
_RAREST_REMINDER_S = 3600.0


class Outage:
    """Counts the failures of one thing and decides which of them are worth a line.

    Args:
        log: where the lines go.
        began: constant sentence for the first failure and the reminders.
        ended: constant sentence for the first success after a failure that was told.
        level: severity of failures; the end is INFO.
        tell: called with a sentence at the first failure, and with None when it is over.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        log: logging.Logger,
        began: str,
        ended: str,
        *,
        level: int = logging.WARNING,
        tell: Callable[[str | None], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._began = began
        self._ended = ended
        self._level = level
        self.tell = tell
        self._clock = clock
        self._since: float | None = None
        self._failures = 0
        self._told = False
        self._next_line = 0.0
        self._reminder_s = _FIRST_REMINDER_S

    def failed(self, reason: object) -> None:
        """Note one more failure."""
        now = self._clock()
        if self._since is None:
            self._since = now
            self.tell(f"{self._began} ({reason})")
            # something that fails and recovers all the time gets one pair of lines a minute, not one a flap
            self._reminder_s = _FIRST_REMINDER_S
        self._failures += 1
        if now >= self._next_line:
            self._log.log(
                self._level,
                self._began + " failures=%d for_s=%.1f reason=%s",
                self._failures,
                now - self._since,
                reason,
            )
            self._told = True
            self._next_line = now + self._reminder_s
            self._reminder_s = min(self._reminder_s * 2, _RAREST_REMINDER_S)

    def over(self) -> None:
        """Note a success."""
        if self._since is not None:
            self.tell(None)
        if self._since is not None and self._told:
            self._log.info(self._ended + " after_s=%.1f failures=%d", self._clock() - self._since, self._failures)
            self._next_line = min(self._next_line, self._clock() + _FIRST_REMINDER_S)
        self._since = None
        self._failures = 0
        self._told = False
