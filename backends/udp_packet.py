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
"""Bytes a packet grows by on the wire: an IPv4 header of 20 and a UDP header of 8 (contract 6.48)."""

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
