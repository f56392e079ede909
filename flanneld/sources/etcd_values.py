"""What etcd tells: keys, changes, outcomes of writes. Values only; ``etcd_client.py`` makes them."""

from __future__ import annotations

from typing import NamedTuple

from flanneld.errors import Unavailable


class KV(NamedTuple):
    """One key as stored; in a deletion only ``key`` and ``mod_revision`` are set."""

    key: bytes
    value: bytes
    mod_revision: int
    lease: int
    version: int
    create_revision: int


class Listing(NamedTuple):
    """What was stored at one revision."""

    kvs: list[KV]
    revision: int


class TxnResult(NamedTuple):
    """Outcome of a compare-and-swap."""

    succeeded: bool
    revision: int
    """Where the write took place, or the revision at which it was refused."""
    kvs: list[KV]
    """When refused: the key as it is; empty if it does not exist."""


class Event(NamedTuple):
    """One change of one key."""

    kv: KV
    deleted: bool


class Batch(NamedTuple):
    """Changes in order; without any it only tells that nothing happened up to ``revision``."""

    events: list[Event]
    revision: int
    """All changes up to this one have been delivered; a new watch goes on from the next."""


class Compacted(Unavailable):
    """The history asked for has been compacted away, or the store never had it: list again and watch from there."""


class LeaseGone(Unavailable):
    """The etcd lease that a write named has expired or been revoked: grant a new one."""
