"""The state behind the API: objects, the one counter of versions, and a ring of the last events.

No I/O and no HTTP. Everything is done at once, so readers never see half a change; whoever follows the
events is woken by ``on_event`` and reads them from the ring by their sequence number.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

from flanneld.lab.kubeapi import status

Json = dict[str, Any]
Key = tuple[str, str, str]
"""Plural, namespace (empty for cluster-wide kinds), name."""

KINDS = {"nodes": "Node", "pods": "Pod"}
MANAGED_FIELDS = msgspec.json.encode(
    [{"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {}}]
)
EventType = Literal["ADDED", "MODIFIED", "DELETED"]


class Stored:
    """One version of one object, encoded once. Never changed: a new version is a new one.

    Args:
        plural: ``nodes`` or ``pods``.
        value: metadata, spec and status; without ``kind``, ``apiVersion`` and ``metadata.managedFields``.
        managed: the JSON of ``metadata.managedFields``, spliced in when the object is sent, so that thousands
            of objects share the bytes.
    """

    __slots__ = ("_head", "_tail", "managed", "plural", "value", "version")

    def __init__(self, plural: str, value: Json, managed: bytes = MANAGED_FIELDS) -> None:
        self.plural = plural
        self.value = value
        self.managed = managed
        self.version = int(value["metadata"]["resourceVersion"])
        self._head = b'{"metadata":' + msgspec.json.encode(value["metadata"])[:-1] + b',"managedFields":'
        rest = {key: part for key, part in value.items() if key != "metadata"}
        self._tail = b"}," + msgspec.json.encode(rest)[1:] if rest else b"}}"

    @property
    def key(self) -> Key:
        """Where it is stored."""
        metadata = self.value["metadata"]
        return self.plural, metadata.get("namespace", ""), metadata["name"]

    @property
    def kind(self) -> str:
        """Its ``kind``."""
        return KINDS[self.plural]

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""
        labels: Mapping[str, str] = self.value["metadata"].get("labels") or {}
        return labels

    def pieces(self) -> tuple[bytes, bytes, bytes]:
        """JSON as in a list, without ``kind`` and ``apiVersion``; nothing is copied."""
        return self._head, self.managed, self._tail

    def as_object(self) -> bytes:
        """JSON as in a GET or a watch event."""
        return b'{"kind":"%b","apiVersion":"v1",' % self.kind.encode() + b"".join(self.pieces())[1:]

    def as_value(self) -> Json:
        """A deep copy to work on, with everything in it."""
        copied: Json = msgspec.json.decode(self.as_object())
        return copied

    def at_version(self, version: int) -> Stored:
        """The same object under another version, as a DELETED event has it."""
        metadata = {**self.value["metadata"], "resourceVersion": str(version)}
        return Stored(self.plural, {**self.value, "metadata": metadata}, self.managed)


class Event(NamedTuple):
    """One change of one object."""

    sequence: int
    type: EventType
    current: Stored
    """The new version; for DELETED the last state under the deletion's version."""
    previous: Stored | None
    """None for ADDED."""


class Store:
    """All objects.

    Args:
        ring_size: events that are kept for watches to resume from.
    """

    def __init__(self, ring_size: int = 1000) -> None:
        self._objects: dict[Key, Stored] = {}
        self._ring: deque[Event] = deque(maxlen=ring_size)
        self._sequence = 0
        self._snapshots: dict[int, list[Stored]] = {}
        self.version = 1
        self.oldest_version = 0
        """A watch from before this version is refused: its events are gone."""
        self.on_event: list[Callable[[], None]] = []
        self.on_change: list[Callable[[Key, Stored | None], None]] = []
        """Told of each write before anybody else; for a journal."""

    # reading

    def get(self, plural: str, namespace: str, name: str) -> Stored:
        """One object.

        Raises:
            Refused: there is none (404).
        """
        found = self._objects.get((plural, namespace, name))
        if found is None:
            raise status.not_found(plural, name)
        return found

    def all(self, plural: str) -> list[Stored]:
        """Every object of a kind, in the order of lists: by namespace and name."""
        return [stored for key, stored in sorted(self._objects.items()) if key[0] == plural]

    def all_at(self, plural: str, version: int) -> list[Stored]:
        """Every object of a kind as it was.

        Raises:
            Refused: that version is compacted away (410).
        """
        if (kept := self._snapshots.get(version)) is not None:
            return kept
        if not self.oldest_version <= version <= self.version:
            raise status.expired_list()
        then = {stored.key: stored for stored in self.all(plural)}
        for event in reversed(self._ring):
            if event.current.version > version and event.current.plural == plural:
                if event.previous is None:
                    then.pop(event.current.key, None)
                else:
                    then[event.current.key] = event.previous
        return [stored for _, stored in sorted(then.items())]

    def keep_snapshot(self, plural: str) -> None:
        """Remember the present state for lists that are continued, until ``compact``."""
        self._snapshots[self.version] = self.all(plural)
        while len(self._snapshots) > 8:
            del self._snapshots[min(self._snapshots)]

    @property
    def sequence(self) -> int:
        """Number of the last event."""
        return self._sequence

    def events_after(self, sequence: int) -> list[Event] | None:
        """Events that followed; None when some of them have left the ring."""
        missing = self._sequence - sequence
        if missing > len(self._ring):
            return None
        return list(self._ring)[len(self._ring) - missing :] if missing else []

    def sequence_at(self, version: int) -> int:
        """Number of the last event up to a version."""
        after = sum(1 for event in self._ring if event.current.version > version)
        return self._sequence - after

    # writing

    def create(self, plural: str, value: Json, managed: bytes = MANAGED_FIELDS) -> Stored:
        """Store a new object.

        Raises:
            Refused: there is one of that name (409).
        """
        metadata = value["metadata"]
        if (plural, metadata.get("namespace", ""), metadata["name"]) in self._objects:
            raise status.already_exists(plural, metadata["name"])
        owned = {
            "uid": str(uuid.uuid4()),
            "resourceVersion": str(self.version + 1),
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        order = {"name": metadata["name"], **owned, **metadata, **owned}
        return self._put("ADDED", Stored(plural, {**value, "metadata": order}, managed), None)

    def replace(self, old: Stored, value: Json) -> Stored:
        """Store a new version; nothing happens when it is equal to the old one (05-patch-status-annotations-noop)."""
        if value == old.value:
            return old
        metadata = {**value["metadata"], "resourceVersion": str(self.version + 1)}
        return self._put("MODIFIED", Stored(old.plural, {**value, "metadata": metadata}, old.managed), old)

    def delete(self, old: Stored) -> Stored:
        """Remove an object; returns its last state under the deletion's version."""
        return self._put("DELETED", old.at_version(self.version + 1), old)

    def _put(self, kind: EventType, stored: Stored, previous: Stored | None) -> Stored:
        self.version = stored.version
        gone = kind == "DELETED"
        for told in self.on_change:
            told(stored.key, None if gone else stored)
        if gone:
            del self._objects[stored.key]
        else:
            self._objects[stored.key] = stored
        self._announce(kind, stored, previous)
        return stored

    def _announce(self, kind: EventType, stored: Stored, previous: Stored | None) -> None:
        self._sequence += 1
        if len(self._ring) == self._ring.maxlen:
            self.oldest_version = max(self.oldest_version, self._ring[0].current.version)
        self._ring.append(Event(self._sequence, kind, stored, previous))
        for wake in self.on_event:
            wake()

    # what the tests do to it

    def load(self, objects: Iterable[Stored], version: int) -> None:
        """Begin with these, as a server does that finds its store filled: the ring is empty."""
        self._objects = {stored.key: stored for stored in objects}
        self.version = version
        self.forget_events()

    def forget_events(self) -> None:
        """Empty the ring, as a restart of the server does."""
        self._ring.clear()
        self.oldest_version = self.version

    def compact(self) -> None:
        """Forget all old versions, as etcd's compaction does: lists cannot be continued, watches not resumed."""
        self._snapshots.clear()
        self.forget_events()

    def advance_to(self, version: int) -> None:
        """Jump ahead with the counter, as writes to other kinds of objects make it do."""
        self.version = max(self.version, version)

    def repeat(self, stored: Stored) -> None:
        """Announce an object once more as MODIFIED, with the version it has."""
        self._announce("MODIFIED", stored, stored)
