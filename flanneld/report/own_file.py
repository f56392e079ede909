"""Read a file in whose place somebody may have put anything: a pipe, a device, a terabyte.

A start must not hang on what lies in the state directory, nor fill the memory with it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AT_MOST_BYTES = 256 << 20
"""Longest file: the memory of fifty thousand leases takes ten megabytes."""


class NotOurs(ValueError):
    """Other users may have written it."""


def read_own(path: Path, *, trusted: bool = False) -> bytes:
    """The whole content of a regular file.

    Args:
        path: the file; links are followed.
        trusted: only if nobody but root and this process' user may have written it.

    Raises:
        OSError: it cannot be read, or is not there.
        NotOurs: see ``trusted``.
        ValueError: it is no regular file, or too long.
    """
    with _opened(path) as (fd, status):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > AT_MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, which is more than any that flanneld writes")
        if trusted:
            _refuse_foreign(status)
        with open(fd, "rb", closefd=False) as file:
            return file.read()


def read_file(path: Path, limit: int) -> bytes:
    """The first ``limit`` bytes of a regular file, whoever's it is.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with _opened(path) as (fd, status):
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        return os.read(fd, limit)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A file, whatever it is, and what it is; a pipe without writer would keep us for ever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield fd, os.fstat(fd)
    finally:
        os.close(fd)


def _refuse_foreign(status: os.stat_result) -> None:
    if status.st_mode & stat.S_IWOTH:
        raise NotOurs(f"every user of this host may write it (mode {stat.S_IMODE(status.st_mode):04o})")
    if status.st_uid not in (0, os.geteuid()):
        raise NotOurs(f"it belongs to user {status.st_uid}")
