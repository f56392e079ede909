"""What the udp backend does to the bytes of a packet, and to whom it goes: flannel's wire format (contract 6.50).

Pure functions on buffers; no sockets, no threads, no clock. The kernel programs do the same in eBPF, and
``tests/support/golden_packets.py`` holds both to one table. Everything here runs once a packet, so the common
case comes first and costs as little as Python allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import NamedTuple

from flanneld.model.addr import IP, Family, Prefix, format_ip

IPV4_HEADER = 20
"""Bytes of an IPv4 header without options (RFC 791)."""
OVERHEAD = 28
"""Bytes a packet grows by on the wire: an IPv4 header of 20, a UDP header of 8 (contract 6.48)."""

_ICMP, _TCP, _UDP = 1, 6, 17  # IANA protocol numbers
_CHECKSUM_AT = {_TCP: 16, _UDP: 6}
"""Offset of the checksum in a transport header (RFC 9293, RFC 768)."""

COUNTERS = (
    "tx_packets",
    "tx_bytes",
    "rx_packets",
    "rx_bytes",
    "drop_ttl",
    "drop_no_route",
    "drop_unknown_source",
    "drop_malformed",
    "drop_not_ipv4",
    "drop_oversize",
    "tx_errors",
    "rx_errors",
    "icmp_sent",
)
"""Names that every rung of the ladder counts by. Bytes are those of inner packets; *tx* leaves towards peers."""


class UdpPeer(NamedTuple):
    """Where the packets for one subnet go."""

    ip: IP
    """Its public IPv4 address, destination and expected source of datagrams."""
    port: int
    """UDP port; our own ``Port`` (contract 6.49)."""
    kernel_rx: bool
    """Whether it announced a kernel receive path, so that checksums may be left to its hardware."""


class PumpConfig(NamedTuple):
    """What the pump has to know of this host."""

    tun_ip: IP
    """IPv4 address of the TUN, source of our ICMP (contract 6.53)."""
    mtu: int
    """Of the TUN, in bytes; a longer packet is never ours (contract 6.48)."""
    port: int
    """UDP port on which we and our peers listen."""
    any_source: bool
    """Take datagrams from anybody, as Go flanneld does (contract 6.50)."""


Target = tuple[str, int]
"""A destination as ``sendto`` takes it; one object for each peer, so that ``is`` compares them."""


class PeerTable:
    """The peers as the data path asks for them; never changes, so that threads share it and swap it whole.

    A look-up costs one dictionary access for each *distinct prefix length* among the peers, in practice one.

    Args:
        peers: by subnet; of IPv4, host bits are ignored (contract 3.13).
    """

    def __init__(self, peers: Mapping[Prefix, UdpPeer]) -> None:
        by_shift: dict[int, dict[int, Target]] = {}
        self.sources: dict[str, bool] = {}
        """Public addresses of peers as text, and whether that peer sends from its kernel."""
        for subnet, peer in peers.items():
            if subnet.family is not Family.V4:
                continue
            shift = 32 - subnet.length
            there = format_ip(peer.ip)
            by_shift.setdefault(shift, {})[int.from_bytes(subnet.ip, "big") >> shift] = (there, peer.port)
            self.sources[there] = self.sources.get(there, False) or peer.kernel_rx
        self._levels = tuple(sorted(by_shift.items()))  # longest prefix first

    def find(self, destination: bytes) -> Target | None:
        """Who is responsible for an address of 4 bytes; the longest prefix wins."""
        value = int.from_bytes(destination, "big")
        for shift, targets in self._levels:
            if target := targets.get(value >> shift):
                return target
        return None


_LENGTHS = Struct("!BxH").unpack_from
_DESTINATION = Struct("!16x4s").unpack_from
_TTL = Struct("!BBH")
_UNREACHABLE = Struct("!BBHI")
_REPLY = Struct("!BBHHHBBH4s4s")


def fault(buffer: bytearray, at: int, size: int) -> str:
    """What makes a packet unfit for forwarding, as the name of a counter; empty for a fit one.

    Nothing is copied and the header checksum is not verified: what is wrong stays wrong through ``take_hop``,
    and the IP stack that gets the packet refuses it.

    Args:
        buffer: holds the packet, and at least 20 bytes from its beginning however short it is.
        at: where the packet begins.
        size: its length in bytes.
    """
    if size < IPV4_HEADER:
        return "drop_malformed"
    first, total = _LENGTHS(buffer, at)
    if first == 0x45 and IPV4_HEADER <= total <= size:
        return ""
    if first >> 4 != 4:
        return "drop_not_ipv4"
    return "" if IPV4_HEADER <= (first & 15) * 4 <= total <= size else "drop_malformed"


def destination(buffer: bytearray, at: int) -> bytes:
    """Destination address of a packet without fault."""
    (address,) = _DESTINATION(buffer, at)
    return bytes(address)


def take_hop(buffer: bytearray, at: int) -> bool:
    """Decrement the TTL in place and adjust the header checksum; False, changing nothing, when none is left.

    The TTL is the upper half of a 16-bit word, so one hop less means 0x0100 more in the checksum, in one's
    complement. A sum of ffff stands for 0, as in the header summed anew (contract 6.52).
    Source: RFC 1624 equation 3.
    """
    ttl, protocol, checksum = _TTL.unpack_from(buffer, at + 8)
    if ttl <= 1:
        return False
    checksum += 0x0100
    if checksum >= 0xFFFF:
        checksum = (checksum + 1) & 0xFFFF
    _TTL.pack_into(buffer, at + 8, ttl - 1, protocol, checksum)
    return True


def checksum_of(data: bytes | bytearray) -> int:
    """The Internet checksum (RFC 1071) of data that is not all zero; odd lengths count one zero byte more.

    65536 is 1 modulo 65535, so the remainder of the data as one number is the folded sum of its words: one long
    division in C instead of a loop over words.
    """
    value = int.from_bytes(data, "big") << (len(data) & 1) * 8
    return 0xFFFF - (value % 0xFFFF or 0xFFFF)


def complete_checksum(buffer: bytearray, at: int) -> bool:
    """Finish a TCP or UDP checksum that the sender's kernel left to hardware there was none of; tells whether it did.

    Such a packet carries the bare sum of the pseudo-header. It comes from a peer with a kernel data path that
    takes us for one, as for a moment after a change of path, over a link that nobody ever sums (veth, virtio).
    A whole packet whose right checksum happens to be that number is left as it is, because summing gives it again.

    Args:
        buffer: holds the packet.
        at: where the packet begins; it is without fault.

    Source: Linux ``CHECKSUM_PARTIAL``, include/linux/skbuff.h.
    """
    first, total = _LENGTHS(buffer, at)
    protocol = buffer[at + 9]
    offset = _CHECKSUM_AT.get(protocol)
    header = (first & 15) * 4
    is_fragment = buffer[at + 6] & 0x3F or buffer[at + 7]
    if offset is None or is_fragment or total < header + offset + 2:
        return False
    field = at + header + offset
    pseudo = buffer[at + 12 : at + 20] + protocol.to_bytes(2, "big") + (total - header).to_bytes(2, "big")
    if int.from_bytes(buffer[field : field + 2], "big") != 0xFFFF - checksum_of(pseudo):
        return False
    # the field already holds the pseudo-header's share, so summing the segment as it stands covers both
    value = checksum_of(buffer[at + header : at + total])
    buffer[field : field + 2] = (value or (0xFFFF if protocol == _UDP else 0)).to_bytes(2, "big")
    return True


def net_unreachable(packet: bytes, tun_ip: IP) -> bytes | None:
    """The answer to a packet for which there is no peer, as a whole IPv4 packet; None where none is due.

    No answer goes to ICMP, to later fragments (contract 6.53), to multicast, or to a source that is no single
    host (RFC 1122 section 3.2.2).

    Args:
        packet: the offender, without fault.
        tun_ip: the answer's source.
    """
    source, target = packet[12:16], packet[16:20]
    is_later_fragment = packet[6] & 0x1F or packet[7]
    if packet[9] == _ICMP or is_later_fragment or target[0] >= 224 or source[0] in (0, 127) or source[0] >= 224:
        return None
    quoted = packet[: (packet[0] & 15) * 4 + 8]
    message = _UNREACHABLE.pack(3, 0, 0, 0) + quoted
    message = _UNREACHABLE.pack(3, 0, checksum_of(message), 0) + quoted
    length = IPV4_HEADER + len(message)
    head = _REPLY.pack(0x45, 0, length, 0, 0, 8, _ICMP, 0, tun_ip, source)
    return head[:10] + checksum_of(head).to_bytes(2, "big") + head[12:] + message
