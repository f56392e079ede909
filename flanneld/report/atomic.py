"""Replace a file so that every reader, at every moment, sees the old one or the new one, whole.

These calls block for as long as the file system takes: microseconds in /run, which is memory. Callers
with a file on a disk and a busy loop use a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path

from flanneld.errors import KernelError

_REMEDY = {
    errno.EACCES: "give flanneld write access to its directory",
    errno.EPERM: "give flanneld write access to its directory",
    errno.EROFS: "mount its file system read-write or choose another path",
    errno.ENOSPC: "its file system is full",
    errno.EDQUOT: "its quota is used up",
    errno.EBUSY: "it is a mount point; mount its directory instead of the file",
    errno.EISDIR: "a directory is in its place; remove that",
    errno.ENOTDIR: "part of its path is not a directory",
}


def write_atomic(path: Path, content: bytes, what: str, new_mode: int = 0o644, *, mode: int | None = None) -> None:
    """Write a file through a temporary one beside it (contract 4.3, 4.6).

    Args:
        path: the file; missing parent directories are created with mode 0755.
        content: the whole new content.
        what: what the file is, for the sentence of an error.
        new_mode: permission bits of a new file, whatever the umask; an existing regular file keeps its own.
        mode: permission bits in any case.

    Raises:
        KernelError: it could not be written; the old file is untouched.
    """
    try:
        make_directory(path.parent)
        _replace(path, content, _mode_of(path, new_mode) if mode is None else mode)
    except OSError as exc:
        raise file_refused(f"write {what} {path}", exc) from exc


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove what a killed process left of ``write_atomic``; files that are being written stay.

    Args:
        directory: where to look; need not exist.
        name: of the file that was to be written, or what the names of several begin with.
    """
    for path in leftovers(directory, name):
        _remove_unless_locked(path)


def leftovers(directory: Path, name: str) -> list[Path]:
    """What ``remove_leftovers`` would look at: left by killed processes, or just being written."""
    pattern = re.compile(rf"\.{re.escape(name)}.*\.[a-z0-9_]{{8}}")
    try:
        return [directory / entry for entry in sorted(os.listdir(directory)) if pattern.fullmatch(entry)]
    except OSError:
        return []


def _remove_unless_locked(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)


def file_refused(what: str, exc: OSError) -> KernelError:
    """Translate the failure of a file operation, with the remedy where the errno tells one."""
    code = exc.errno or 0
    return KernelError(what, code, _REMEDY.get(code, ""))


def make_directory(path: Path) -> None:
    """Create a directory and its parents, each new one with mode 0755 whatever the umask (contract 4.3)."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o755)  # a umask of 0 must not let others in before the next line
        path.chmod(0o755)


def _replace(path: Path, content: bytes, mode: int) -> None:
    # the hidden name keeps globbing readers (systemd, shells) from taking the half-written file
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(fd, fcntl.LOCK_SH)  # "somebody lives who will rename this", see ``remove_leftovers``
            file.write(content)
            file.flush()
            os.fchmod(fd, mode)
            # without it a power cut may leave the new name on an empty file (ext4 delayed allocation)
            os.fsync(fd)
            os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _mode_of(path: Path, new_mode: int) -> int:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return new_mode
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else new_mode


def _sync_directory(path: Path) -> None:
    """Make the rename itself durable; the file is in place already, so a refusal does not matter."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
