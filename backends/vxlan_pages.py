"""Which peers of one family are in the kernel's tables, and what a miss is answered with. Pure.

The kernel's tables are a cache of the lease store and a miss is a page fault (design/misses.md). A peer
that is paged in is *resident*: its forwarding entry, neighbour and route are part of the desired
state. Space that nobody leases is answered a whole block at a time with an unreachable route, so that a
scan costs one entry for each gap between leases and not one for each address.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from heapq import nsmallest

from backends.vxlan import Overlay, Peer
from flanneld.model.addr import IP, MAC, Prefix, format_ip, format_mac
from flanneld.model.objects import METRIC_VOID, PROTO_OURS, Fdb, KernelObject, Neighbour, Route, RouteKind
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb

MAX_VOIDS = 4096
"""Unreachable blocks kept at a time; beyond, the oldest makes room. Bounds what a scan can leave behind."""

_NEVER = 1 << 63
"""Later than any revision of a store."""

REFUSED = MAC(b"")
"""A neighbour with this MAC tells the kernel to give the address up (``kernel/neigh_codec.py``)."""


class Pages:
    """Residents and voids of one family; keeps its part of ``desired`` current."""

    def __init__(self, overlay: Overlay, desired: State, page_ahead: int) -> None:
        self.overlay = overlay
        self.page_ahead = page_ahead
        self.peers: dict[Prefix, Peer] = {}
        """Peers that can be served, by subnet."""
        self.resident: dict[Prefix, tuple[KernelObject, ...]] = {}
        """Peers in the tables, with their entries in writing order."""
        self.notes: dict[Prefix, str] = {}
        """Peers that cannot be served beside another, and why."""
        self._desired = desired
        self._claims: dict[Prefix, Peer] = {}
        self._by_mac: dict[MAC, tuple[Prefix, ...]] = {}
        self._waiting: dict[Prefix, None] = {}
        """Peers not in the tables; an ordered set."""
        self._direct: Mapping[IP, str] = {}
        self._mac_users: Counter[MAC] = Counter()
        self._length_users: Counter[int] = Counter()
        self._lengths: tuple[int, ...] = ()
        self._voids: dict[Prefix, None] = {}
        self._unserved: Collection[Prefix] = ()
        self._space: _Space | None = None

    # ---- leases -------------------------------------------------------------------------------

    def settle(self, peers: Mapping[Prefix, Peer], unserved: Collection[Prefix], direct: Mapping[IP, str]) -> None:
        """Take all present leases.

        Args:
            peers: all peers by subnet.
            unserved: leased subnets that this backend cannot reach.
            direct: interface by public address, for peers that need no tunnel.
        """
        gone: dict[Prefix, Peer | None] = {subnet: None for subnet in self._claims if subnet not in peers}
        self.update({**gone, **peers}, unserved, direct)

    def update(
        self, changes: Mapping[Prefix, Peer | None], unserved: Collection[Prefix], direct: Mapping[IP, str]
    ) -> None:
        """Take changed peers (None = gone): page out who is gone, refresh who is in the tables."""
        before, self._direct = self._direct, direct
        self._unserved, self._space = unserved, None
        macs: dict[MAC, None] = {}
        for subnet, peer in changes.items():
            old = self._claims.get(subnet)
            if old == peer:
                continue
            if old is not None:
                self._by_mac[old.mac] = tuple(s for s in self._by_mac[old.mac] if s != subnet)
                macs[old.mac] = None
            if peer is None:
                del self._claims[subnet]
                self._refuse_peer(subnet)
            else:
                self._claims[subnet] = peer
                self._by_mac[peer.mac] = (*self._by_mac.get(peer.mac, ()), subnet)
                macs[peer.mac] = None
        for mac in macs:
            self._elect(mac)
        if direct is not before:
            self._reroute({ip for ip in direct.keys() | before.keys() if direct.get(ip) != before.get(ip)})
        for void in [v for v in self._voids if v in changes or not self._is_void(v)] if self._voids else ():
            self._drop_void(void)

    def direct_with(self, more: Mapping[IP, str]) -> Mapping[IP, str]:
        """Today's direct peers with some looked up again: the same object when nothing differs."""
        return {**self._direct, **more} if more else self._direct

    def _elect(self, mac: MAC) -> None:
        """Of hosts with one MAC only one can work."""
        holders = [self._claims[subnet] for subnet in self._by_mac[mac]]
        if not holders:
            del self._by_mac[mac]
            return
        winner = _rightful(holders)
        for peer in holders:
            if peer.public_ip == winner.public_ip:
                self.notes.pop(peer.subnet, None)
                self._accept_peer(peer)
                continue
            self._refuse_peer(peer.subnet)
            self.notes[peer.subnet] = (
                f"lease {peer.subnet} of {format_ip(peer.public_ip)} has the VtepMAC {format_mac(mac)} of lease "
                f"{winner.subnet} of {format_ip(winner.public_ip)}: not used"
            )

    def _accept_peer(self, peer: Peer) -> None:
        subnet = peer.subnet
        if subnet not in self.peers:
            self._count_length(subnet.length, 1)
        self.peers[subnet] = peer
        if subnet in self.resident or self._direct.get(peer.public_ip):
            self._load(subnet)
        else:
            self._waiting[subnet] = None

    def _refuse_peer(self, subnet: Prefix) -> None:
        self.notes.pop(subnet, None)
        if self.peers.pop(subnet, None) is not None:
            self._count_length(subnet.length, -1)
        if subnet in self.resident:
            self._unload(subnet)
        self._waiting.pop(subnet, None)

    def _count_length(self, length: int, by: int) -> None:
        self._length_users[length] += by
        if self._length_users[length] in (0, 1):
            self._lengths = tuple(sorted((n for n, users in self._length_users.items() if users), reverse=True))

    def _reroute(self, addresses: Collection[IP]) -> None:
        """The underlay's routes changed: peers of these addresses may be direct now, or not any more."""
        for subnet, peer in self.peers.items() if addresses else ():
            if peer.public_ip in addresses and (subnet in self.resident or self._direct.get(peer.public_ip)):
                self._load(subnet)

    def adopt(self, observed: State) -> None:
        """Take peers that are in the tables already for residents, so that a restart changes nothing."""
        there = {route.dst for route in observed.routes} | {
            n.ip for n in observed.neighbours.values() if n.permanent and n.link == self.overlay.device
        }
        for subnet in self.peers:
            if subnet in there or subnet.ip in there:
                self._load(subnet)

    def fill(self) -> None:
        """Page in ahead of need, up to the bound; the same choice whatever the order of leases."""
        room = self.page_ahead - len(self.resident)
        if room <= 0 or not self._waiting:
            return
        for subnet in list(self._waiting) if len(self._waiting) <= room else nsmallest(room, self._waiting):
            self._load(subnet)

    def _load(self, subnet: Prefix) -> tuple[KernelObject, ...]:
        peer = self.peers[subnet]
        objects = self.overlay.peer_objects(peer, self._direct.get(peer.public_ip, ""))
        old = self.resident.get(subnet)
        if old == objects:
            return objects
        if old:
            self._unload(subnet)
        self.resident[subnet] = objects
        self._waiting.pop(subnet, None)
        for obj in objects:
            self._desired.add(obj)
            if isinstance(obj, Fdb):
                self._mac_users[obj.mac] += 1
        return objects

    def _unload(self, subnet: Prefix) -> tuple[KernelObject, ...]:
        """Take a peer out; returns what may go, in deleting order (a MAC's entry stays while another needs it)."""
        gone = []
        for obj in reversed(self.resident.pop(subnet)):
            if isinstance(obj, Fdb):
                self._mac_users[obj.mac] -= 1
                if self._mac_users[obj.mac]:
                    continue
                del self._mac_users[obj.mac]
            self._desired.discard(obj)
            gone.append(obj)
        if subnet in self.peers:
            self._waiting[subnet] = None
        return tuple(gone)

    def reload(self, overlay: Overlay) -> None:
        """Take a changed device (MTU, address, name of the underlay); residents stay."""
        self.overlay = overlay
        for subnet in list(self.resident):
            self._load(subnet)

    # ---- misses -------------------------------------------------------------------------------

    def find(self, ip: IP) -> Peer | None:
        """The peer whose subnet holds an address; the longest prefix wins."""
        value, bits = int.from_bytes(ip, "big"), len(ip) * 8
        for length in self._lengths:
            shift = bits - length
            peer = self.peers.get(Prefix(IP((value >> shift << shift).to_bytes(len(ip), "big")), length))
            if peer is not None:
                return peer
        return None

    def is_unknown(self, ip: IP) -> bool:
        """Whether an address is in the network, but in nobody's subnet that we know of, and not in our own."""
        overlay = self.overlay
        if not overlay.network.covers(ip) or overlay.subnet.covers(ip) or self.find(ip) is not None:
            return False
        return not any(subnet.covers(ip) for subnet in self._unserved)

    def answer_ip(self, ip: IP) -> list[Op]:
        """What to write when the kernel asks for an address on our device, in this order.

        Forwarding entry first: a neighbour without one drops packets, an unanswered miss only keeps
        them. The missed address comes last, when the way it opens is complete.
        """
        peer = self.find(ip)
        if peer is None:
            return self._refuse(ip)
        ops = [Op(Verb.PUT, obj) for obj in self._load(peer.subnet)]
        if self._direct.get(peer.public_ip):
            # The route now avoids the tunnel; what already waits in it still has to get out.
            ops.append(Op(Verb.PUT, Fdb(self.overlay.device, peer.mac, peer.public_ip)))
        if ip != peer.subnet.ip or self._direct.get(peer.public_ip):
            ops.append(Op(Verb.PUT, Neighbour(self.overlay.device, ip, peer.mac, permanent=False)))
        return ops

    def answer_mac(self, mac: MAC) -> list[Op]:
        """What to write when the kernel has a frame for a MAC without forwarding entry: repair only."""
        served = [subnet for subnet in self._by_mac.get(mac, ()) if subnet in self.peers]
        return [Op(Verb.PUT, obj) for subnet in served[:1] for obj in self._load(subnet) if isinstance(obj, Fdb)]

    def _refuse(self, ip: IP) -> list[Op]:
        ops = []
        block = self._space_now().gap(ip)
        if block is not None:
            if block not in self._voids and len(self._voids) >= MAX_VOIDS:
                oldest = next(iter(self._voids))
                ops.append(Op(Verb.DELETE, _void_route(oldest)))
                self._drop_void(oldest)
            self._voids[block] = None
            self._desired.add(_void_route(block))
            ops.append(Op(Verb.PUT, _void_route(block)))
        ops.append(Op(Verb.PUT, Neighbour(self.overlay.device, ip, REFUSED, permanent=False)))
        return ops

    def answer_is_right(self, entry: Neighbour) -> bool:
        """Whether an entry that once answered a miss may stay."""
        peer = self.find(entry.ip)
        return peer is not None and peer.mac == entry.mac and not self._direct.get(peer.public_ip)

    # ---- free space ---------------------------------------------------------------------------

    def _space_now(self) -> _Space:
        if self._space is None:
            self._space = _Space(self.overlay.network, self.overlay.subnet, self.peers)
        return self._space

    def _is_void(self, block: Prefix) -> bool:
        return self._space_now().is_free(block)

    def _drop_void(self, block: Prefix) -> None:
        del self._voids[block]
        self._desired.discard(_void_route(block))

    # ---- idle peers ---------------------------------------------------------------------------

    def page_out(self, idle_s: Mapping[MAC, float], limit_s: float, answered: Iterable[Neighbour]) -> list[Op]:
        """Take the longest idle peers out, down to the bound; the reverse of paging in.

        Args:
            idle_s: seconds since a packet last used each forwarding entry (the kernel's own clock).
            limit_s: peers used within this time stay, even above the bound.
            answered: present non-permanent neighbours; those of a peer that goes must go before its
                forwarding entry, or packets would be dropped instead of asked about.
        """
        tunnelled = {s: objs[0].mac for s, objs in self.resident.items() if isinstance(objs[0], Fdb)}
        surplus = len(tunnelled) - self.page_ahead
        if surplus <= 0:
            return []
        idle = [(idle_s[mac], s) for s, mac in tunnelled.items() if idle_s.get(mac, 0.0) >= limit_s]
        chosen = {s for _idle, s in sorted(idle, reverse=True)[:surplus]}
        old_answers: dict[Prefix, list[Neighbour]] = {}
        for entry in answered:
            peer = self.find(entry.ip)
            if peer is not None and peer.subnet in chosen:
                old_answers.setdefault(peer.subnet, []).append(entry)
        ops = []
        for subnet in sorted(chosen):
            route, *rest = self._unload(subnet)
            ops += [Op(Verb.DELETE, obj) for obj in (route, *old_answers.get(subnet, ()), *rest)]
        return ops


def _rightful(holders: Collection[Peer]) -> Peer:
    """Whose a MAC is: the machine's that signed a lease with it first, at the place that it wrote down last.

    A host that moved keeps its MAC and leaves a lease behind that nobody renews. Where nobody signed, Go flanneld's
    way is all that is left: the lease that was written last.
    """
    signed = [peer for peer in holders if peer.identity]
    if signed:
        first = min(signed, key=lambda p: (p.created or _NEVER, p.subnet))
        holders = [peer for peer in signed if peer.identity == first.identity]
    return max(holders, key=lambda p: (p.revision, p.subnet))


def _void_route(block: Prefix) -> Route:
    return Route(block, "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=METRIC_VOID)


class _Space:
    """The gaps between peers, for look-up by address. A leased subnet that we cannot reach is a gap as well."""

    def __init__(self, network: Prefix, own: Prefix, peers: Iterable[Prefix]) -> None:
        self._network, self._own = network, own
        spans = sorted((block.first, block.last) for block in (own, *peers))
        self._starts = [first for first, _last in spans]
        self._ends: list[int] = []
        highest = -1
        for _first, last in spans:  # running maximum: spans may be nested
            highest = max(highest, last)
            self._ends.append(highest)

    def is_free(self, block: Prefix) -> bool:
        """Whether a block may be refused as a whole: no peer's, or ours, whose bridge has a better route."""
        if block == self._own:
            return True
        if not self._network.covers(block):
            return False
        at = bisect_right(self._starts, block.last) - 1
        return at < 0 or self._ends[at] < block.first

    def gap(self, ip: IP) -> Prefix | None:
        """The largest aligned block around an address that reaches no peer; None outside the network."""
        if not self._network.covers(ip):
            return None
        for length in range(self._network.length + 1, len(ip) * 8 + 1):
            block = Prefix(ip, length).masked()
            if self.is_free(block):
                return block
        return None
