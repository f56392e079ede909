"""Keep a file of ours right for ever: one that somebody deletes or damages is written again at once, and said so.

What the file says is its owner's business. It must not decide whether the daemon is ready: it tells ``problem``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flanneld.errors import KernelError
from flanneld.report.atomic import file_refused, remove_leftovers, write_atomic
from flanneld.report.dir_watch import DirectoryWatch
from flanneld.report.own_file import read_file
from flanneld.retry import backoff
from flanneld.wake import heard

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Without any event we look all the same: a mount over the directory, for one, causes none."""
COALESCE_S = 0.01
"""Events of one foreign write arrive in pieces (truncate, write, close): look when it is over."""
BURST = 10
"""Repairs in one story that are made at once and told one by one; then they come slower, and are only counted."""
GAP_S = (0.05, 0.5)
"""Time between repairs from then on: from the first to the last value. A container may be waiting for the file."""
QUIET_S = 5.0
"""Without damage for so long, the next damage is a new story."""
RECOUNT_S = 60.0
"""How often the count is told."""
KEPT_FILES = 9
"""So many foreign files are set aside in one directory, then they are only replaced."""
MAX_FOREIGN_FILE = 1 << 16

Repaired = Callable[[str, int], None]
"""Told of repairs: in words, and how many they are."""


class HeldFile:
    """One file, held in place.

    Args:
        path: the file.
        what: its name in sentences, without article.
        is_precious: whether content that stands in its place is somebody's own work, to be set aside under the
            name ``<file>.old`` (``.old2``, …) before it is replaced.
        on_disk: its file system may take long to make a write durable: write in a thread.

    Attributes:
        problem: why the file is not in place, one sentence, or None; part of readiness.
        fight: that somebody breaks it again and again, one sentence, or None.
    """

    def __init__(
        self, path: Path, what: str, is_precious: Callable[[bytes], bool] = lambda _: False, *, on_disk: bool = False
    ) -> None:
        self.path = path
        self.problem: str | None = f"the {what} is not written yet"
        self.fight: str | None = None
        self._what = what
        self._is_precious = is_precious
        self._on_disk = on_disk
        self._refused = False
        self._written: bytes | None = None
        """What stood there when we last saw that all was well."""

    def update(self, content: bytes) -> bool:
        """Make the file say ``content`` now; a file that says so already is not touched.

        Returns:
            Whether it does. If not, ``problem`` tells why, and ``hold`` goes on trying.
        """
        try:
            if _damage(self.path, content):
                kept = self._set_aside(content)
                write_atomic(self.path, content, f"the {self._what}")
                if kept:
                    log.warning("%s held something else path=%s kept=%s", self._what, self.path, kept)
        except KernelError as exc:
            if self.problem != str(exc):
                log.warning("%s is not in place, containers cannot start; retrying: %s", self._what, exc)
            self.problem = str(exc)
            self._refused = True
            return False
        self._settle(content)
        return True

    async def hold(self, content: Callable[[], bytes | None], repaired: Repaired) -> None:
        """Keep the file right, for ever.

        Args:
            content: what has to stand there; None = not known yet, leave the file alone. Asked at every
                look, so a new answer takes effect within ``CHECK_S``, or at once through ``update``.
            repaired: called with one sentence for each repair of damage done by others; not for changes
                of ``content``. Damage without end is repaired at a bounded rate and then only counted: the
                sentence stands for as many repairs as the number says.
        """
        remove_leftovers(self.path.parent, self.path.name)
        wake = asyncio.Event()
        guard = _Guard(self, repaired, asyncio.get_running_loop().time)
        with contextlib.closing(DirectoryWatch(self.path.parent, wake.set)) as watch:
            while True:
                wake.clear()
                # armed before the look: what happens after the look wakes us
                watch.arm()
                pause_s = await guard.look(content())
                if await heard(wake, pause_s):
                    await asyncio.sleep(COALESCE_S)

    async def _write(self, content: bytes) -> bool:
        """``update``, without holding up the event loop where the file system may."""
        return await asyncio.to_thread(self.update, content) if self._on_disk else self.update(content)

    def _settle(self, content: bytes) -> None:
        """The file has been seen to say ``content``."""
        if self._refused:
            log.info("%s is in place again path=%s", self._what, self.path)
            self._refused = False
        self._written = content
        self.problem = None

    def _set_aside(self, wanted: bytes) -> str:
        """Save somebody's own work from being replaced; the name it has now, empty when there is nothing to save.

        A second name for the same file, so that the first is never missing: a runtime may read it at any moment.
        """
        try:
            found = read_file(self.path, MAX_FOREIGN_FILE)
        except OSError:
            return ""  # nothing is there, or nothing that could be read
        if wanted.startswith(found) or not self._is_precious(found):
            return ""
        for name in self._kept_names():
            kept = self.path.with_name(name)
            try:
                os.link(self.path, kept, follow_symlinks=False)  # a symbolic link is kept as one
                return name
            except FileExistsError:
                with contextlib.suppress(OSError):
                    if read_file(kept, MAX_FOREIGN_FILE) == found:
                        return ""  # the same file, put here once more
            except OSError as exc:
                raise file_refused(f"keep what stands in {self.path} as {name}", exc) from exc
        return ""

    def _kept_names(self) -> Iterator[str]:
        for number in range(1, KEPT_FILES + 1):
            yield f"{self.path.name}.old{number if number > 1 else ''}"


class _Guard:
    """Decides at each look whether to repair now, when to look again, and what deserves a line."""

    def __init__(self, file: HeldFile, repaired: Repaired, clock: Callable[[], float]) -> None:
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

    async def look(self, wanted: bytes | None) -> float:
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
        if not await self._file._write(wanted):
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
        if (beyond := self._count - BURST) >= 0:
            first, last = GAP_S
            self._not_before = now + min(first * 2 ** min(beyond, 16), last)
            if self._not_before - now == last:
                self._complain()
        if self._count <= BURST or now - self._last_told >= RECOUNT_S:
            times = f" ({self._untold} times since the last line)" if self._untold > 1 else ""
            self._repaired(f"{self._file.path.name} {damage}: written again{times}", self._untold)
            self._untold = 0
            self._last_told = now

    def _complain(self) -> None:
        """Say once that it is a fight."""
        if not self._file.fight:
            self._file.fight = (
                f"another program changes or removes {self._file.path} again and again, so it is written again only "
                f"every {GAP_S[1]:g} s: stop that program, or have it leave the file alone"
            )
            log.warning("%s", self._file.fight)

    def _calm(self, now: float) -> None:
        if self._count and now - self._last >= QUIET_S:
            if self._untold:
                text = f"{self._file.path.name} is left alone again: written again {self._untold} times more"
                self._repaired(text, self._untold)
            self._count = self._untold = 0
            self._file.fight = None


def _damage(path: Path, wanted: bytes) -> str:
    """What is wrong with the file, in words that follow its name; empty when nothing is."""
    try:
        found = read_file(path, len(wanted) + 1)
    except FileNotFoundError:
        return "was deleted"
    except OSError as exc:
        return f"became unreadable ({exc.strerror})"
    if found == wanted:
        return ""
    return "was truncated" if wanted.startswith(found) else "was changed by somebody else"
