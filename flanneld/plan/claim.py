"""Whose a lease is, and what to do next to have one: decisions only, no store.

The identity in a lease decides; Go flanneld writes none, there the public address has to do
(contract 3.20, 11.14, 13.6). ``flanneld/sources/keeper.py`` carries the decisions out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

from flanneld.model.lease import Claim, Lease, LeaseAttrs
from flanneld.model.netconf import NetConf
from flanneld.plan.allocate import Below, Subnets, allocate, is_compatible


class Holder(Enum):
    """Who wrote a lease, as seen from this host."""

    OURS = auto()
    """Our identity and our public address."""
    UNSIGNED = auto()
    """Our public address and no identity: Go flanneld on this host, or an operator's reservation."""
    MOVED = auto()
    """Our identity, another address: ours before the address changed, or a clone of this machine."""
    DOUBLE = auto()
    """Our public address, another machine's identity."""
    OTHER = auto()
    """A peer's."""


def holder(found: LeaseAttrs, ours: LeaseAttrs) -> Holder:
    """Tell whose a lease is.

    Args:
        found: the value in the store.
        ours: our own value; its IPv6 address counts only when it has no IPv4 one (contract 3.24).
    """
    if ours.public_ip:
        same_address = found.public_ip == ours.public_ip
    else:
        same_address = ours.public_ip6 is not None and found.public_ip6 == ours.public_ip6
    if found.identity == ours.identity:
        if same_address:
            return Holder.OURS
        return Holder.MOVED if ours.identity else Holder.OTHER
    if not same_address:
        return Holder.OTHER
    return Holder.DOUBLE if found.identity else Holder.UNSIGNED


class Take(NamedTuple):
    """Write our value over a lease that is ours already."""

    key: str
    lease: Lease
    why: str


class Remove(NamedTuple):
    """Delete a lease that is ours and does not fit the network configuration any more."""

    key: str
    lease: Lease


class Create(NamedTuple):
    """Make a new lease."""

    subnets: Subnets
    why: str


def next_step(
    leases: Mapping[str, Lease],
    taken: Iterable[Subnets],
    conf: NetConf,
    claim: Claim,
    lost: Collection[str],
    below: Below,
) -> Take | Remove | Create:
    """Decide how to come to a lease, given all there are (contract 3.20).

    Args:
        leases: all usable leases, by key.
        taken: further subnets that are not free, of leases whose value cannot be read.
        conf: the network configuration.
        claim: what we want to publish and which subnets we had before.
        lost: keys that another host took from us while we ran; never ours again by identity alone.
        below: the source of randomness.

    Raises:
        ConfigError: there is no subnet at all.
        Unavailable: no subnet is free now.
    """
    previous = Subnets(*claim.previous)
    mine: list[tuple[int, str, Lease]] = []
    for key, lease in leases.items():
        whose = holder(lease.attrs, claim.attrs)
        if whose is Holder.MOVED and (key in lost or subnets_of(lease) != previous):
            continue  # a clone's, for all we know
        if whose in _RANK:
            mine.append((_RANK[whose], key, lease))
    mine.sort(key=lambda entry: entry[:2])
    for rank, key, lease in mine:
        if is_compatible(subnets_of(lease), conf):
            return Take(key, lease, _WHY[rank])
    for _, key, lease in mine:
        return Remove(key, lease)
    others = [*taken, *(subnets_of(lease) for lease in leases.values())]
    chosen = allocate(conf, others, previous, below)
    return Create(chosen, "subnet=previous" if chosen == previous else "subnet=new")


_RANK = {Holder.OURS: 0, Holder.MOVED: 1, Holder.UNSIGNED: 2}
_WHY = (
    "it carries our identity and address",
    "it carries our identity and was our previous subnet",
    "it carries our address and no identity",
)


def subnets_of(lease: Lease) -> Subnets:
    """The subnets of a lease, host bits cleared."""
    return Subnets(lease.subnet and lease.subnet.masked(), lease.subnet6 and lease.subnet6.masked())


def doubles(leases: Mapping[str, Lease], ours: LeaseAttrs) -> dict[str, str]:
    """One sentence for each lease that another machine published with our address, by key (failure F19)."""
    return {
        key: f"{lease.name()} is leased to machine {lease.attrs.identity} with our public address {ours.where()}, "
        f"we are machine {ours.identity or '(no identity)'}; give each host its own --public-ip, "
        "or delete that key if the machine is gone"
        for key, lease in leases.items()
        if holder(lease.attrs, ours) is Holder.DOUBLE
    }


class Verdict(Enum):
    """What the present value of our key means for us."""

    HOLDS = auto()
    """It is what we wrote or want to write."""
    RESTORE = auto()
    """Somebody wrote over it who is not another host; ours has to go back."""
    LOST = auto()
    """Another host has the subnet."""


def judge(found: LeaseAttrs | None, confirmed: LeaseAttrs, wanted: LeaseAttrs) -> Verdict:
    """Judge a value found under our key.

    Args:
        found: the value; None when it cannot be decoded.
        confirmed: what we know that we wrote.
        wanted: what we want to write; may be there already when an answer got lost.
    """
    if found is None:
        return Verdict.RESTORE
    if found in (confirmed, wanted):
        return Verdict.HOLDS
    whose = {holder(found, confirmed), holder(found, wanted)}
    if Holder.UNSIGNED in whose and _is_elsewhere(found, confirmed, wanted):
        return Verdict.LOST
    return Verdict.RESTORE if whose & {Holder.OURS, Holder.UNSIGNED} else Verdict.LOST


_MAC = re.compile(rb'"VtepMAC"\s*:\s*"([^"]*)"', re.IGNORECASE)  # in any case, as Go reads it (contract 13.5)


def tunnel_ends(attrs: LeaseAttrs) -> frozenset[bytes]:
    """The MAC addresses of a vxlan host's devices; none of any other backend's."""
    return frozenset(mac.lower() for mac in _MAC.findall(attrs.data + attrs.data6))


def _is_elsewhere(found: LeaseAttrs, *ours: LeaseAttrs) -> bool:
    """Whether a lease leads to another tunnel end than ours. Go flanneld on this host adopts our device and its MAC
    (contract 13.8, 13.15), so a strange one is a second machine with our address (failure F19)."""
    known = frozenset[bytes]().union(*map(tunnel_ends, ours))
    return bool(known and tunnel_ends(found) - known)


def is_displaced(step: Take | Remove | Create, claim: Claim) -> bool:
    """Whether a step gives this host other subnets than those that its containers use now."""
    if not claim.in_use or isinstance(step, Remove):
        return False
    got = subnets_of(step.lease) if isinstance(step, Take) else step.subnets
    return got != Subnets(*claim.previous)


def moved(before: str, now: str) -> str:
    """What to tell the operator of a host that has another subnet now."""
    return (
        f"our subnet {before} belongs to another host by now, ours is {now}: restart the containers of this host, "
        "which have addresses of the former one"
    )


def occupant(leases: Mapping[str, Lease], subnets: Subnets) -> str:
    """Who has an address of these subnets, for sentences."""
    for lease in leases.values():
        if subnets_of(lease).overlaps(subnets):
            return f"machine {lease.attrs.identity or '(no identity)'} at {lease.attrs.where()}"
    return "another host"
