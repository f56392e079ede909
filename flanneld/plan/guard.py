"""What to do about our own key, given what it was found to hold: decisions only, no store.

States and transitions of a host stand in design/lease-protocol.md; ``tests/model`` explores these very functions
over all interleavings of a few hosts. ``flanneld/sources/keeper.py`` carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

from flanneld.model.lease import LeaseAttrs, OwnLease
from flanneld.plan.allocate import Subnets
from flanneld.plan.claim import Holder, Verdict, holder, judge, tunnel_ends

MAX_RESTORES = 3
"""How often between two renewals our value is put back before we give in to the other writer."""


class Found(NamedTuple):
    """A key as it was read."""

    attrs: LeaseAttrs | None
    """None: nobody can read the value."""
    revision: int
    """Of its last write."""
    created: int
    """Of its first write since it was last absent."""


class Act(Enum):
    """What to do."""

    CONFIRM = auto()
    """Nothing: it holds what we want."""
    WRITE = auto()
    """Write our value over it, if it is still as it was read."""
    RESTORE = auto()
    """The same, because somebody else wrote; to be counted."""
    LEAVE = auto()
    """Nothing until the next renewal, the other writer would only write again; peers see the same either way."""
    CREATE = auto()
    """It is gone: make it again, unless somebody overlaps it."""


class Loss(Enum):
    """Another host has our subnet. We write nothing, whatever it is."""

    STOLEN = auto()
    """Our value was written over. It may come back to us: wait for that."""
    TAKEN = auto()
    """Our key was gone and the other came by the subnet as everybody does. It stays there: take another one."""
    CLONED = auto()
    """The other has our identity and another address."""
    DOUBLED = auto()
    """The other has our address, no identity and a tunnel end that is not ours: Go flanneld on another machine."""


def look(
    found: Found | None, own: OwnLease, wanted: LeaseAttrs, *, granted: bool, due: bool, restores: int, same_store: bool
) -> Act | Loss:
    """Judge our key.

    Args:
        found: our key as it was read; None = absent.
        own: what we know that we wrote.
        wanted: what we want to write; may be there already when an answer got lost.
        granted: whether the etcd lease that the key is attached to is ours, or there is none (a reservation).
        due: it has to be renewed in any case.
        restores: how often since the last renewal somebody else wrote over it.
        same_store: whether the store is still the one that ``own`` was written to, so that revisions compare.
    """
    if found is None:
        return Act.CREATE
    verdict = judge(found.attrs, own.lease.attrs, wanted)
    if verdict is Verdict.LOST and found.attrs is not None:
        return _loss(found.attrs, found.created, own, wanted, same_store=same_store)
    if verdict is Verdict.HOLDS and granted and found.attrs == wanted and not due:
        return Act.CONFIRM
    if due or (verdict is Verdict.HOLDS and granted):
        return Act.WRITE
    return Act.RESTORE if restores < MAX_RESTORES else Act.LEAVE


def _loss(found: LeaseAttrs, created: int, own: OwnLease, wanted: LeaseAttrs, *, same_store: bool) -> Loss:
    if same_store and created > own.lease.revision:
        return Loss.TAKEN
    match holder(found, wanted):
        case Holder.MOVED:
            return Loss.CLONED
        case Holder.UNSIGNED:
            return Loss.DOUBLED
        case _:
            return Loss.STOLEN


def overlapped(*, same_store: bool) -> Loss:
    """Our key is gone and another one overlaps it. A replaced store may only be showing an old time."""
    return Loss.TAKEN if same_store else Loss.STOLEN


class Stake(NamedTuple):
    """A key and what it claims, whatever its value."""

    key: str
    subnets: Subnets
    created: int


def rival(stakes: Iterable[Stake], key: str, subnets: Subnets) -> str | None:
    """Another key that claims an address of ours, None when there is none.

    Args:
        stakes: all there are.
        key: the one that we want to make.
        subnets: what it stands for.
    """
    return next((stake.key for stake in stakes if stake.key != key and stake.subnets.overlaps(subnets)), None)


def beaten(stakes: Iterable[Stake], key: str, subnets: Subnets, written: int) -> str | None:
    """The key that goes before the one we have just written, None when there is none.

    In a dual-stack network two hosts may choose the same IPv4 subnet and different IPv6 ones: these are different
    keys, so both transactions succeed. The older key stays; so everybody looks once more after writing.

    Args:
        stakes: all there are.
        key: ours.
        subnets: what it stands for.
        written: revision of our write.
    """
    every = tuple(stakes)
    created = next((stake.created for stake in every if stake.key == key), written + 1)
    if created > written:
        return key  # gone meanwhile, or another's already
    return rival((stake for stake in every if stake.created <= created), key, subnets)


def is_clone(found: LeaseAttrs, ours: LeaseAttrs) -> bool:
    """Whether a lease that was written just now, under another key than ours, shows that our identity is used twice.

    Not every lease with our identity does: one that nobody writes any more is ours from before our address changed.
    """
    return holder(found, ours) is Holder.MOVED


def clashes(found: LeaseAttrs, ours: LeaseAttrs) -> bool:
    """Whether peers cannot reach both of two clones: MAC addresses are derived from the identity."""
    return bool(tunnel_ends(found) & tunnel_ends(ours))
