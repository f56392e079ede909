"""The udp backend's data path as eBPF: flannel's wire format without user space (contract 6.50 to 6.52).

Two programs. ``encap`` stands where packets leave through the TUN: it puts the outer headers in front and gives the
packet to the external interface. ``decap`` stands where packets come in from the external interface: it takes the
outer headers off and gives the packet to the TUN, as if it had been read from a socket and written there. Whatever a
program does not understand it leaves alone (``TC_ACT_UNSPEC``): the packet goes its ordinary way, which ends at the
pump. So a program only ever needs to be right about what it takes. What it does to a byte is held against the pump
by ``tests/support/golden_packets.py``. This module writes programs; loading them is ``udp_fast.py``'s.

**The checksum trap.** A local TCP or UDP packet has no transport checksum yet: a network card shall fill it in. Over a
virtual link nobody does; a kernel that receives it knows, a program that reads a socket gets the unfinished bytes,
and TCP to a Go peer is dead while ping works. So ``encap`` sends directly only to peers that announced a kernel
receive path. All else goes through a pair of veth without offloads, where the kernel finishes it in software, and a
second ``encap`` stands at the far end: *compat transmit*. Super-packets that are not TCP go there too, because
kernels refuse to segment UDP inside UDP (seen on 6.18).

Multi-byte header fields are compared as they lie in memory, so their constants are turned by ``_lies``. Helper
semantics and ``struct __sk_buff``: include/uapi/linux/bpf.h, net/core/filter.c.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import Final, NamedTuple

from flanneld.kernel.bpfasm import Helper, Program, Reg
from flanneld.model.addr import IP

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT = -1, 2, 7
BPF_F_INGRESS = 1
ADJ_ROOM_MAC = 1
CSUM_LEVEL_QUERY = 0
FIXED_GSO, ENCAP_L3_IPV4, ENCAP_L4_UDP = 1 << 0, 1 << 1, 1 << 4
_SKB_LEN, _SKB_PKT_TYPE, _SKB_GSO_SEGS, _SKB_GSO_SIZE = 0, 4, 164, 176

ETHERNET, IPV4, UDP = 14, 20, 8
OVERHEAD: Final = IPV4 + UDP
_TCP, _UDP = 6, 17
_MAX_IP: Final = 65535
_OUTER_TTL: Final = 64

PEER = struct.Struct("=4s2sH")
"""Value of the peer map: public address and port in network order, flags."""
FLAG_COMPAT: Final = 1
"""It reads a socket, so checksums must be finished."""
FLAG_LEAVE: Final = 2
"""It is not reached through the external interface; the pump, which asks the routing table, sends to it."""
COUNTER_BYTES: Final = 16
"""Value of the counter map: packets (segments of super-packets counted singly), and bytes of inner packets."""


class Count(IntEnum):
    """Index into the counter map: what became of a packet."""

    TX = 0
    TX_COMPAT = 1
    """Sent to be finished in software; counted again as TX when it comes out."""
    TX_LEFT = 2
    TX_EXPIRED = 3
    TX_ERROR = 4
    RX = 5
    RX_LEFT = 6
    RX_STRANGER = 7
    RX_EXPIRED = 8
    RX_ERROR = 9
    RX_SPLIT = 10
    """Sent to be split into datagrams or finished; they are counted again as RX when they come out."""


class Encap(NamedTuple):
    """What an ``encap`` program is made of. Descriptors are those of this process, indexes those of this host."""

    peers_fd: int
    counters_fd: int
    ext_ip: IP
    ext_ifindex: int
    port: int
    prefix_length: int | None
    """Of all peers' subnets: the peer map is a hash of masked addresses. None: they differ, and it is a trie."""
    compat_ifindex: int = 0
    """Where packets go that must be finished in software. 0: this *is* the far end of it."""
    compat_always: bool = False
    hash_source_port: bool = False
    """Derive the source port from the flow, so that a receiver's network card spreads load; flannel's is fixed."""


class Decap(NamedTuple):
    """What a ``decap`` program is made of."""

    sources_fd: int
    counters_fd: int
    ext_ip: IP
    port: int
    tun_ifindex: int
    link_header: int
    """Bytes in front of the IP header on the external interface: 14, or 0 where there is no Ethernet."""
    split_ifindex: int = 0
    """Where aggregates of several datagrams go, and unfinished ones. 0: they are left to the socket."""
    far_end: bool = False
    """This *is* where they come out: nobody behind it reads what the program leaves."""


# ---- transmit --------------------------------------------------------------------------------------

# Stack of encap, from its end. The new headers lie right in front of the inner one, so one store writes them
# together with the inner header's TTL and checksum.
_INNER: Final = -24
_OUTER: Final = _INNER - OVERHEAD - ETHERNET
_OUTER_IP, _OUTER_UDP = _OUTER + ETHERNET, _OUTER + ETHERNET + IPV4
_KEY, _INDEX, _SEGMENTS = -80, -84, -88
_REWRITTEN: Final = ETHERNET + OVERHEAD + 12  # up to and with the inner header's checksum


def encap(name: str, spec: Encap) -> Program:
    """The program for packets that leave through the TUN, or that come out of the compat pair finished.

    Registers: R6 packet, R7 peer, later the counter, R8 inner bytes, R9 hash of the flow, later the verdict.
    """
    p = Program(name)
    at_tun = spec.compat_ifindex != 0
    link_header = 0 if at_tun else ETHERNET
    p.copy(R6, R1)
    _measure(p, link_header)
    p.note("the inner header")
    _load_bytes(p, link_header, _INNER, IPV4)
    p.branch(R0, "!=", 0, "leave")
    p.load(R2, FP, _INNER, 8)
    p.compute(R2, ">>", 4)
    p.branch(R2, "!=", 4, "leave")
    _find_peer(p, spec)
    p.note("TTL: the last hop is no hop (contract 6.52)")
    p.load(R2, FP, _INNER + 8, 8)
    p.branch(R2, "<=", 1, "expired")
    if not (at_tun and spec.compat_always):
        if at_tun:
            _choose_compat(p)
        _send_direct(p, spec, at_tun=at_tun)
    if at_tun:
        _send_compat(p, spec)
    _ending(p, "expired", Count.TX_EXPIRED, TC_ACT_SHOT)
    _ending(p, "broken", Count.TX_ERROR, TC_ACT_SHOT)
    # The pump reads what goes on into the TUN; nobody reads the compat pair.
    _ending(p, "leave", *((Count.TX_LEFT, TC_ACT_UNSPEC) if at_tun else (Count.TX_ERROR, TC_ACT_SHOT)))
    _count(p, spec.counters_fd)
    return p


def _find_peer(p: Program, spec: Encap) -> None:
    p.note("the peer of the destination")
    p.load(R2, FP, _INNER + 16, 32)
    if spec.prefix_length is None:
        p.store(FP, _KEY, 32, 32)
        p.store(FP, _KEY + 4, R2, 32)
    else:
        mask = (0xFFFFFFFF << (32 - spec.prefix_length)) & 0xFFFFFFFF
        p.compute(R2, "&", _lies(mask.to_bytes(4, "big")))
        p.store(FP, _KEY, R2, 32)
    _look_up(p, spec.peers_fd, _KEY)
    p.branch(R0, "==", 0, "leave", bits=64)
    p.copy(R7, R0)
    p.load(R2, R7, 6, 16)
    p.branch(R2, "&", FLAG_LEAVE, "leave")


def _choose_compat(p: Program) -> None:
    p.note("compat: a peer that reads a socket; a super-packet that is not TCP, or too long with headers")
    p.load(R2, R7, 6, 16)
    p.branch(R2, "&", FLAG_COMPAT, "compat")
    p.load(R2, R6, _SKB_GSO_SIZE, 32)
    p.branch(R2, "==", 0, "direct")
    p.load(R2, FP, _INNER + 9, 8)
    p.branch(R2, "!=", _TCP, "compat")
    p.branch(R8, ">", _MAX_IP - OVERHEAD, "compat")
    p.label("direct")


def _send_direct(p: Program, spec: Encap, *, at_tun: bool) -> None:
    _make_room(p, spec, at_tun=at_tun)
    _write_outer(p, spec)
    _take_hop(p, _INNER)
    _store_bytes(p, 0, _OUTER, _REWRITTEN)
    p.branch(R0, "!=", 0, "broken")
    p.note("the kernel finds the neighbour, on the external interface")
    p.set(R1, spec.ext_ifindex)
    for unused in (R2, R3, R4):
        p.set(unused, 0)
    p.call(Helper.REDIRECT_NEIGH)
    p.copy(R9, R0)
    p.set(R7, Count.TX)
    p.goto("count")


def _make_room(p: Program, spec: Encap, *, at_tun: bool) -> None:
    if spec.hash_source_port:
        p.copy(R1, R6)
        p.call(Helper.GET_HASH_RECALC)
        p.copy(R9, R0)
    p.note("room for the outer headers; a super-packet keeps its segment size and knows that it is in a tunnel")
    _adjust_room(p, OVERHEAD, FIXED_GSO | ENCAP_L3_IPV4 | ENCAP_L4_UDP)
    # What is in a tunnel already (a pod's own overlay) is refused here, unchanged, and left to the pump.
    p.branch(R0, "!=", 0, "leave")
    if at_tun:
        p.note("a link-layer header: redirect_neigh wants one to replace")
        p.copy(R1, R6)
        p.set(R2, ETHERNET)
        p.set(R3, 0)
        p.call(Helper.SKB_CHANGE_HEAD)
        p.branch(R0, "!=", 0, "broken")


def _write_outer(p: Program, spec: Encap) -> None:
    """Outer headers as a Go peer's socket makes them: TOS 0, DF, id 0, TTL 64; but no UDP checksum (RFC 768 allows)."""
    p.note("outer headers")
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0x4000, _OUTER_TTL, _UDP, 0, spec.ext_ip, bytes(4))
    p.put(_OUTER, bytes(12) + b"\x08\x00")
    p.put(_OUTER_IP, ip)
    p.put(_OUTER_UDP, struct.pack("!HHHH", spec.port, spec.port, 0, 0))
    p.copy(R2, R8)
    p.compute(R2, "+", OVERHEAD)
    p.network_order(R2, 16)
    p.store(FP, _OUTER_IP + 2, R2, 16)
    p.load(R4, R7, 0, 32)
    p.store(FP, _OUTER_IP + 16, R4, 32)
    p.note("header checksum: the constant part, total length, destination")
    p.set(R3, sum(struct.unpack("=10H", ip)))
    p.compute(R3, "+", R2)
    p.copy(R5, R4)
    p.compute(R5, ">>", 16)
    p.compute(R3, "+", R5)
    p.compute(R4, "&", 0xFFFF)
    p.compute(R3, "+", R4)
    for _twice in range(2):
        p.copy(R4, R3)
        p.compute(R4, ">>", 16)
        p.compute(R3, "&", 0xFFFF)
        p.compute(R3, "+", R4)
    p.compute(R3, "^", 0xFFFF)
    p.store(FP, _OUTER_IP + 10, R3, 16)
    p.note("UDP")
    if spec.hash_source_port:  # 49152 to 65535, as RFC 7348 section 5 has it for the same purpose
        p.copy(R2, R9)
        p.compute(R2, ">>", 16)
        p.compute(R2, "^", R9)
        p.compute(R2, "|", 0xC000)
        p.network_order(R2, 16)
        p.store(FP, _OUTER_UDP, R2, 16)
    p.load(R2, R7, 4, 16)
    p.store(FP, _OUTER_UDP + 2, R2, 16)
    p.copy(R2, R8)
    p.compute(R2, "+", UDP)
    p.network_order(R2, 16)
    p.store(FP, _OUTER_UDP + 4, R2, 16)


def _send_compat(p: Program, spec: Encap) -> None:
    """Into the pair as it is. It gets an Ethernet header to nobody, so that the stack behind the pair ignores it."""
    p.label("compat")
    p.note("compat: into the pair, to be finished in software")
    p.copy(R1, R6)
    p.set(R2, ETHERNET)
    p.set(R3, 0)
    p.call(Helper.SKB_CHANGE_HEAD)
    p.branch(R0, "!=", 0, "broken")
    p.put(_OUTER, bytes(12) + b"\x08\x00")
    _store_bytes(p, 0, _OUTER, ETHERNET)
    p.branch(R0, "!=", 0, "broken")
    p.set(R1, spec.compat_ifindex)
    p.set(R2, 0)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.TX_COMPAT)
    p.goto("count")


# ---- receive ---------------------------------------------------------------------------------------

# Stack of decap. Key, index and segments lie where encap has them.
_RX_INNER: Final = -IPV4
_RX_UDP, _RX_IP = _RX_INNER - UDP, _RX_INNER - UDP - IPV4


def decap(name: str, spec: Decap) -> Program:
    """The program for packets that come in from the external interface.

    What is not for us must cost next to nothing: it is told by a few comparisons and not counted. Of what is for us,
    a fragment or a length that does not add up is left to our socket: the kernel assembles or refuses it there.

    An aggregate of several datagrams (of a sender with UDP_SEGMENT over a virtual link, or of a card with
    ``rx-udp-gro-forwarding``) goes through the compat pair, which splits it, and a second ``decap`` stands at the far
    end. Left to the socket it would be overtaken by the single datagrams around it. So does an unfinished datagram.
    """
    p = Program(name)
    p.copy(R6, R1)
    _measure(p, spec.link_header + OVERHEAD)
    p.note("both headers of an unfragmented datagram to our address and port, with an IPv4 header behind them")
    _load_bytes(p, spec.link_header, _RX_IP, OVERHEAD + IPV4)
    p.branch(R0, "!=", 0, "other")
    for offset, bits, wanted in (
        (_RX_IP, 8, 0x45),
        (_RX_IP + 9, 8, _UDP),
        (_RX_IP + 16, 32, _lies(spec.ext_ip)),
        (_RX_UDP + 2, 16, _lies(spec.port.to_bytes(2, "big"))),
    ):
        p.load(R2, FP, offset, bits)
        p.branch(R2, "!=", wanted, "other")
    if not spec.far_end:  # there the address is another device's
        p.load(R2, R6, _SKB_PKT_TYPE, 32)
        p.branch(R2, "!=", 0, "other")  # PACKET_HOST: not what a promiscuous interface overhears
    p.load(R2, FP, _RX_IP + 6, 16)
    p.branch(R2, "&", _lies(b"\x3f\xff"), "leave")
    p.note("from a peer; anybody else is for the socket, with netfilter in front of it")
    p.load(R2, FP, _RX_IP + 12, 32)
    p.store(FP, _KEY, R2, 32)
    _look_up(p, spec.sources_fd, _KEY)
    p.branch(R0, "==", 0, "stranger", bits=64)
    p.load(R2, FP, _RX_INNER, 8)
    p.compute(R2, ">>", 4)
    p.branch(R2, "!=", 4, "leave")
    p.note("all lengths agree, which is not so for an aggregate of several datagrams")
    for offset, more in ((_RX_IP + 2, OVERHEAD), (_RX_UDP + 4, UDP), (_RX_INNER + 2, 0)):
        p.load(R2, FP, offset, 16)
        p.network_order(R2, 16)
        p.compute(R2, "-", more)
        p.branch(R2, "!=", R8, "lengths_differ")
    if not spec.far_end:
        _refuse_unfinished(p, "pair" if spec.split_ifindex else "leave")
    p.load(R2, FP, _RX_INNER + 8, 8)
    p.branch(R2, "<=", 1, "expired")
    p.note("off with the outer headers, on to the TUN")
    _adjust_room(p, -OVERHEAD, FIXED_GSO)
    p.branch(R0, "!=", 0, "leave")
    _take_hop(p, _RX_INNER)
    # TTL and checksum change by opposite amounts, so a sum over the packet, which the card may have made, stays right.
    _store_bytes(p, spec.link_header + 8, _RX_INNER + 8, 4)
    p.branch(R0, "!=", 0, "broken")
    p.set(R1, spec.tun_ifindex)
    p.set(R2, BPF_F_INGRESS)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.RX)
    p.goto("count")
    p.label("lengths_differ")
    if spec.split_ifindex:
        _split(p, spec)
    p.label("leave")
    p.set(R7, Count.RX_ERROR if spec.far_end else Count.RX_LEFT)
    p.set(R9, TC_ACT_SHOT if spec.far_end else TC_ACT_UNSPEC)
    p.goto("count")
    _ending(p, "expired", Count.RX_EXPIRED, TC_ACT_SHOT)
    _ending(p, "broken", Count.RX_ERROR, TC_ACT_SHOT)
    _ending(p, "stranger", Count.RX_STRANGER, TC_ACT_UNSPEC)
    _count(p, spec.counters_fd)
    p.label("other")
    p.set(R0, TC_ACT_UNSPEC)
    p.exit()
    return p


def _refuse_unfinished(p: Program, elsewhere: str) -> None:
    """Send a datagram elsewhere whose own UDP checksum nobody filled in or looked at.

    A sender with a socket leaves it to hardware too, and over a virtual link it comes unfinished. The kernel keeps
    where the checksum belongs, so without the outer headers that place is wrong: a pod behind us never notices, but
    the kernel drops what it has to fragment again, and a card that forwards it would write into the payload. The
    pair finishes it. Our kernel peers send none, and over a real link the card has checked it, which the kernel
    shows as a checksum level or a sum over the packet.
    """
    p.note("an unfinished outer checksum is finished first: there is one, and no card has vouched for it")
    p.load(R2, FP, _RX_UDP + 6, 16)
    p.branch(R2, "==", 0, "finished")
    for helper, argument in ((Helper.CSUM_LEVEL, CSUM_LEVEL_QUERY), (Helper.CSUM_UPDATE, 0)):
        p.copy(R1, R6)
        p.set(R2, argument)
        p.call(helper)
        p.compute(R0, ">>", 32, bits=64)  # both give 32 bits, or a negative error where the packet has no such thing
        p.branch(R0, "==", 0, "finished")
    p.goto(elsewhere)
    p.label("finished")


def _split(p: Program, spec: Decap) -> None:
    p.note("an aggregate: into the pair, to be split")
    p.load(R2, R6, _SKB_GSO_SIZE, 32)
    p.branch(R2, "==", 0, "leave")
    p.label("pair")
    p.set(R1, spec.split_ifindex)
    p.set(R2, 0)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.RX_SPLIT)
    p.goto("count")


# ---- shared pieces ---------------------------------------------------------------------------------


def _lies(field: bytes) -> int:
    """A header field as the number that a load of its size gives on this machine."""
    return int.from_bytes(field, sys.byteorder)


def _measure(p: Program, in_front: int) -> None:
    """R8 = bytes of the inner packet; how many packets this is on the wire goes to the stack."""
    p.load(R8, R6, _SKB_LEN, 32)
    p.compute(R8, "-", in_front)
    p.load(R2, R6, _SKB_GSO_SEGS, 32)
    p.branch(R2, "!=", 0, "measured")
    p.set(R2, 1)
    p.label("measured")
    p.store(FP, _SEGMENTS, R2, 32)


def _load_bytes(p: Program, offset: int, to: int, size: int) -> None:
    p.copy(R1, R6)
    p.set(R2, offset)
    p.address(R3, FP, to)
    p.set(R4, size)
    p.call(Helper.SKB_LOAD_BYTES)


def _store_bytes(p: Program, offset: int, source: int, size: int) -> None:
    p.copy(R1, R6)
    p.set(R2, offset)
    p.address(R3, FP, source)
    p.set(R4, size)
    p.set(R5, 0)
    p.call(Helper.SKB_STORE_BYTES)


def _adjust_room(p: Program, by: int, flags: int) -> None:
    p.copy(R1, R6)
    p.set(R2, by)
    p.set(R3, ADJ_ROOM_MAC)
    p.set(R4, flags)
    p.call(Helper.SKB_ADJUST_ROOM)


def _look_up(p: Program, map_fd: int, key: int) -> None:
    p.map(R1, map_fd)
    p.address(R2, FP, key)
    p.call(Helper.MAP_LOOKUP)


def _take_hop(p: Program, header: int) -> None:
    """Decrement the TTL of the header on the stack and adjust its checksum by the difference (RFC 1624)."""
    p.note("TTL - 1, checksum + 0x0100 in one's complement")
    p.load(R2, FP, header + 8, 8)
    p.compute(R2, "-", 1)
    p.store(FP, header + 8, R2, 8)
    p.load(R2, FP, header + 10, 16)
    p.compute(R2, "+", _lies(b"\x01\x00"))
    p.branch(R2, "<", 0xFFFF, "no_carry")
    p.compute(R2, "+", 1)
    p.label("no_carry")
    p.store(FP, header + 10, R2, 16)


def _ending(p: Program, label: str, count: Count, verdict: int) -> None:
    p.label(label)
    p.set(R7, count)
    p.set(R9, verdict)
    p.goto("count")


def _count(p: Program, counters_fd: int) -> None:
    """Add to counter R7 and end with verdict R9. Per CPU and with softirqs off, so plain additions are enough."""
    p.label("count")
    p.store(FP, _INDEX, R7, 32)
    _look_up(p, counters_fd, _INDEX)
    p.branch(R0, "==", 0, "counted", bits=64)
    p.load(R2, FP, _SEGMENTS, 32)
    for offset, amount in ((0, R2), (8, R8)):
        p.load(R1, R0, offset, 64)
        p.compute(R1, "+", amount, bits=64)
        p.store(R0, offset, R1, 64)
    p.label("counted")
    p.copy(R0, R9)
    p.exit()
