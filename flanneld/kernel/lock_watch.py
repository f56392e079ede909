"""Tells when a legacy iptables program has been at work: the kernel announces nothing, but they all take one lock.

The lock is a file, and closing it is an event of inotify. Whatever does not take it, or takes another one (a
container with a ``/run`` of its own), is found by looking now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from flanneld.inotify import Inotify, On

_EVENTS = On.CLOSE_WRITE | On.CLOSE_NOWRITE | On.DELETE_SELF | On.MOVE_SELF


def lock_file() -> Path:
    """Where iptables keeps it. Source: iptables/xshared.c, XT_LOCK_NAME and XTABLES_LOCKFILE."""
    return Path(os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock")


class LockWatch:
    """Calls ``released`` after the lock was let go, at a bounded rate.

    Args:
        path: of the lock; the first iptables program makes it.
        released: called from the event loop.
        gap_s: asked after each call: so long until the next one, at the least.
    """

    def __init__(self, path: Path, released: Callable[[], None], gap_s: Callable[[], float]) -> None:
        self._path, self._released, self._gap_s = path, released, gap_s
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._later: asyncio.TimerHandle | None = None
        self._inotify: Inotify | None = None
        with contextlib.suppress(OSError):
            self._inotify = Inotify()
            self._inotify.arm(self._touched)

    def arm(self) -> None:
        """Watch the file that has the name now; again and again, as it may not have been there, or be another one."""
        if self._inotify is not None:
            with contextlib.suppress(OSError):
                self._inotify.watch(self._path, _EVENTS)

    def close(self) -> None:
        """Stop watching."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _touched(self) -> None:
        self._later = self._loop.call_at(self._due, self._tell)

    def _tell(self) -> None:
        self._later = None
        if self._inotify is not None:
            self._inotify.arm(self._touched)
        self._released()
        self._due = self._loop.time() + self._gap_s()
