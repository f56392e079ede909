"""Leases: what a host publishes about itself, and the table of everybody's.

The JSON and key codecs live in ``lease_codec.py``; nothing here knows about etcd or Kubernetes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from flanneld.model.addr import IP, Prefix, format_ip


class LeaseAttrs(NamedTuple):
    """The value a host publishes for its subnet (contract 3.16), in decoded form."""

    public_ip: IP | None
    """IPv4 address peers send to; None without IPv4 (written as ``0.0.0.0``, contract 3.16)."""
    public_ip6: IP | None = None
    backend_type: str = ""
    """``vxlan``, ``host-gw``, …; empty for udp and alloc (contract 3.17)."""
    data: bytes = b""
    """``BackendData`` as raw JSON; empty = absent. Decoded by the backend it belongs to."""
    data6: bytes = b""
    """``BackendV6Data`` as raw JSON; empty = absent."""
    identity: str = ""
    """Who wrote it: our ``FlanneldID`` field, empty in what Go flanneld wrote."""

    def where(self) -> str:
        """The public addresses as text, for sentences."""
        return "+".join(format_ip(ip) for ip in (self.public_ip, self.public_ip6) if ip) or "nowhere"


class Lease(NamedTuple):
    """One subnet and who holds it."""

    subnet: Prefix | None
    """IPv4 subnet, host bits as written in the key (contract 3.13); None on IPv6-only networks."""
    subnet6: Prefix | None
    attrs: LeaseAttrs
    revision: int = 0
    """Store revision at which the key was last written (etcd ``mod_revision``)."""
    ttl_id: int = 0
    """The etcd lease that the key is attached to; 0 = none, a reservation (contract 3.40)."""
    created: int = 0
    """When the key was first written, since it was last absent: store revision, or seconds; 0 = unknown."""

    def name(self) -> str:
        """Subnets as text, for sentences: ``10.5.2.0/24`` or ``10.5.2.0/24+fd00::/64``."""
        return "+".join(str(p) for p in (self.subnet, self.subnet6) if p)


class LeaseTable:
    """All leases of the network, keyed as in the store, kept current in place by one source.

    Readers iterate over it between two awaits, so they always see one consistent state. Nothing may
    be deleted from the kernel before ``complete`` (style section 1, rule 6); what to put there is known as
    soon as ``usable``.
    """

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._changed: set[str] = set()
        self.complete = False
        """Whether a whole snapshot has been seen since start."""
        self.usable = False
        """Whether there are leases to work with: listed, or remembered from an earlier run."""
        self.revision = 0
        """Store revision up to which the table is current."""

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, key: str) -> Lease | None:
        """The lease stored under a key, or None."""
        return self._leases.get(key)

    def items(self) -> Iterator[tuple[str, Lease]]:
        """Pairs of key and lease."""
        return iter(self._leases.items())

    @property
    def by_key(self) -> Mapping[str, Lease]:
        """All leases by key, to be read only."""
        return self._leases

    def take_changes(self) -> set[str]:
        """Keys whose lease came, changed or went since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def put(self, key: str, lease: Lease) -> bool:
        """Add or replace one lease; tells whether peers can notice (anything but revision and TTL)."""
        old = self._leases.get(key)
        self._leases[key] = lease
        if old is not None and _is_same(old, lease):
            return False
        self._changed.add(key)
        return True

    def drop(self, key: str) -> bool:
        """Remove one lease; tells whether it was there."""
        self._changed.add(key)
        return self._leases.pop(key, None) is not None

    def replace_all(self, leases: dict[str, Lease], revision: int) -> bool:
        """Take a whole snapshot; tells whether anything differs from before, and marks ``complete``."""
        old = self._leases
        different = {key for key, lease in leases.items() if (was := old.get(key)) is None or not _is_same(was, lease)}
        different.update(old.keys() - leases.keys())
        changed = bool(different) or not self.complete
        self._changed |= different
        self._leases = leases
        self.revision = revision
        self.complete = self.usable = True
        return changed

    def restore(self, leases: dict[str, Lease]) -> None:
        """Take what an earlier run remembered, for as long as the store is away; not after a listing."""
        self._leases = leases
        self._changed.update(leases)
        self.usable = True


def _is_same(old: Lease, new: Lease) -> bool:
    """Whether nobody needs to be told: a renewal changes revision and TTL only."""
    return old[:3] == new[:3] and old.created == new.created


class OwnLease(NamedTuple):
    """Our own claim as last confirmed by the store."""

    key: str
    lease: Lease
    expires: float | None
    """When it runs out, in seconds since boot with sleep included (CLOCK_BOOTTIME); None for a reservation."""


class Claim(NamedTuple):
    """What we ask the store for."""

    attrs: LeaseAttrs
    """Our value, complete (contract 13.3); ``attrs.identity`` is this machine's."""
    previous: tuple[Prefix | None, Prefix | None]
    """Subnets (IPv4, IPv6) from subnet.env or the state directory; (None, None) = none known."""
    in_use: bool = False
    """Containers use the previous subnets at this moment: when others have them, say so before leasing new ones."""
    lost: frozenset[str] = frozenset()
    """Keys that another host took from us; never ours again by identity alone."""


Changed = Callable[[str], None]
"""Called with a reason after the table or our own lease changed."""
