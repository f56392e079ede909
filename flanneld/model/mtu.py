"""How much of a packet the tunnel headers take. Two types, so that no one subtracts twice."""

from __future__ import annotations

from typing import NewType

from flanneld.errors import ConfigError
from flanneld.model.addr import Family

WireMTU = NewType("WireMTU", int)
"""Largest packet the underlay takes, in bytes."""

TunnelMTU = NewType("TunnelMTU", int)
"""Largest packet the tunnel device takes, in bytes: wire MTU minus the outer headers."""

IPV4_HEADER_BYTES = 20  # RFC 791 section 3.1, without options
IPV6_HEADER_BYTES = 40  # RFC 8200 section 3
UDP_HEADER_BYTES = 8  # RFC 768
VXLAN_HEADER_BYTES = 8  # RFC 7348 section 5
ETHERNET_HEADER_BYTES = 14  # IEEE 802.3, the inner frame's, untagged

MIN_TUNNEL_MTU = {Family.V4: 576, Family.V6: 1280}
"""Least usable: what every IPv4 host accepts (RFC 791 3.2), and IPv6's minimum link MTU (RFC 8200 5)."""


def vxlan_overhead_bytes(underlay: Family) -> int:
    """Outer headers of a vxlan packet: 50 bytes over IPv4, 70 over IPv6.

    Source: RFC 7348 section 5. Flannel subtracts 50 for both (contract 11.20).
    """
    outer_ip = IPV4_HEADER_BYTES if underlay is Family.V4 else IPV6_HEADER_BYTES
    return outer_ip + UDP_HEADER_BYTES + VXLAN_HEADER_BYTES + ETHERNET_HEADER_BYTES


def tunnel_mtu(wire: WireMTU, overhead_bytes: int, inner: Family) -> TunnelMTU:
    """Largest packet the tunnel may take without the outer one being fragmented.

    Raises:
        ConfigError: too little would remain for the inner family to work.
    """
    left = wire - overhead_bytes
    if left < MIN_TUNNEL_MTU[inner]:
        raise ConfigError(
            f"an underlay MTU of {wire} leaves {left} bytes for {inner.label} packets, {MIN_TUNNEL_MTU[inner]} are "
            f"needed: raise the interface's MTU or Backend.MTU to at least {MIN_TUNNEL_MTU[inner] + overhead_bytes}"
        )
    return TunnelMTU(left)
