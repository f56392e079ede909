"""From leases to peers: what each lease means to this host, and which leases mean nothing. Pure.

A lease that cannot be used costs its owner only: it becomes a note, everything else goes on
(contract 11.1 is what happens otherwise). Works lease by lease, so that a change costs what it weighs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class Self(NamedTuple):
    """What of ourselves other leases are held against."""

    subnets: tuple[Prefix | None, Prefix | None]
    public_ips: frozenset[IP]


class Unserved(NamedTuple):
    """A leased subnet that we cannot reach: no peer, but no free space either."""

    subnet: Prefix
    why: str


class Outside(NamedTuple):
    """A lease that has no place in our network."""

    why: str


Meaning = Remote | Unserved | Outside | None
"""What one lease means in one family; None = nothing at all (our own, or no subnet in that family)."""


def meaning(lease: Lease, family: Family, conf: NetConf, me: Self, backend_type: str) -> Meaning:
    """What one lease means to this host in one family."""
    leased = lease.subnet if family is Family.V4 else lease.subnet6
    own = me.subnets[family is Family.V6]
    settings = conf.family(family)
    if leased is None or settings is None or leased == own:
        return None
    subnet = leased.masked()
    if not settings.network.covers(subnet) or subnet.length <= settings.network.length:
        return Outside(f"lease {lease.name()} lies outside {settings.network}: not used")
    if own is not None and subnet.overlaps(own):
        return Outside(f"lease {lease.name()} overlaps our own {own}: not used")
    public = lease.attrs.public_ip if family is Family.V4 else lease.attrs.public_ip6
    problem = _problem(lease, family, public, me, backend_type)
    if problem or public is None:
        return Unserved(subnet, f"lease {lease.name()} {problem}: not used")
    data = lease.attrs.data if family is Family.V4 else lease.attrs.data6
    return Remote(subnet, public, data, lease.revision)


def _problem(lease: Lease, family: Family, public: IP | None, me: Self, backend_type: str) -> str | None:
    """Why a lease cannot be served; None when it can."""
    if lease.attrs.backend_type != backend_type:
        return f"has backend {lease.attrs.backend_type or 'udp'!r}, ours is {backend_type or 'udp'!r}"
    if public is None:
        return f"has no public {family.label} address"
    if public in me.public_ips:
        return f"carries our own public address {format_ip(public)}"
    if not usable_unicast(public):
        return f"has the unusable public address {format_ip(public)}"
    return None


def usable_unicast(ip: IP) -> bool:
    """Whether packets can be sent to an address over a network: not unspecified, loopback, multicast, reserved.

    Nor an IPv6 link-local one, which means nothing without an interface, nor what is in ::/32: IPv4-mapped
    addresses and the like, which are on no wire.
    """
    if len(ip) == 4:
        return 0 < ip[0] < 224 and ip[0] != 127
    return ip[0] != 0xFF and any(ip[:4]) and not (ip[0] == 0xFE and ip[1] & 0xC0 == 0x80)


class Fold:
    """All leases of one family by subnet, kept current lease by lease."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.remotes: dict[Prefix, Remote] = {}
        """The claim that counts for each subnet."""
        self.unserved: dict[Prefix, str] = {}
        """Leased subnets out of reach, and why."""
        self.notes: dict[str, str] = {}
        """By key of the lease, why it is not used."""
        self._meanings: dict[str, Remote | Unserved | Outside] = {}
        self._names: dict[IP, tuple[str, ...]] = {}
        """Keys by first address of their subnet: nearly always one, but ``10.5.1.0-24``, ``10.5.1.0-26`` and
        ``10.5.1.0-24&fd00::-64`` may all exist."""

    def update(self, changes: Mapping[str, Lease | None], conf: NetConf, me: Self, backend_type: str) -> set[Prefix]:
        """Take changed leases (None = gone); returns the subnets whose peer may be another now."""
        touched: set[Prefix] = set()
        for key, lease in changes.items():
            new = meaning(lease, self.family, conf, me, backend_type) if lease is not None else None
            old = self._meanings.get(key)
            if new == old:
                continue
            if new is None:
                del self._meanings[key]
            else:
                self._meanings[key] = new
            touched.update(self._rename(key, old, new))
            if isinstance(new, Unserved | Outside):
                self.notes[key] = new.why
            else:
                self.notes.pop(key, None)
        for base in {subnet.ip for subnet in touched}:
            touched |= self._elect(base)
        return touched

    def _rename(self, key: str, old: Meaning, new: Meaning) -> Iterator[Prefix]:
        """Keep ``_names`` current; a key's subnet never changes, only whether it counts. Yields what is touched."""
        before = old.subnet if isinstance(old, Remote | Unserved) else None
        after = new.subnet if isinstance(new, Remote | Unserved) else None
        if after is not None and before is None:
            self._names[after.ip] = (*self._names.get(after.ip, ()), key)
        elif before is not None and after is None:
            self.remotes.pop(before, None)
            self.unserved.pop(before, None)
            left = tuple(name for name in self._names[before.ip] if name != key)
            if left:
                self._names[before.ip] = left
            else:
                del self._names[before.ip]
        yield from (subnet for subnet in {before, after} if subnet is not None)

    def _elect(self, base: IP) -> set[Prefix]:
        """Of several claims that begin at one address, the one written last counts, if it can be served.

        The first address is what a tunnel's neighbour entry is for: two hosts cannot share it. Returns all
        subnets that were claimed.
        """
        claims = [(key, self._meanings[key]) for key in sorted(self._names.get(base, ()))]
        remotes = sorted((claim.revision, key, claim) for key, claim in claims if isinstance(claim, Remote))
        subnets = {claim.subnet for _key, claim in claims if not isinstance(claim, Outside)}
        for subnet in subnets:
            self.remotes.pop(subnet, None)
            self.unserved.pop(subnet, None)
        for _key, claim in claims:
            if isinstance(claim, Unserved):
                self.unserved[claim.subnet] = claim.why
        if remotes:
            *losers, (_revision, winning_key, winner) = remotes
            self.remotes[winner.subnet] = winner
            self.unserved.pop(winner.subnet, None)
            self.notes.pop(winning_key, None)
            for _revision, key, loser in losers:
                self.notes.pop(key, None)
                if loser[:2] != winner[:2]:
                    self.notes[key] = (
                        f"{loser.subnet} of {format_ip(loser.public_ip)} begins where {winner.subnet} of "
                        f"{format_ip(winner.public_ip)} does, which was written later and counts"
                    )
        return subnets
