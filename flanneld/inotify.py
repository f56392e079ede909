"""inotify on the event loop: that something happened to a file. What happened, the caller reads himself.

The standard library has none; two calls of libc are not worth a dependency in a privileged process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from enum import IntFlag
from pathlib import Path


class On(IntFlag):
    """What to be told of. Source: include/uapi/linux/inotify.h."""

    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    CLOSE_NOWRITE = 0x10
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    DELETE_SELF = 0x400
    MOVE_SELF = 0x800
    ONLYDIR = 0x01000000


_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """One-shot hints about some files: armed, it tells once, then stays silent until armed again.

    So a process that writes there without end costs as many wake-ups as the owner is willing to take.

    Raises:
        OSError: the limits of fs.inotify are reached.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # include/linux/inotify.h: IN_NONBLOCK and IN_CLOEXEC are the O_ flags
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def watch(self, path: Path, events: On) -> int:
        """Watch what has the name now; for what is watched already this changes nothing and gives the same number.

        Raises:
            OSError: there is no such file, or the limits are reached.
        """
        return _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(events)))

    def unwatch(self, number: int) -> None:
        """Watch it no longer; one that is gone has ended its watch itself."""
        _libc.inotify_rm_watch(self._fd, number)

    def arm(self, tell: Callable[[], None]) -> None:
        """Forget what happened so far, and call ``tell`` once, from the event loop, when something happens."""
        self._drain()
        self._loop.add_reader(self._fd, self._readable, tell)

    def close(self) -> None:
        """Stop watching; may be called twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self, tell: Callable[[], None]) -> None:
        self._loop.remove_reader(self._fd)
        tell()

    def _drain(self) -> None:
        """Throw away queued events; bounded, for somebody may be writing as fast as we read."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                os.read(self._fd, 1 << 16)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
