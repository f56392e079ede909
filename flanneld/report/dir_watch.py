"""A hint that something happened in a directory, from inotify. What happened, the caller reads himself.

The standard library has no inotify; two calls of libc are not worth a dependency in a privileged process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

# include/uapi/linux/inotify.h
_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_ONLYDIR = 0x01000000
_MASK = (
    _IN_MODIFY
    | _IN_ATTRIB
    | _IN_CLOSE_WRITE
    | _IN_MOVED_FROM
    | _IN_MOVED_TO
    | _IN_CREATE
    | _IN_DELETE
    | _IN_DELETE_SELF
    | _IN_MOVE_SELF
    | _IN_ONLYDIR
)

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """One-shot hints about one directory: armed, it calls ``hint`` once, then stays silent until armed again.

    So a process that writes there without end costs as many wake-ups as the owner is willing to take.

    Args:
        directory: need not exist yet, may vanish and come back as another one.
        hint: called from the event loop.
    """

    def __init__(self, directory: Path, hint: Callable[[], None]) -> None:
        self._directory = directory
        self._hint = hint
        self._loop = asyncio.get_running_loop()
        self._watch = -1
        self._told = False
        # include/linux/inotify.h: IN_NONBLOCK and IN_CLOEXEC are the O_ flags
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            self._refused(ctypes.get_errno())

    def arm(self) -> bool:
        """Forget what happened so far and watch the directory that has the name now.

        Returns:
            Whether a hint will come; False without inotify or without the directory.
        """
        if self._fd < 0:
            return False
        # adding a directory that is watched already changes nothing and returns the same number
        watch: int = _libc.inotify_add_watch(self._fd, os.fsencode(self._directory), ctypes.c_uint32(_MASK))
        if watch < 0:
            self._refused(ctypes.get_errno())
        if watch != self._watch and self._watch >= 0:
            # the old directory was renamed away or covered by a mount; if deleted, this fails and may
            _libc.inotify_rm_watch(self._fd, self._watch)
        self._watch = watch
        self._drain()
        self._loop.add_reader(self._fd, self._readable)
        return watch >= 0

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _refused(self, code: int) -> None:
        """Say it once; a directory that is not there is no news, its owner is about to make it."""
        if code not in (errno.ENOENT, errno.ENOTDIR) and not self._told:
            self._told = True
            log.warning(
                "files are checked by timer only, raise the fs.inotify limits directory=%s reason=%s",
                self._directory,
                os.strerror(code),
            )

    def _readable(self) -> None:
        self._loop.remove_reader(self._fd)
        self._hint()

    def _drain(self) -> None:
        """Throw away queued events; bounded, for somebody may be writing as fast as we read."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                os.read(self._fd, 1 << 16)
