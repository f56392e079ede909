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


class Age(NamedTuple):
    """How far a store has come; none of it ever goes back, unless the store is another one or was restored."""

    revision: int = 0
    cluster: int = 0
    """Its id, made from its first members; 0 where the server does not tell, as those that only speak etcd's API."""
    term: int = 0
    """One more with each election; a restored cluster begins anew. 0 as above."""


class Listing(NamedTuple):
    """What was stored at one revision."""

    kvs: list[KV]
    age: Age

    @property
    def revision(self) -> int:
        """At which it was stored."""
        return self.age.revision


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
