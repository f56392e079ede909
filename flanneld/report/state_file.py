"""Files of the state directory: what is written by one version of this program and read by another.

Every file says what it is, in which version of its format, and what its content hashes to::

    {"kind":"flanneld-subnets","version":2,"sha256":"9f86d0…","content":{…}}

An older version is read and written anew in ours. What cannot be used, because it is damaged, of another kind
or of a version that came after this program, is renamed, never deleted, never fatal: design/adr-0012.
Nothing here knows what the contents mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from flanneld.report.atomic import write_atomic
from flanneld.report.own_file import read_own

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """One kind of file."""

    name: str
    """Written into the file; never changes."""
    version: int
    """Of the format we write; one more for each change that an older program would misread."""
    content: type[T]
    upgrades: Mapping[int, Callable[[bytes], T]]
    """By older version, what reads a whole file of it; raises ``msgspec.MsgspecError`` or ``ValueError``."""


class _Head(msgspec.Struct):
    """What a file of any version has, those to come included."""

    kind: str
    version: int


class _Envelope(msgspec.Struct):
    kind: str
    version: int
    sha256: str
    """Of the content's bytes as they stand: a changed digit is still good JSON."""
    content: msgspec.Raw


class _Unusable(Exception):
    """Why a file cannot be used, and the end of the name under which it is kept."""

    def __init__(self, reason: str, ending: str = "unusable") -> None:
        super().__init__(reason)
        self.ending = ending


def read(path: Path, kind: Kind[T]) -> T | None:
    """A file's content; None when there is none. One of an older version is written anew, an unusable one set aside.

    Raises:
        KernelError: an older one could not be written anew.
    """
    try:
        found = _read(path, kind)
    except _Unusable as exc:
        set_aside(path, str(exc), exc.ending)
        return None
    if found is None:
        return None
    version, content = found
    if version != kind.version:
        write(path, kind, content)
        log.info("state file brought to the present format path=%s from=%d to=%d", path, version, kind.version)
    return content


def peek(path: Path, kind: Kind[T]) -> T | None:
    """A file's content without touching anything; None when there is none that can be used."""
    try:
        found = _read(path, kind)
    except _Unusable:
        return None
    return found[1] if found else None


def write(path: Path, kind: Kind[T], content: T) -> None:
    """Replace a file. Waits for the disk.

    Raises:
        KernelError: it could not be written; the old one is untouched.
    """
    raw = msgspec.json.encode(content)
    envelope = _Envelope(kind.name, kind.version, hashlib.sha256(raw).hexdigest(), msgspec.Raw(raw))
    write_atomic(path, msgspec.json.encode(envelope) + b"\n", "the state file")


def set_aside(path: Path, reason: str, ending: str = "unusable") -> None:
    """Rename an unusable file, for somebody to look at; one that was set aside before keeps its place."""
    aside, number = path.with_name(f"{path.name}.{ending}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{ending}-{number}")
    log.warning("a state file cannot be used and is set aside path=%s aside=%s reason=%s", path, aside, reason)
    with contextlib.suppress(OSError):
        path.rename(aside)


def _read(path: Path, kind: Kind[T]) -> tuple[int, T] | None:
    """Version and content."""
    try:
        raw = read_own(path)
        return _decode(raw, kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise _Unusable(str(exc)) from exc


def _decode(raw: bytes, kind: Kind[T]) -> tuple[int, T]:
    head = msgspec.json.decode(raw, type=_Head)
    if head.kind != kind.name:
        raise _Unusable(f"it is a {head.kind[:40]!r} file, not {kind.name}")
    if head.version > kind.version:
        raise _Unusable(
            f"a newer flanneld wrote it (format {head.version}, this one knows up to {kind.version})",
            f"format-{head.version}",
        )
    if head.version < kind.version:
        if head.version not in kind.upgrades:
            raise _Unusable(f"nobody ever wrote format {head.version}")
        return head.version, kind.upgrades[head.version](raw)
    envelope = msgspec.json.decode(raw, type=_Envelope)
    if hashlib.sha256(envelope.content).hexdigest() != envelope.sha256:
        raise _Unusable("its checksum is wrong: the disk, or somebody, changed it")
    return head.version, msgspec.json.decode(envelope.content, type=kind.content)
