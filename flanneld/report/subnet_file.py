"""Put ``subnet.env`` in place and keep it right for ever (contract section 4, failure F35).

Without the file no container starts on this host, so a file that somebody deleted or damaged is written
again at once, and said so. What the file says is ``model/subnet_env.py``'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from flanneld.errors import KernelError
from flanneld.model.subnet_env import PreviousEnv, parse
from flanneld.report.atomic import write_atomic
from flanneld.report.dir_watch import DirectoryWatch
from flanneld.retry import backoff

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Without any event we look all the same: a mount over the directory, for one, causes none."""
COALESCE_S = 0.01
"""Events of one foreign write arrive in pieces (truncate, write, close): look when it is over."""
GAP_S = (0.05, 0.5)
"""Time between repairs while somebody keeps breaking the file: from the first to the last value."""
QUIET_S = 5.0
"""Without damage for so long, the next damage is a new story."""
LINES = 5
"""Audit lines in one story, before they are only counted."""
RECOUNT_S = 60.0
"""How often the count is told."""
_MAX_OLD_FILE = 1 << 16


class SubnetFile:
    """The subnet file of this daemon.

    Attributes:
        problem: why the file is not in place, one sentence, or None; part of readiness.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._written: bytes | None = None
        """What stood there when we last saw that all was well."""

    def previous(self) -> PreviousEnv:
        """What an earlier run left there (contract 3.41); nothing when there is no readable file."""
        try:
            return parse(_read(self.path, _MAX_OLD_FILE))
        except OSError:
            return PreviousEnv()

    def update(self, content: bytes) -> bool:
        """Make the file say ``content`` now; a file that says so already is not touched.

        Returns:
            Whether it does. If not, ``problem`` tells why, and ``hold`` goes on trying.
        """
        try:
            if _damage(self.path, content):
                write_atomic(self.path, content, "the subnet file")
        except KernelError as exc:
            if self.problem != str(exc):
                log.warning("subnet file is not in place, containers cannot start; retrying: %s", exc)
            self.problem = str(exc)
            return False
        self._settle(content)
        return True

    def _settle(self, content: bytes) -> None:
        """The file has been seen to say ``content``."""
        if self.problem:
            log.info("subnet file is in place again path=%s", self.path)
        self._written = content
        self.problem = None

    async def hold(self, content: Callable[[], bytes | None], repaired: Callable[[str], None]) -> None:
        """Keep the file right, for ever.

        Args:
            content: what has to stand there; None = not known yet, leave the file alone. Asked at every
                look, so a new answer takes effect within ``CHECK_S``, or at once through ``update``.
            repaired: called with one sentence for each repair of damage done by others; not for changes
                of ``content``. Damage without end is repaired at a bounded rate and then only counted.
        """
        wake = asyncio.Event()
        guard = _Guard(self, repaired, asyncio.get_running_loop().time)
        with contextlib.closing(DirectoryWatch(self.path.parent, wake.set)) as watch:
            while True:
                wake.clear()
                # armed before the look: what happens after the look wakes us
                watch.arm()
                pause_s = guard.look(content())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await wake.wait()
                await asyncio.sleep(COALESCE_S)


class _Guard:
    """Decides at each look whether to repair now, when to look again, and what deserves a line."""

    def __init__(self, file: SubnetFile, repaired: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._file = file
        self._repaired = repaired
        self._clock = clock
        self._retry = backoff()
        self._not_before = 0.0
        self._count = 0
        """Repairs in the present story."""
        self._untold = 0
        """… of which nothing was said yet."""
        self._last = 0.0
        self._last_told = 0.0

    def look(self, wanted: bytes | None) -> float:
        """Look once and repair if need be; returns after how many seconds to look again at the latest."""
        now = self._clock()
        if wanted is None:
            return CHECK_S
        damage = _damage(self._file.path, wanted)
        if not damage:
            self._file._settle(wanted)
            self._calm(now)
            return CHECK_S
        if now < self._not_before:
            return self._not_before - now
        foreign = self._file._written == wanted and not self._file.problem
        if not self._file.update(wanted):
            self._not_before = now + next(self._retry)
            return self._not_before - now
        self._retry = backoff()
        if foreign:
            self._tell(damage, now)
        # look again at once: the watch may have lost its directory, which exists again since this moment
        return 0

    def _tell(self, damage: str, now: float) -> None:
        self._count += 1
        self._untold += 1
        self._last = now
        first, last = GAP_S
        self._not_before = now + min(first * 2 ** min(self._count - 1, 16), last)
        if self._count <= LINES or now - self._last_told >= RECOUNT_S:
            times = f" ({self._untold} times since the last line)" if self._untold > 1 else ""
            self._repaired(f"{self._file.path.name} {damage}: written again{times}")
            self._untold = 0
            self._last_told = now

    def _calm(self, now: float) -> None:
        if self._count and now - self._last >= QUIET_S:
            if self._untold:
                self._repaired(f"{self._file.path.name} is left alone again: written again {self._untold} times more")
            self._count = self._untold = 0


def _damage(path: Path, wanted: bytes) -> str:
    """What is wrong with the file, in words that follow its name; empty when nothing is."""
    try:
        found = _read(path, len(wanted) + 1)
    except FileNotFoundError:
        return "was deleted"
    except OSError as exc:
        return f"became unreadable ({exc.strerror})"
    if found == wanted:
        return ""
    return "was truncated" if wanted.startswith(found) else "was changed by somebody else"


def _read(path: Path, limit: int) -> bytes:
    """The first ``limit`` bytes of a regular file; never waits on what is put in its place (FIFO, device)."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "not a regular file")
        return os.read(fd, limit)
    finally:
        os.close(fd)
