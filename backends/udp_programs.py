"""The udp backend's data path as eBPF: flannel's wire format without user space (contract 6.50 to 6.52).

Two programs. ``encap`` (``udp_encap.py``) stands where packets leave through the TUN: it puts the outer headers in
front and gives the packet to the external interface. ``decap`` (``udp_decap.py``) stands where packets come in from
the external interface: it takes the outer headers off and gives the packet to the TUN, as if it had been read from a
socket and written there. Whatever a program does not understand it leaves alone (``TC_ACT_UNSPEC``): the packet goes
its ordinary way, which ends at the pump. So a program only ever needs to be right about what it takes. What it does
to a byte is held against the pump by ``tests/support/golden_packets.py``.

Here is what both share; ``udp_fast.py`` loads them. Multi-byte header fields are compared as they lie in memory, so
their constants are turned by ``lies``. Helper semantics and ``struct __sk_buff``: include/uapi/linux/bpf.h,
net/core/filter.c.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import Final

from flanneld.kernel.bpfasm import Helper, Program, Reg

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT = -1, 2, 7
ADJ_ROOM_MAC, FIXED_GSO = 1, 1 << 0
SKB_LEN, SKB_PKT_TYPE, SKB_GSO_SEGS, SKB_GSO_SIZE = 0, 4, 164, 176

ETHERNET, IPV4, UDP = 14, 20, 8
OVERHEAD: Final = IPV4 + UDP
IPPROTO_TCP, IPPROTO_UDP = 6, 17

PEER = struct.Struct("=4s2sHI")
"""Value of the peer map: public address and port in network order, flags, seal."""
FLAG_COMPAT: Final = 1
"""It reads a socket, so checksums must be finished."""
FLAG_LEAVE: Final = 2
"""It is not reached through the external interface; the pump, which asks the routing table, sends to it."""
SEAL_AT: Final = 8
KEY, INDEX, SEGMENTS = -80, -84, -92
"""Places on the stack, below those of the headers; apart, for the reason that ``Program.put`` gives."""
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


def lies(field: bytes) -> int:
    """A header field as the number that a load of its size gives on this machine."""
    return int.from_bytes(field, sys.byteorder)


def measure(p: Program, in_front: int) -> None:
    """R8 = bytes of the inner packet; how many packets this is on the wire goes to the stack."""
    p.load(R8, R6, SKB_LEN, 32)
    p.compute(R8, "-", in_front)
    p.load(R2, R6, SKB_GSO_SEGS, 32)
    p.branch(R2, "!=", 0, "measured")
    p.set(R2, 1)
    p.label("measured")
    p.store(FP, SEGMENTS, R2, 32)


def load_bytes(p: Program, offset: int, to: int, size: int) -> None:
    """Copy a part of the packet to the stack; R0 is 0 if the packet is that long."""
    p.copy(R1, R6)
    p.set(R2, offset)
    p.address(R3, FP, to)
    p.set(R4, size)
    p.call(Helper.SKB_LOAD_BYTES)


def store_bytes(p: Program, offset: int, source: int, size: int) -> None:
    """Copy from the stack into the packet; R0 is 0 if it worked."""
    p.copy(R1, R6)
    p.set(R2, offset)
    p.address(R3, FP, source)
    p.set(R4, size)
    p.set(R5, 0)
    p.call(Helper.SKB_STORE_BYTES)


def adjust_room(p: Program, by: int, flags: int) -> None:
    """Grow or shrink the packet behind its link-layer header; R0 is 0 if it worked, else nothing changed."""
    p.copy(R1, R6)
    p.set(R2, by)
    p.set(R3, ADJ_ROOM_MAC)
    p.set(R4, flags)
    p.call(Helper.SKB_ADJUST_ROOM)


def look_up(p: Program, map_fd: int, key: int) -> None:
    """R0 points to the value of the key on the stack, or is 0."""
    p.map(R1, map_fd)
    p.address(R2, FP, key)
    p.call(Helper.MAP_LOOKUP)


def take_hop(p: Program, header: int) -> None:
    """Decrement the TTL of the header on the stack and adjust its checksum by the difference (RFC 1624)."""
    p.note("TTL - 1, checksum + 0x0100 in one's complement")
    p.load(R2, FP, header + 10, 16)
    p.compute(R2, "+", lies(b"\x01\x00"))
    p.branch(R2, "<", 0xFFFF, "no_carry")
    p.compute(R2, "+", 1)
    p.label("no_carry")
    p.store(FP, header + 10, R2, 16)
    p.load(R2, FP, header + 8, 8)  # last: see ``Program.put``
    p.compute(R2, "-", 1)
    p.store(FP, header + 8, R2, 8)


def ending(p: Program, label: str, count: Count, verdict: int) -> None:
    """A place to jump to: count, and end with a verdict."""
    p.label(label)
    p.set(R7, count)
    p.set(R9, verdict)
    p.goto("count")


def count_and_end(p: Program, counters_fd: int) -> None:
    """Add to counter R7 and end with verdict R9. Per CPU and with softirqs off, so plain additions are enough."""
    p.label("count")
    p.store(FP, INDEX, R7, 32)
    look_up(p, counters_fd, INDEX)
    p.branch(R0, "==", 0, "counted", bits=64)
    p.load(R2, FP, SEGMENTS, 32)
    for offset, amount in ((0, R2), (8, R8)):
        p.load(R1, R0, offset, 64)
        p.compute(R1, "+", amount, bits=64)
        p.store(R0, offset, R1, 64)
    p.label("counted")
    p.copy(R0, R9)
    p.exit()
