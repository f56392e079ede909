"""The program that packets for peers leave by; ``udp_programs.py`` says where it stands.

**The checksum trap.** A local TCP or UDP packet has no transport checksum yet: a network card shall fill it in. Over a
virtual link nobody does; a kernel that receives it knows, a program that reads a socket gets the unfinished bytes,
and TCP to a Go peer is dead while ping works. So ``encap`` sends directly only to peers that announced a kernel
receive path. All else goes through a pair of veth without offloads, where the kernel finishes it in software, and a
second ``encap`` stands at the far end: *compat transmit*. Super-packets that are not TCP go there too, because
kernels refuse to segment UDP inside UDP (seen on 6.18).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from backends.udp_programs import (
    ETHERNET,
    FIXED_GSO,
    FLAG_COMPAT,
    FLAG_LEAVE,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPV4,
    KEY,
    OVERHEAD,
    SEAL_AT,
    SKB_GSO_SIZE,
    TC_ACT_SHOT,
    TC_ACT_UNSPEC,
    UDP,
    Count,
    adjust_room,
    count_and_end,
    ending,
    lies,
    load_bytes,
    look_up,
    measure,
    store_bytes,
    take_hop,
)
from flanneld.kernel.bpfasm import Helper, Program, Reg
from flanneld.model.addr import IP

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

ENCAP_L3_IPV4, ENCAP_L4_UDP = 1 << 1, 1 << 4  # BPF_F_ADJ_ROOM_*
_MAX_IP: Final = 65535
_OUTER_TTL: Final = 64


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


# Stack of encap, from its end. The new headers lie right in front of the inner one, so one store writes them
# together with the inner header's TTL and checksum.
_INNER: Final = -24
_OUTER: Final = _INNER - OVERHEAD - ETHERNET
_OUTER_IP, _OUTER_UDP = _OUTER + ETHERNET, _OUTER + ETHERNET + IPV4
_REWRITTEN: Final = ETHERNET + OVERHEAD + 12  # up to and with the inner header's checksum


def encap(name: str, spec: Encap) -> Program:
    """The program for packets that leave through the TUN, or that come out of the compat pair finished.

    Registers: R6 packet, R7 peer, later the counter, R8 inner bytes, R9 hash of the flow, later the verdict.
    """
    p = Program(name)
    at_tun = spec.compat_ifindex != 0
    link_header = 0 if at_tun else ETHERNET
    p.copy(R6, R1)
    measure(p, link_header)
    p.note("the inner header")
    load_bytes(p, link_header, _INNER, IPV4)
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
    ending(p, "expired", Count.TX_EXPIRED, TC_ACT_SHOT)
    ending(p, "broken", Count.TX_ERROR, TC_ACT_SHOT)
    # The pump reads what goes on into the TUN; nobody reads the compat pair.
    ending(p, "leave", *((Count.TX_LEFT, TC_ACT_UNSPEC) if at_tun else (Count.TX_ERROR, TC_ACT_SHOT)))
    count_and_end(p, spec.counters_fd)
    return p


def _find_peer(p: Program, spec: Encap) -> None:
    p.note("the peer of the destination")
    p.load(R2, FP, _INNER + 16, 32)
    if spec.prefix_length is None:
        p.store(FP, KEY + 4, R2, 32)  # first: see ``Program.put``
        p.store(FP, KEY, 32, 32)
    else:
        mask = (0xFFFFFFFF << (32 - spec.prefix_length)) & 0xFFFFFFFF
        p.compute(R2, "&", lies(mask.to_bytes(4, "big")))
        p.store(FP, KEY, R2, 32)
    look_up(p, spec.peers_fd, KEY)
    p.branch(R0, "==", 0, "leave", bits=64)
    p.copy(R7, R0)
    p.note("an entry that somebody else wrote is for the pump, which knows the peer and has the map looked into")
    p.load(R2, R7, 0, 32)
    if spec.prefix_length is not None:
        p.load(R3, FP, KEY, 32)
        p.compute(R2, "+", R3)
    p.load(R3, R7, 4, 32)
    p.compute(R2, "^", R3)
    p.load(R3, R7, SEAL_AT, 32)
    p.branch(R2, "!=", R3, "leave")
    p.load(R2, R7, 6, 16)
    p.branch(R2, "&", FLAG_LEAVE, "leave")


def _choose_compat(p: Program) -> None:
    p.note("compat: a peer that reads a socket; a super-packet that is not TCP, or too long with headers")
    p.load(R2, R7, 6, 16)
    p.branch(R2, "&", FLAG_COMPAT, "compat")
    p.load(R2, R6, SKB_GSO_SIZE, 32)
    p.branch(R2, "==", 0, "direct")
    p.load(R2, FP, _INNER + 9, 8)
    p.branch(R2, "!=", IPPROTO_TCP, "compat")
    p.branch(R8, ">", _MAX_IP - OVERHEAD, "compat")
    p.label("direct")


def _send_direct(p: Program, spec: Encap, *, at_tun: bool) -> None:
    _make_room(p, spec, at_tun=at_tun)
    _write_outer(p, spec)
    take_hop(p, _INNER)
    store_bytes(p, 0, _OUTER, _REWRITTEN)
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
    adjust_room(p, OVERHEAD, FIXED_GSO | ENCAP_L3_IPV4 | ENCAP_L4_UDP)
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
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0x4000, _OUTER_TTL, IPPROTO_UDP, 0, spec.ext_ip, bytes(4))
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
    store_bytes(p, 0, _OUTER, ETHERNET)
    p.branch(R0, "!=", 0, "broken")
    p.set(R1, spec.compat_ifindex)
    p.set(R2, 0)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.TX_COMPAT)
    p.goto("count")
