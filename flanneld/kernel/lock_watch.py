"""Tells when a legacy iptables program has been at work: the kernel announces nothing, but they all take one lock.

The lock is a file, and closing it is an event of inotify. Whatever does not take it, or takes another one (a
container with a ``/run`` of its own), is found by looking now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

# include/uapi/linux/inotify.h; IN_NONBLOCK and IN_CLOEXEC are the O_ flags
_IN_CLOSE_WRITE, _IN_CLOSE_NOWRITE = 0x8, 0x10
_IN_DELETE_SELF, _IN_MOVE_SELF = 0x400, 0x800
_MASK = _IN_CLOSE_WRITE | _IN_CLOSE_NOWRITE | _IN_DELETE_SELF | _IN_MOVE_SELF

_libc = ctypes.CDLL(None, use_errno=True)


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
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._readable)

    def arm(self) -> None:
        """Watch the file that has the name now; again and again, as it may not have been there, or be another one."""
        if self._fd >= 0:
            _libc.inotify_add_watch(self._fd, os.fsencode(self._path), ctypes.c_uint32(_MASK))

    def close(self) -> None:
        """Stop watching."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 1 << 16)
        if self._later is None:
            self._later = self._loop.call_at(self._due, self._tell)

    def _tell(self) -> None:
        self._later = None
        self._released()
        self._due = self._loop.time() + self._gap_s()
