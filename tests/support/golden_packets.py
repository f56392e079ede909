"""Golden packets of the udp backend: one table, two engines (the pump, and the kernel programs by BPF_PROG_TEST_RUN).

Every packet is built here with checksums summed anew, by arithmetic of its own, so that an engine that
adjusts checksums by difference is held against one that does not. Host: subnet 10.5.1.0/24, TUN 10.5.1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from backends.udp_packet import PumpConfig, UdpPeer
from flanneld.model.addr import IP, Prefix, parse_ip

PORT = 8285
MTU = 1472
TUN_IP = parse_ip("10.5.1.0")
CONFIG = PumpConfig(TUN_IP, MTU, PORT, any_source=False)

GO_PEER = UdpPeer(parse_ip("192.0.2.2"), PORT, kernel_rx=False)
KERNEL_PEER = UdpPeer(parse_ip("192.0.2.3"), PORT, kernel_rx=True)
PEERS = {Prefix.parse("10.5.2.0/24"): GO_PEER, Prefix.parse("10.5.3.0/24"): KERNEL_PEER}
"""All of the network's length: the kernel path looks up by masked address."""
STRANGER = parse_ip("192.0.2.99")
"""Holds no lease."""

ICMP, TCP, UDP, SCTP = 1, 6, 17, 132
DF, MF = 0x4000, 0x2000


class Does(Enum):
    """What becomes of a packet."""

    FORWARD = "goes on, changed as in ``result``"
    DROP = "disappears"
    REPLY = "disappears, and ``result`` goes back to its sender"


class Kernel(Enum):
    """What the kernel program does with it."""

    FORWARD = "the same as the pump, to the same peer, with the same bytes"
    DROP = "drops it"
    PASS = "leaves it, unchanged, to the normal stack and so to the pump"
    EITHER = "passes it, or forwards what the IP stack behind it will refuse; both do no harm"


class Golden(NamedTuple):
    """One packet and what becomes of it."""

    name: str
    packet: bytes
    """As read from the TUN (encap); the payload of a datagram (decap)."""
    does: Does
    counter: str
    """The counter that rises by one; of ``udp_packet.COUNTERS``."""
    result: bytes
    """The packet after, when it goes on; the whole ICMP packet of a REPLY; else empty."""
    peer: IP | None
    """encap: to whom it goes. decap: from whom it comes (outer source address)."""
    kernel: Kernel


def ones_sum(data: bytes) -> int:
    """One's complement sum of 16-bit words, folded (RFC 1071)."""
    words: tuple[int, ...] = struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) & 1))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(
    src: str,
    dst: str,
    proto: int,
    payload: bytes,
    *,
    ttl: int = 64,
    ident: int = 0x1111,
    frag: int = DF,
    tos: int = 0,
    options: bytes = b"",
    version: int = 4,
    words: int | None = None,
    length: int | None = None,
    checksum: int | None = None,
) -> bytes:
    """An IPv4 packet; the last four replace what is right by something else."""
    words = 5 + len(options) // 4 if words is None else words
    length = 20 + len(options) + len(payload) if length is None else length
    addresses = parse_ip(src) + parse_ip(dst)
    head = struct.pack("!BBHHHBBH", version << 4 | words, tos, length, ident, frag, ttl, proto, 0) + addresses + options
    right = ones_sum(head) ^ 0xFFFF
    return head[:10] + struct.pack("!H", right if checksum is None else checksum) + head[12:] + payload


def tcp(src: str, dst: str, data: bytes = b"hello", *, checksum: int | None = None) -> bytes:
    """A TCP segment from port 40000 to 80 (RFC 9293)."""
    head = struct.pack("!HHIIBBHHH", 40000, 80, 1, 2, 5 << 4, 0x18, 512, 0, 0)
    right = ones_sum(pseudo(src, dst, TCP, 20 + len(data)) + head + data) ^ 0xFFFF
    return head[:16] + struct.pack("!H", right if checksum is None else checksum) + head[18:] + data


def udp(src: str, dst: str, data: bytes = b"hello", *, checksum: int | None = None) -> bytes:
    """A UDP datagram from port 40000 to 53 (RFC 768: a sum of 0 is sent as ffff)."""
    head = struct.pack("!HHHH", 40000, 53, 8 + len(data), 0)
    right = ones_sum(pseudo(src, dst, UDP, 8 + len(data)) + head + data) ^ 0xFFFF or 0xFFFF
    return head[:6] + struct.pack("!H", right if checksum is None else checksum) + data


def echo_request(data: bytes = b"hello") -> bytes:
    """An ICMP echo request (RFC 792)."""
    message = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + data
    return message[:2] + struct.pack("!H", ones_sum(message) ^ 0xFFFF) + message[4:]


def pseudo(src: str, dst: str, proto: int, length: int) -> bytes:
    """The pseudo-header that transport checksums cover."""
    return parse_ip(src) + parse_ip(dst) + struct.pack("!HH", proto, length)


def net_unreachable(offender: bytes, source: IP = TUN_IP) -> bytes:
    """The answer of contract 6.53: type 3 code 0, TTL 8, id and fragment 0; quotes the IP header and 8 bytes."""
    quoted = offender[: (offender[0] & 15) * 4 + 8]
    message = struct.pack("!BBHI", 3, 0, 0, 0) + quoted
    message = message[:2] + struct.pack("!H", ones_sum(message) ^ 0xFFFF) + message[4:]
    there = ".".join(str(byte) for byte in offender[12:16])
    here = ".".join(str(byte) for byte in source)
    return ipv4(here, there, ICMP, message, ttl=8, ident=0, frag=0)


def encapsulated(golden: Golden, to: IP, port: int = PORT) -> bytes:
    """The outer IPv4 packet that carries a decap packet to our address, for an engine that begins at the wire."""
    assert golden.peer
    outer_udp = struct.pack("!HHHH", port, port, 8 + len(golden.packet), 0)
    here, there = (".".join(str(byte) for byte in ip) for ip in (golden.peer, to))
    return ipv4(here, there, UDP, outer_udp + golden.packet, ident=0)


POD, GO_POD, KERNEL_POD = "10.5.1.7", "10.5.2.9", "10.5.3.9"
NOWHERE = "10.5.9.9"
"""In the network, of no lease."""
ROUTER_SOLICITATION = bytes.fromhex(
    "6000000000083aff" + "fe80" + "00" * 13 + "01" + "ff02" + "00" * 13 + "02" + "8500000000000000"
)
"""A router solicitation, as the kernel sends it from every device that comes up (RFC 4861)."""

# Literal bytes, made by hand from RFC 791, so that not everything hangs on the builders above.
HAND = bytes.fromhex("4500001c111140004006" + "12b2" + "0a0501070a0502099c4000500000000a")
HAND_AFTER = bytes.fromhex("4500001c111140003f06" + "13b2" + "0a0501070a0502099c4000500000000a")


class Hop(NamedTuple):
    """A packet, and the same one hop later."""

    name: str
    now: bytes
    later: bytes


def _with_checksum(wanted: int) -> Hop:
    """A packet whose right header checksum is ``wanted``; the ident makes it so."""
    rest = ones_sum(ipv4(POD, GO_POD, UDP, b"", ident=0, checksum=0))
    now, later = (ipv4(POD, GO_POD, UDP, b"", ident=(0xFFFF - wanted - rest) % 0xFFFF, ttl=ttl) for ttl in (64, 63))
    assert now[10:12] == wanted.to_bytes(2, "big")
    return Hop(f"header checksum {wanted:04x}", now, later)


def _forward(hops: Iterable[Hop], peer: UdpPeer, counter: str, suffix: str = "") -> list[Golden]:
    return [
        Golden(hop.name + suffix, hop.now, Does.FORWARD, counter, hop.later, peer.ip, Kernel.FORWARD) for hop in hops
    ]


def _same(src: str, dst: str) -> list[Hop]:
    """Packets that pass both ways alike."""
    hop = {ttl: ipv4(src, dst, TCP, tcp(src, dst), ttl=ttl) for ttl in (255, 254, 64, 63, 2, 1)}
    pairs: list[Hop] = [
        Hop("tcp", hop[64], hop[63]),
        Hop("ttl 255", hop[255], hop[254]),
        Hop("ttl 2 is the last that passes", hop[2], hop[1]),
    ]
    odd: list[tuple[str, int, bytes, dict[str, int | bytes]]] = [
        ("udp", UDP, udp(src, dst), {}),
        ("udp without a checksum stays without", UDP, udp(src, dst, checksum=0), {}),
        ("icmp echo", ICMP, echo_request(), {}),
        ("a transport unknown to us", SCTP, b"\x00" * 12, {}),
        ("header only", TCP, b"", {}),
        ("as long as the mtu", UDP, udp(src, dst, b"x" * (MTU - 28)), {}),
        ("may be fragmented", UDP, udp(src, dst), {"frag": 0}),
        ("first fragment", UDP, udp(src, dst, b"x" * 64), {"frag": MF}),
        ("middle fragment", UDP, b"y" * 64, {"frag": MF | 9}),
        ("last fragment", UDP, b"z" * 3, {"frag": 17}),
        ("options", TCP, tcp(src, dst), {"options": b"\x94\x04\x00\x00"}),
        ("forty bytes of options", TCP, tcp(src, dst), {"options": b"\x01" * 40}),
        ("dscp and ecn stay", TCP, tcp(src, dst), {"tos": 0xBB}),
        ("a wrong transport checksum stays wrong", TCP, tcp(src, dst, checksum=0x1234), {}),
    ]
    for name, proto, payload, more in odd:
        now, later = (ipv4(src, dst, proto, payload, ttl=ttl, **more) for ttl in (64, 63))  # type: ignore[arg-type]
        pairs.append(Hop(name, now, later))
    # by difference, so that damage on the way stays visible to the receiver's IP stack: 1234 + 0100
    now, later = (ipv4(src, dst, TCP, tcp(src, dst), ttl=t, checksum=c) for t, c in ((64, 0x1234), (63, 0x1334)))
    return [*pairs, Hop("a wrong header checksum stays wrong by as much", now, later)]


_BAD_LENGTH = {
    "header length below five words": {"words": 4},
    "header longer than the packet": {"words": 15},
    "total length below the header": {"length": 19},
    "total length beyond the packet": {"length": 26},
}


def _malformed(src: str, dst: str, peer: IP | None) -> list[Golden]:
    bad = [
        Golden(name, ipv4(src, dst, TCP, b"short", **lie), Does.DROP, "drop_malformed", b"", peer, Kernel.EITHER)  # type: ignore[arg-type]
        for name, lie in _BAD_LENGTH.items()
    ]
    whole = ipv4(src, dst, TCP, b"")
    for size in (19, 1):
        bad.append(
            Golden(f"{size} bytes", whole[:size], Does.DROP, "drop_malformed", b"", peer, Kernel.PASS),
        )
    return [
        *bad,
        Golden("ipv6", ROUTER_SOLICITATION, Does.DROP, "drop_not_ipv4", b"", peer, Kernel.PASS),
        Golden("version 0", ipv4(src, dst, TCP, b"", version=0), Does.DROP, "drop_not_ipv4", b"", peer, Kernel.PASS),
    ]


def _expired(src: str, dst: str, peer: IP) -> list[Golden]:
    return [
        Golden(f"ttl {ttl}", ipv4(src, dst, TCP, b"", ttl=ttl), Does.DROP, "drop_ttl", b"", peer, Kernel.DROP)
        for ttl in (1, 0)
    ]


def _no_route() -> list[Golden]:
    def answered(name: str, packet: bytes) -> Golden:
        return Golden(name, packet, Does.REPLY, "drop_no_route", net_unreachable(packet), None, Kernel.PASS)

    def silent(name: str, packet: bytes) -> Golden:
        return Golden(name, packet, Does.DROP, "drop_no_route", b"", None, Kernel.PASS)

    segment = tcp(POD, NOWHERE)
    return [
        answered("tcp to nowhere", ipv4(POD, NOWHERE, TCP, segment)),
        answered("udp to nowhere", ipv4(POD, NOWHERE, UDP, udp(POD, NOWHERE))),
        answered("nowhere comes before ttl", ipv4(POD, NOWHERE, TCP, segment, ttl=1)),
        answered("options are quoted", ipv4(POD, NOWHERE, TCP, segment, options=b"\x94\x04\x00\x00")),
        answered("fewer than eight bytes to quote", ipv4(POD, NOWHERE, SCTP, b"abc")),
        answered("first fragment to nowhere", ipv4(POD, NOWHERE, UDP, udp(POD, NOWHERE, b"x" * 64), frag=MF)),
        answered("one past a peer's last address", ipv4(POD, "10.5.4.0", TCP, tcp(POD, "10.5.4.0"))),
        silent("icmp to nowhere", ipv4(POD, NOWHERE, ICMP, echo_request())),
        silent("later fragment to nowhere", ipv4(POD, NOWHERE, UDP, b"y" * 64, frag=MF | 9)),
        silent("multicast", ipv4(POD, "224.0.0.251", UDP, udp(POD, "224.0.0.251"))),
        silent("from nobody", ipv4("0.0.0.0", NOWHERE, UDP, udp("0.0.0.0", NOWHERE))),
    ]


_BY_HAND = Hop("by hand", HAND, HAND_AFTER)

_CARRIES = [_with_checksum(value) for value in (0x0000, 0xFDFF, 0xFE00, 0xFEFE, 0xFEFF, 0xFF00, 0xFF7F, 0xFFFE)]
"""Checksums at which adding 0x0100 carries, and the one where a naive sum gives ffff instead of 0 (RFC 1624)."""

_ENDS = [
    Hop(f"{where} address of a peer's subnet", ipv4(POD, dst, TCP, b""), ipv4(POD, dst, TCP, b"", ttl=63))
    for where, dst in (("first", "10.5.2.0"), ("last", "10.5.2.255"))
]

ENCAP: tuple[Golden, ...] = (
    *_forward([_BY_HAND, *_same(POD, GO_POD), *_CARRIES, *_ENDS], GO_PEER, "tx_packets"),
    *_forward(_same(POD, KERNEL_POD), KERNEL_PEER, "tx_packets", ", to a kernel peer"),
    *_expired(POD, GO_POD, GO_PEER.ip),
    *_malformed(POD, GO_POD, None),
    *_no_route(),
)
"""TUN to peer."""

DECAP: tuple[Golden, ...] = (
    *_forward([*_same(GO_POD, POD), *_CARRIES], GO_PEER, "rx_packets"),
    *_forward(_same(KERNEL_POD, POD), KERNEL_PEER, "rx_packets", ", from a kernel peer"),
    *_expired(GO_POD, POD, GO_PEER.ip),
    *_malformed(GO_POD, POD, GO_PEER.ip),
    Golden(
        "from a stranger",
        ipv4(GO_POD, POD, TCP, tcp(GO_POD, POD)),
        Does.DROP,
        "drop_unknown_source",
        b"",
        STRANGER,
        Kernel.PASS,
    ),
    Golden(
        "longer than the mtu",
        ipv4(GO_POD, POD, UDP, udp(GO_POD, POD, b"x" * (MTU - 27))),
        Does.DROP,
        "drop_oversize",
        b"",
        GO_PEER.ip,
        Kernel.EITHER,
    ),
)
"""Peer to TUN."""
