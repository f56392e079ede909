"""From leases to peers: what each lease means to this host, and which leases mean nothing. Pure.

A lease that cannot be used costs its owner only: it becomes a note, everything else goes on
(contract 11.1 is what happens otherwise). Works lease by lease, so that a change costs what it weighs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from flanneld.model.addr import IP, Family, Prefix, format_ip
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease
from flanneld.model.netconf import NetConf
from flanneld.plan.blocks import Blocks


class Remote(NamedTuple):
    """One peer's claim in one family, sound but for the backend's own data."""

    subnet: Prefix
    """Host bits cleared."""
    public_ip: IP
    data: bytes
    """The backend's raw JSON for this family; empty when absent."""
    revision: int
    """When the lease was last written."""
    created: int = 0
    """When it was first written; 0 = unknown."""
    identity: str = ""
    """Who wrote it; empty in what Go flanneld wrote."""


class Self(NamedTuple):
    """What of ourselves other leases are held against."""

    subnets: tuple[Prefix | None, Prefix | None]
    public_ips: frozenset[IP]
    """All addresses of the external interface, advertised or not."""
    broadcast: IP | None = None
    """That of the external interface."""

    @staticmethod
    def on(ext: ExtIface, subnets: Mapping[Family, Prefix]) -> Self:
        """What we are on an external interface."""
        return Self((subnets.get(Family.V4), subnets.get(Family.V6)), ext.addresses(), ext.broadcast)


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
    problem = _problem(lease, family, public, settings.network, me, backend_type)
    if problem or public is None:
        return Unserved(subnet, f"lease {lease.name()} {problem}: not used")
    data = lease.attrs.data if family is Family.V4 else lease.attrs.data6
    return Remote(subnet, public, data, lease.revision, lease.created, lease.attrs.identity)


def _problem(
    lease: Lease, family: Family, public: IP | None, network: Prefix, me: Self, backend_type: str
) -> str | None:
    """Why a lease cannot be served; None when it can."""
    if lease.attrs.backend_type != backend_type:
        return f"has backend {lease.attrs.backend_type or 'udp'!r}, ours is {backend_type or 'udp'!r}"
    if public is None:
        return f"has no public {family.label} address"
    if public in me.public_ips:
        return f"carries our own public address {format_ip(public)}"
    if not usable_unicast(public) or public == me.broadcast:
        return f"has the unusable public address {format_ip(public)}"
    ours = [ip for ip in me.public_ips if len(ip) == len(public)]
    # a tunnel inside of itself; unless the whole underlay is, which only more specific routes keep working
    if network.covers(public) and not any(network.covers(ip) for ip in ours):
        return f"has the public address {format_ip(public)}, which is inside the network {network} itself"
    if _is_link_local(public) and not any(map(_is_link_local, ours)):
        return f"has the link-local public address {format_ip(public)}, and ours is none"
    return None


def _is_link_local(ip: IP) -> bool:
    """Whether an IPv4 address is good on one segment only (RFC 3927); IPv6 ones are unusable anyway."""
    return len(ip) == 4 and ip[:2] == b"\xa9\xfe"


def usable_unicast(ip: IP) -> bool:
    """Whether packets can be sent to an address over a network: not unspecified, loopback, multicast, reserved.

    Nor an IPv6 link-local one, which means nothing without an interface, nor what is in ::/32: IPv4-mapped
    addresses and the like, which are on no wire.
    """
    if len(ip) == 4:
        return 0 < ip[0] < 224 and ip[0] != 127
    return ip[0] != 0xFF and any(ip[:4]) and not (ip[0] == 0xFE and ip[1] & 0xC0 == 0x80)


class Fold:
    """All leases of one family by subnet, kept current lease by lease.

    Of claims that overlap one counts: one of the network's usual length before others, then the one that was made
    first. Whoever allocates looks for free space (contract 3.22), so a claim that comes later to leased space is a
    mistake or worse, and must not draw away the packets of the host that was there.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.remotes: dict[Prefix, Remote] = {}
        """The claim that counts for each subnet."""
        self.unserved: dict[Prefix, str] = {}
        """Leased subnets out of reach, and why."""
        self.notes: dict[str, str] = {}
        """By key of the lease, why it is not used."""
        self._meanings: dict[str, Remote | Unserved | Outside] = {}
        self._names: dict[Prefix, str | dict[str, None]] = {}
        """Keys by subnet: nearly always one, but ``10.5.1.0-24`` and ``10.5.1.0-24&fd00::-64`` may both exist."""
        self._disputed: dict[Prefix, tuple[str, Remote]] = {}
        """Of subnets that several keys name: which one counts. Whoever may write can name one by thousands of keys."""
        self._blocks = Blocks()
        self._usual_length = 0

    def update(self, changes: Mapping[str, Lease | None], conf: NetConf, me: Self, backend_type: str) -> set[Prefix]:
        """Take changed leases (None = gone); returns the subnets whose peer may be another now."""
        if (settings := conf.family(self.family)) is not None:
            self._usual_length = settings.subnet_len
        touched: dict[Prefix, list[str]] = {}
        for key, lease in changes.items():
            new = meaning(lease, self.family, conf, me, backend_type) if lease is not None else None
            old = self._meanings.get(key)
            if new == old:
                continue
            if new is None:
                del self._meanings[key]
            else:
                self._meanings[key] = new
            for subnet in self._rename(key, old, new):
                touched.setdefault(subnet, []).append(key)
            if isinstance(new, Unserved | Outside):
                self.notes[key] = new.why
            else:
                self.notes.pop(key, None)
        for subnet in touched:
            self._blocks.put(subnet, is_there=subnet in self._names)
        beside = {block for subnet in touched for block in self._blocks.overlapping(subnet)}.difference(touched)
        for subnet, keys in touched.items():
            self._judge(subnet, keys)
        return {*touched, *(subnet for subnet in beside if self._judge(subnet, ()))}

    def _rename(self, key: str, old: Meaning, new: Meaning) -> Iterator[Prefix]:
        """Keep ``_names`` current; a key's subnet never changes, only whether it counts. Yields what is touched."""
        before = old.subnet if isinstance(old, Remote | Unserved) else None
        after = new.subnet if isinstance(new, Remote | Unserved) else None
        if after is not None and before is None:
            there = self._names.setdefault(after, key)
            if isinstance(there, dict):
                there[key] = None
            elif there != key:
                self._names[after] = {there: None, key: None}
        elif before is not None and after is None:
            there = self._names[before]
            if isinstance(there, dict):
                del there[key]
            if not isinstance(there, dict) or not there:
                del self._names[before]
        yield from (subnet for subnet in {before, after} if subnet is not None)

    def _names_of(self, subnet: Prefix) -> Collection[str]:
        names = self._names.get(subnet, ())
        return (names,) if isinstance(names, str) else names

    def _judge(self, subnet: Prefix, changed: Collection[str]) -> bool:
        """Find out which claim to a subnet counts, if any; tells whether that changed.

        Args:
            subnet: claimed or not any more.
            changed: keys whose claims to it are new, others or gone.
        """
        before = self.remotes.pop(subnet, None)
        self.unserved.pop(subnet, None)
        names = self._names_of(subnet)
        claim = self._champion(subnet)
        if len(names) > 1 or subnet in self._disputed:
            self._tell_losers(subnet, names, claim, changed)
        if claim:
            key, winner, rank = claim
            others = map(self._champion, self._blocks.overlapping(subnet))
            rival = next((other for other in others if other and other[2] < rank), None)  # there may be thousands
            self._note(key, (winner, rival[1]) if rival else None)
            if rival is None:
                self.remotes[subnet] = winner
        if subnet not in self.remotes:
            for name in sorted(names):
                if isinstance(unserved := self._meanings[name], Unserved):
                    self.unserved[subnet] = unserved.why
        return before != self.remotes.get(subnet)

    def _tell_losers(
        self, subnet: Prefix, names: Collection[str], claim: _Claim | None, changed: Collection[str]
    ) -> None:
        """Note for claims to exactly one subnet which other one counts: for all when that is another one now."""
        if claim is None or len(names) < 2:
            self._disputed.pop(subnet, None)
            return
        key, winner, _rank = claim
        is_same = self._disputed.get(subnet) == (key, winner)
        self._disputed[subnet] = (key, winner)
        for other in changed if is_same else names:
            loser = self._meanings.get(other)
            if other != key and isinstance(loser, Remote):
                self._note(other, None if _owner(loser) == _owner(winner) else (loser, winner))

    def _champion(self, subnet: Prefix) -> _Claim | None:
        """The claim to exactly this subnet that goes before others to it.

        A host may have written two keys for one subnet, and what it wrote last is right: they rank by the older one.
        """
        names = self._names_of(subnet)
        claims = [(key, claim) for key in names if isinstance(claim := self._meanings[key], Remote)]
        if not claims:
            return None
        first_key, first = min(claims, key=_age) if len(claims) > 1 else claims[0]
        rank = (subnet.length != self._usual_length, first.created or _NEVER, subnet, first_key)
        if len(claims) == 1:
            return first_key, first, rank
        same = [(claim.revision, key, claim) for key, claim in claims if _owner(claim) == _owner(first)]
        _revision, key, claim = max(same)
        return key, claim, rank

    def _note(self, key: str, beaten: tuple[Remote, Remote] | None) -> None:
        if beaten is None:
            self.notes.pop(key, None)
            return
        loser, winner = beaten
        odd = loser.subnet.length != self._usual_length == winner.subnet.length
        self.notes[key] = (
            f"lease {loser.subnet} of {format_ip(loser.public_ip)} overlaps {winner.subnet} of "
            f"{format_ip(winner.public_ip)}, which {'has the usual length' if odd else 'was there before'}: not used"
        )


_NEVER = 1 << 63
"""Later than any revision of a store."""

_Claim = tuple[str, Remote, tuple[bool, int, Prefix, str]]
"""Key, claim and rank; the lowest rank counts."""


def _age(pair: tuple[str, Remote]) -> tuple[int, str]:
    return pair[1].created or _NEVER, pair[0]


def _owner(claim: Remote) -> tuple[IP, str]:
    """Who made a claim, as far as it says; Go flanneld gives no identity."""
    return claim.public_ip, claim.identity
