"""Objects on disk, so that a server that is killed and started again still has them.

One JSON line for each write. Read at the start, then written anew; a last line that was cut off is ignored.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from flanneld.lab.kubeapi.objects import Key, Store, Stored


class Journal:
    """The file behind a store.

    Args:
        path: made if there is none; its directory must exist.
        store: filled from the file, and followed from then on.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self._store = store
        objects, version = _read(path)
        store.load(objects.values(), max(version, store.version))
        rewritten = path.with_suffix(".new")
        with rewritten.open("wb") as file:
            for key, stored in objects.items():
                file.write(_line(key, stored, version))
        rewritten.rename(path)
        self._file = path.open("ab", buffering=0)
        store.on_change.append(self._append)

    def close(self) -> None:
        """Stop following."""
        self._store.on_change.remove(self._append)
        self._file.close()

    def _append(self, key: Key, stored: Stored | None) -> None:
        self._file.write(_line(key, stored, self._store.version))


def _line(key: Key, stored: Stored | None, version: int) -> bytes:
    entry = {"version": version, "key": key, "value": stored.value if stored else None}
    return msgspec.json.encode(entry) + b"\n"


def _read(path: Path) -> tuple[dict[Key, Stored], int]:
    objects: dict[Key, Stored] = {}
    version = 0
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):  # we were killed while writing it
            entry: dict[str, Any] = msgspec.json.decode(line)
            plural, namespace, name = entry["key"]
            version = entry["version"]
            objects.pop((plural, namespace, name), None)
            if entry["value"] is not None:
                objects[plural, namespace, name] = Stored(plural, entry["value"])
    return objects, version
