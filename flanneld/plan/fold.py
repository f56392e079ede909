"""From leases to peers: what each lease means to this host, and which leases mean nothing. Pure.

A lease that cannot be used costs its owner only: it becomes a note, everything else goes on
(contract 11.1 is what happens otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flanneld.model.addr import IP, Family, Prefix, format_ip
from flanneld.model.lease import Lease
from flanneld.model.netconf import NetConf


class Remote(NamedTuple):
    """One peer's claim in one family, sound but for the backend's own data."""

    subnet: Prefix
    """Host bits cleared."""
    public_ip: IP
    data: bytes
    """The backend's raw JSON for this family; empty when absent."""
    revision: int
    """When the lease was last written; of two claims that exclude each other the younger counts."""


class Fold(NamedTuple):
    """What the leases come to."""

    remotes: dict[Family, dict[Prefix, Remote]]
    unserved: dict[Family, set[Prefix]]
    """Leased subnets that we cannot reach, so that nobody takes them for free space."""
    notes: dict[str, str]
    """By lease, one sentence each: why it, or a part of it, is not used."""


class Self(NamedTuple):
    """What of ourselves other leases are held against."""

    subnets: tuple[Prefix | None, Prefix | None]
    public_ips: frozenset[IP]


def fold(leases: Iterable[Lease], conf: NetConf, me: Self, backend_type: str) -> Fold:
    """Sort all leases into peers of each family, subnets out of reach, and notes."""
    result = Fold({f: {} for f in conf.families()}, {f: set() for f in conf.families()}, {})
    for lease in leases:
        for family in result.remotes:
            subnet = lease.subnet if family is Family.V4 else lease.subnet6
            if subnet is None or subnet == me.subnets[family is Family.V6]:
                continue
            _fold_one(result, lease, family, subnet.masked(), conf, me, backend_type)
    return result


def _fold_one(
    result: Fold, lease: Lease, family: Family, subnet: Prefix, conf: NetConf, me: Self, backend_type: str
) -> None:
    own = me.subnets[family is Family.V6]
    settings = conf.family(family)
    network = settings.network if settings else subnet
    if not network.covers(subnet) or subnet.length <= network.length:
        result.notes[lease.name()] = f"lease {lease.name()} lies outside {network}: not used"
        return
    if own is not None and subnet.overlaps(own):
        result.notes[lease.name()] = f"lease {lease.name()} overlaps our own {own}: not used"
        return
    problem = _problem(lease, family, me, backend_type)
    if problem:
        result.notes[lease.name()] = f"lease {lease.name()} {problem}: not used"
        result.unserved[family].add(subnet)
        return
    attrs = lease.attrs
    public, data = (attrs.public_ip, attrs.data) if family is Family.V4 else (attrs.public_ip6, attrs.data6)
    if public is None:
        raise TypeError("a lease without a public address has a problem")
    remote = Remote(subnet, public, data, lease.revision)
    rival = result.remotes[family].get(subnet)
    if rival is not None and rival.public_ip != public:
        result.notes[lease.name()] = (
            f"{subnet} is leased twice, by {format_ip(rival.public_ip)} and {format_ip(public)}"
        )
    if rival is None or rival.revision <= remote.revision:
        result.remotes[family][subnet] = remote
    result.unserved[family].discard(subnet)


def _problem(lease: Lease, family: Family, me: Self, backend_type: str) -> str | None:
    """Why a lease cannot be served; None when it can."""
    if lease.attrs.backend_type != backend_type:
        return f"has backend {lease.attrs.backend_type or 'udp'!r}, ours is {backend_type!r}"
    public = lease.attrs.public_ip if family is Family.V4 else lease.attrs.public_ip6
    if public is None:
        return f"has no public {family.label} address"
    if public in me.public_ips:
        return f"carries our own public address {format_ip(public)}"
    if not usable_unicast(public):
        return f"has the unusable public address {format_ip(public)}"
    return None


def usable_unicast(ip: IP) -> bool:
    """Whether packets can be sent to an address over a network: not unspecified, loopback, multicast, reserved."""
    if len(ip) == 4:
        return 0 < ip[0] < 224 and ip[0] != 127
    return ip[0] != 0xFF and int.from_bytes(ip, "big") > 1
