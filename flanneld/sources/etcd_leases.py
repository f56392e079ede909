"""From etcd's keys and values to leases and back: where the keys lie, and what to make of a bad one.

A bad key or value costs its own lease and one log line, never anybody else's (contract 11.1).
"""

from __future__ import annotations

import asyncio
import logging
import posixpath
from collections.abc import Iterable
from typing import NamedTuple

from flanneld.errors import PeerDataError
from flanneld.flood import Flood
from flanneld.model.lease import Lease
from flanneld.model.lease_codec import decode_attrs, parse_key, shown
from flanneld.plan.allocate import Subnets
from flanneld.sources.etcd_client import KV

log = logging.getLogger("flanneld.etcd")

BREATH = 256
"""Leases decoded between two turns of the event loop: about a millisecond."""


class Keys:
    """Where things lie below ``--etcd-prefix``, cleaned as Go's ``path.Join`` does (contract 3.2)."""

    def __init__(self, prefix: str) -> None:
        self.config = _join(prefix, "config")
        self.subnets = _join(prefix, "subnets") + "/"

    def lease(self, name: str) -> bytes:
        """The whole key of a lease, given its last element."""
        return (self.subnets + name).encode("utf-8", "surrogateescape")

    def name(self, key: bytes) -> str:
        """The part of a key below ``subnets/``, as tables and log lines show it."""
        return key.decode("utf-8", "surrogateescape").removeprefix(self.subnets)


def _join(prefix: str, name: str) -> str:
    path = posixpath.normpath("/".join(part for part in (prefix, name) if part))
    return path[1:] if path.startswith("//") else path  # POSIX keeps two leading slashes, Go does not


class Snapshot(NamedTuple):
    """What one listing says."""

    leases: dict[str, Lease]
    """Usable leases by ``Keys.name``."""
    unreadable: list[Subnets]
    """Subnets that are held by leases whose value cannot be read: not free, and no peers either."""


class LeaseReader:
    """Decodes leases and complains once about each bad one."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._noted: dict[int, int] = {}
        """Revision by hash of the key, which itself may be a megabyte."""
        self._flood = Flood(log, "keys that are no leases")

    async def snapshot(self, kvs: Iterable[KV]) -> Snapshot:
        """Decode a listing, giving way to other tasks now and then."""
        leases: dict[str, Lease] = {}
        unreadable: list[Subnets] = []
        for count, kv in enumerate(kvs, 1):
            lease = self.lease(kv)
            if lease:
                leases[self._keys.name(kv.key)] = lease
            elif held := self.subnets(kv):
                unreadable.append(held)
            if count % BREATH == 0:
                await asyncio.sleep(0)
        return Snapshot(leases, unreadable)

    def lease(self, kv: KV) -> Lease | None:
        """Decode one lease; None, and one log line for this revision of the key, when it cannot be used."""
        try:
            lease = Lease(*parse_key(kv.key), decode_attrs(kv.value), kv.mod_revision, kv.lease, kv.create_revision)
        except PeerDataError as error:
            if self._noted.get(hash(kv.key)) != kv.mod_revision:
                self._noted[hash(kv.key)] = kv.mod_revision
                name = shown(self._keys.name(kv.key).encode("utf-8", "surrogateescape"))
                self._flood.line("lease skipped, other peers are not affected key=%s reason=%s", name, error)
            return None
        if self._noted:
            self._noted.pop(hash(kv.key), None)
        return lease

    def subnets(self, kv: KV) -> Subnets | None:
        """The subnets that a key claims, whatever its value; None when the key cannot be read."""
        try:
            return Subnets(*parse_key(kv.key))
        except PeerDataError:
            return None

    def forget(self, key: bytes) -> None:
        """The key is gone from the store."""
        self._noted.pop(hash(key), None)
