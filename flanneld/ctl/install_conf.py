"""``flannelctl install-conf SRC DEST``: puts a configuration file in place in one step (contract 10.5).

An init container runs it to install a CNI configuration, so that a runtime that watches the directory never reads half
a file. In the image it is also ``/opt/bin/install-conf``, the name and the words of Go flannel's program.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flanneld.errors import KernelError
from flanneld.report.atomic import file_refused

USAGE = "usage: install-conf <src> <dest>"


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status, which is 1 for a wrong command line too (contract 10.5).

    Raises:
        KernelError: a file could not be read or written.
    """
    if len(words) == 1 and words[0] in ("-h", "-help", "--help"):
        print(USAGE)
        return 0
    if len(words) != 2:
        print(USAGE, file=sys.stderr)
        return 1
    source, destination = (Path(word) for word in words)
    install(source, destination)
    print(f"install-conf: {destination} is in place")
    return 0


def install(source: Path, destination: Path) -> None:
    """Copy a file with its permission bits; readers of the destination see the old one or the new one, whole.

    Unlike ``report/atomic.write_atomic`` it makes no directories and an old file's mode does not stay.

    Args:
        source: the file to copy.
        destination: its new place, in a directory that exists; a link is replaced, not followed.

    Raises:
        KernelError: it was not copied; what was at the destination is untouched.
    """
    try:
        with source.open("rb") as file:
            content, mode = file.read(), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as exc:
        raise KernelError(f"read {source}", exc.errno or 0) from exc
    try:
        _replace(destination, content, mode)
    except OSError as exc:
        raise file_refused(f"write {destination}", exc) from exc


def _replace(destination: Path, content: bytes, mode: int) -> None:
    # CNI runtimes skip hidden files, and this name does not end in .conflist
    descriptor, temporary = tempfile.mkstemp(prefix=f".{destination.name}.tmp", dir=destination.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.rename(temporary, destination)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
