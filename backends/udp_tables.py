"""The maps that the udp backend's programs read, kept equal to a set of peers; and what they count.

The peer map is a hash of masked addresses while all subnets have one length, as flannel's have, because that look-up
is nine times quicker than a trie's; a trie otherwise. When the peers no longer fit (another length, more than the map
holds), there are new tables and new programs, swapped without a gap.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Set
from typing import NamedTuple

from backends.udp_packet import UdpPeer
from backends.udp_programs import COUNTER_BYTES, FLAG_COMPAT, FLAG_LEAVE, PEER, SEAL_AT, Count
from flanneld.kernel.bpf import Loaded, Map, MapKind
from flanneld.model.addr import IP, Prefix

SMALLEST = 1024
"""Entries of the smallest tables. Memory is taken as entries come, so only the buckets cost: 16 KiB."""
COUNTERS_NAME = "flannel_counts"
_WORD, _WORDS = struct.Struct("=I"), struct.Struct("=II")
_SOURCE_VALUE = b"\x01\0\0\0"


class Shape(NamedTuple):
    """What the peer map must be like; it is part of the programs."""

    prefix_length: int | None
    """Of all subnets; None: they differ."""
    entries: int

    @staticmethod
    def of(peers: Mapping[Prefix, UdpPeer], usual_length: int) -> Shape:
        """The shape that these peers need, with room to grow."""
        lengths = _lengths(peers) or {usual_length}
        entries = max(SMALLEST, 1 << len(peers).bit_length())
        return Shape(lengths.pop() if len(lengths) == 1 else None, entries)

    def fits(self, peers: Mapping[Prefix, UdpPeer]) -> bool:
        """Whether tables of this shape can take these peers; fewer always fit."""
        one_length = self.prefix_length is None or _lengths(peers) <= {self.prefix_length}
        return one_length and len(peers) <= self.entries


class Tables:
    """The maps of one generation of programs.

    Args:
        shape: of the peer map.

    Raises:
        KernelError: the kernel refuses the maps.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        trie = shape.prefix_length is None
        kind = MapKind.LPM_TRIE if trie else MapKind.HASH
        room = 2 * shape.entries  # the new ones go in before the old ones go out
        self.peers = Map.create(kind, 8 if trie else 4, PEER.size, room, "flannel_peers")
        try:
            self.sources = Map.create(MapKind.HASH, 4, 4, room, "flannel_sources")
        except BaseException:
            self.peers.close()
            raise
        self._peers: dict[Prefix, UdpPeer] = {}
        self._left: Set[IP] = frozenset()
        self._sources: Set[bytes] = frozenset()
        self._uncertain = False
        """Whether a write failed half-way, so that only the kernel knows what is in."""
        self._right: object = None
        """Both maps, byte by byte, when they were found right last; None when they have been written since."""

    def close(self) -> None:
        """Let go of the maps; attached programs keep them."""
        self.peers.close()
        self.sources.close()

    def apply(self, wanted: Mapping[Prefix, UdpPeer], left: Set[IP] = frozenset()) -> int:
        """Make the maps equal to these peers, writing only what differs, which is found out quickly.

        A new source is accepted before anything is sent to it, and an old one until nothing is any more.

        Args:
            wanted: the peers; of IPv4, others are left out.
            left: addresses of those to which the pump sends.

        Returns:
            How many entries were written or removed.

        Raises:
            KernelError: refused; what was written stays, and the next call writes all that differs again.
        """
        fresh, gone = _difference({} if self._uncertain else self._peers, wanted)
        if moved := self._left ^ left:
            fresh |= {subnet: peer for subnet, peer in wanted.items() if peer.ip in moved}
        put, out = (
            entries(fresh, self.shape, left),
            {_key(subnet, self.shape) for subnet in gone if len(subnet.ip) == 4},
        )
        if self._uncertain:
            out, self._sources = set(self.peers.keys()), set(self.sources.keys())
        if out:  # subnets written with host bits may share a key, and then it stays
            everything = entries(wanted, self.shape, left)
            put |= {key: everything[key] for key in out & everything.keys()}
            out -= everything.keys()
        sources = {bytes(peer.ip) for peer in wanted.values() if len(peer.ip) == 4}
        come, go = sources - self._sources, self._sources - sources
        if self._uncertain:  # what has no place any more may be what filled the maps
            self.peers.delete(out)
            self.sources.delete(go)
        self._uncertain, self._right = True, None
        self.sources.update(dict.fromkeys(come, _SOURCE_VALUE))
        self.peers.update(put)
        self.peers.delete(out)
        self.sources.delete(go)
        self._uncertain = False
        self._peers, self._left, self._sources = dict(wanted), frozenset(left), sources
        return len(put) + len(out) + len(come) + len(go)

    def is_filled(self) -> bool:
        """Whether the maps are as they were written; costs two system calls and a comparison while they are.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        if self._uncertain:
            return True  # the next ``apply`` puts everything right
        present = self.sources.dump(), self.peers.dump()
        if present == self._right:
            return True
        right = all(table.items() == wanted for table, wanted in self._wanted())
        self._right = present if right else None
        return right

    def mend(self) -> int:
        """Put right what somebody else wrote into the maps or deleted from them.

        Returns:
            How many entries were wrong.

        Raises:
            KernelError: refused.
        """
        if self._uncertain:
            return 0
        wrong = 0
        for table, right in self._wanted():
            found = table.items()
            put = {key: value for key, value in right.items() if found.get(key) != value}
            out = found.keys() - right.keys()
            table.delete(out)
            table.update(put)
            wrong += len(put) + len(out)
        return wrong

    def _wanted(self) -> tuple[tuple[Map, dict[bytes, bytes]], ...]:
        sources = dict.fromkeys(self._sources, _SOURCE_VALUE)
        return (self.sources, sources), (self.peers, entries(self._peers, self.shape, self._left))


def entries(peers: Mapping[Prefix, UdpPeer], shape: Shape, left: Set[IP] = frozenset()) -> dict[bytes, bytes]:
    """The peer map's contents; other families are left out, host bits do not matter (contract 3.13)."""
    result: dict[bytes, bytes] = {}
    for subnet, peer in peers.items():
        if len(subnet.ip) == len(peer.ip) == 4:
            flags = (0 if peer.kernel_rx else FLAG_COMPAT) | (FLAG_LEAVE if peer.ip in left else 0)
            key = _key(subnet, shape)
            value = PEER.pack(peer.ip, peer.port.to_bytes(2, "big"), flags, 0)
            result[key] = value[:SEAL_AT] + _seal(key, value)
    return result


def _seal(key: bytes, value: bytes) -> bytes:
    """What shows a program that an entry is whole; ``udp_encap`` computes the same.

    Of a trie it knows what it looked for, but not the key that it found.
    """
    address, rest = _WORDS.unpack_from(value)
    [where] = _WORD.unpack(key) if len(key) == _WORD.size else (0,)
    return _WORD.pack((address + where & 0xFFFFFFFF) ^ rest)


def _key(subnet: Prefix, shape: Shape) -> bytes:
    host_bits = int.from_bytes(subnet.ip, "big") & (1 << 32 - subnet.length) - 1
    address = bytes(subnet.masked().ip if host_bits else subnet.ip)
    return struct.pack("=I", subnet.length) + address if shape.prefix_length is None else address


def _difference(
    old: Mapping[Prefix, UdpPeer], new: Mapping[Prefix, UdpPeer]
) -> tuple[dict[Prefix, UdpPeer], list[Prefix]]:
    """What is new or changed, and what is gone. Most peers are the very objects of last time, which is quick to see."""
    fresh = {subnet: peer for subnet, peer in new.items() if (was := old.get(subnet)) is not peer and was != peer}
    added = sum(subnet not in old for subnet in fresh)
    gone = [subnet for subnet in old if subnet not in new] if len(old) + added > len(new) else []
    return fresh, gone


def _lengths(peers: Mapping[Prefix, UdpPeer]) -> set[int]:
    return {subnet.length for subnet in peers if len(subnet.ip) == 4}


def make_counters() -> Map:
    """A fresh counter map.

    Raises:
        KernelError: the kernel refuses it.
    """
    return Map.create(MapKind.PERCPU_ARRAY, 4, COUNTER_BYTES, len(Count), COUNTERS_NAME)


def counters_of(program: Loaded) -> Map | None:
    """The counter map of a program that runs already, if it is like ours: counts outlive a restart."""
    found = None
    for number in program.info().map_ids:
        candidate = Map.by_id(number)
        alike = candidate.kind == MapKind.PERCPU_ARRAY and candidate.name == COUNTERS_NAME
        if found is None and alike and (candidate.value_bytes, candidate.entries) == (COUNTER_BYTES, len(Count)):
            found = candidate
        else:
            candidate.close()
    return found


def totals(counters: Map) -> dict[str, int]:
    """What was counted, by the names that every rung uses.

    Packets left to the socket or the TUN are not dropped: the pump counts what becomes of them.
    """
    by = dict(zip(Count, counters.sums(), strict=True))
    return {
        "tx_packets": by[Count.TX][0],
        "tx_bytes": by[Count.TX][1],
        "rx_packets": by[Count.RX][0],
        "rx_bytes": by[Count.RX][1],
        "drop_ttl": by[Count.TX_EXPIRED][0] + by[Count.RX_EXPIRED][0],
        "tx_errors": by[Count.TX_ERROR][0],
        "rx_errors": by[Count.RX_ERROR][0],
        "tx_compat": by[Count.TX_COMPAT][0],
        "tx_left": by[Count.TX_LEFT][0],
        "rx_split": by[Count.RX_SPLIT][0],
        "rx_left": by[Count.RX_LEFT][0],
        "rx_left_unknown_source": by[Count.RX_STRANGER][0],
    }
