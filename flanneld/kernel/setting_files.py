"""Files below /proc/sys held open: a read is one system call, and a write by others is heard of.

The kernel tells inotify of writes to /proc as of any others (``fsnotify_modify`` in ``vfs_write``), under these
conditions, all seen on 6.18:

- A file there has its inode only as long as somebody uses it; after that the next writer gets another one. So each
  is held open. That keeps neither a device nor a network namespace alive.
- With its device the setting goes, and reading it gives ENOENT for ever; a device of the same name has another file.
- Who writes through another mount of proc, as another container does, is not heard. Look now and then all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from flanneld.inotify import Inotify, On
from flanneld.kernel import procfs

log = logging.getLogger("flanneld.kernel")

_LONGEST = 256
"""Bytes; settings are numbers."""


class _File(NamedTuple):
    fd: int
    watch: int
    """-1 = a write is not heard of."""


class SettingFiles:
    """Some settings of the network namespace in which this was made."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._inotify: Inotify | None = None
        self._told = False

    def listen(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` once, from the event loop, when something is written from now on; before reading."""
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                self.keep(())  # opened without being watched
            self._inotify.arm(changed)
        except OSError as exc:
            self._refused(exc)

    def keep(self, paths: Iterable[str]) -> None:
        """Let go of all other files."""
        for path in self._files.keys() - set(paths):
            self._let_go(path)

    def read(self, path: str) -> str | None:
        """A setting as it is now; None where there is none, or it cannot be read.

        Args:
            path: below /proc/sys.
        """
        if path in self._files:
            try:
                return _content(self._files[path].fd)
            except OSError:  # its device is gone; another one may have its name
                self._let_go(path)
        try:
            return _content(self._open(path))
        except OSError:
            return None

    def close(self) -> None:
        """Let go of everything."""
        self.keep(())
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _open(self, path: str) -> int:
        fd, watch = os.open(procfs.PROC_SYS / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), -1
        if self._inotify is not None:
            try:
                # by the descriptor: the path may lead to another device's file by now
                watch = self._inotify.watch(Path(f"/proc/self/fd/{fd}"), On.MODIFY)
            except OSError as exc:
                self._refused(exc)
        self._files[path] = _File(fd, watch)
        return fd

    def _let_go(self, path: str) -> None:
        file = self._files.pop(path)
        if self._inotify is not None and file.watch >= 0:
            self._inotify.unwatch(file.watch)
        with contextlib.suppress(OSError):
            os.close(file.fd)

    def _refused(self, refusal: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "settings below /proc/sys are checked by timer only, raise the fs.inotify limits reason=%s",
                refusal.strerror,
            )


def _content(fd: int) -> str:
    return os.pread(fd, _LONGEST, 0).decode("ascii", "replace").strip()
