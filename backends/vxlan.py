"""vxlan: what this host's device, addresses and entries should be. Pure.

One path for both families: each enabled family has its own device, named and shaped as flannel's
(contract section 6B), over an underlay of the same family. Which peers are in the tables at a given
moment is decided in ``vxlan_pages.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from backends.routes import direct_route, metric_of
from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import IP, MAC, Family, Prefix, format_mac, parse_mac
from flanneld.model.backend_conf import BackendConf
from flanneld.model.host import ExtIface
from flanneld.model.lease import LeaseAttrs
from flanneld.model.mtu import MIN_TUNNEL_MTU, TunnelMTU, WireMTU, tunnel_mtu, vxlan_overhead_bytes
from flanneld.model.netconf import NetConf
from flanneld.model.objects import (
    Address,
    Fdb,
    KernelObject,
    Link,
    Neighbour,
    Route,
    Scope,
    Sysctl,
    Vxlan,
)
from flanneld.plan.fold import Remote

TYPE = "vxlan"
MAX_VNI = (1 << 24) - 1  # RFC 7348 section 5: 24 bits
DEFAULT_PORT = 8472  # what the Linux driver uses when nobody says (drivers/net/vxlan, contract 6.7)
DEFAULT_PAGE_AHEAD = 8192
AUTO = "auto"
TX_CHECKSUM = (AUTO, "on", "off")
MAX_LINK_NAME = 15  # IFNAMSIZ - 1 (include/uapi/linux/if.h)
DEVICE_NAME = {Family.V4: "flannel.{}", Family.V6: "flannel-v6.{}"}

UNRES_QUEUE_BYTES = 4 << 20
"""Packets that may wait for one answer. The kernel's 208 KiB hold 92 full-size ones (measured)."""

APP_SOLICIT = 3
"""How often the kernel asks us, a second apart, before it gives a destination up."""


class VxlanConf(NamedTuple):
    """``Backend`` of the network configuration, validated (contract 6.7)."""

    vni: int = 1
    port: int = DEFAULT_PORT
    mtu: int = 0
    """MTU of the underlay in bytes; 0 = the external interface's."""
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    page_ahead: int = DEFAULT_PAGE_AHEAD
    """Peers programmed ahead of need."""
    tx_checksum: str = AUTO
    """Whether checksums inside the tunnel may be left to the card: one of ``TX_CHECKSUM``."""


def parse_conf(conf: NetConf) -> tuple[VxlanConf, tuple[str, ...]]:
    """Validate the backend's part of the configuration.

    Returns:
        The settings, and the keys that we do not know.

    Raises:
        ConfigError: a value out of range; the sentence names key, value and remedy.
    """
    raw = BackendConf(conf.backend)
    low = min(MIN_TUNNEL_MTU[f] + vxlan_overhead_bytes(f) for f in conf.families())
    mtu = raw.integer("MTU", 0, 0, 65535)
    if 0 < mtu < low:
        raise ConfigError(
            f"Backend.MTU is {mtu}: use the underlay's MTU, from {low} to 65535, or 0 for the interface's"
        )
    settings = VxlanConf(
        vni=raw.integer("VNI", 1, 1, MAX_VNI),
        port=raw.integer("Port", 0, 0, 65535) or DEFAULT_PORT,
        mtu=mtu,
        gbp=raw.boolean("GBP", False),
        learning=raw.boolean("Learning", False),
        direct_routing=raw.boolean("DirectRouting", False),
        page_ahead=raw.integer("PageAhead", DEFAULT_PAGE_AHEAD, 0, 1 << 24),
        tx_checksum=raw.text("TxChecksum", AUTO).lower(),
    )
    if settings.tx_checksum not in TX_CHECKSUM:
        raise ConfigError(f'Backend.TxChecksum is "{settings.tx_checksum}": use one of {", ".join(TX_CHECKSUM)}')
    for family in conf.families():
        name = DEVICE_NAME[family].format(settings.vni)
        if len(name) > MAX_LINK_NAME:
            digits = MAX_LINK_NAME - len(DEVICE_NAME[family].format(""))
            raise ConfigError(
                f"Backend.VNI is {settings.vni}: the device name {name} has more than {MAX_LINK_NAME} characters, "
                f"use a VNI of at most {digits} digits with {family.label}"
            )
    return settings, raw.unknown()


class Peer(NamedTuple):
    """A remote host in one family: where its subnet's packets go."""

    subnet: Prefix
    mac: MAC
    public_ip: IP
    revision: int
    created: int = 0
    identity: str = ""


class _VtepJSON(msgspec.Struct):
    """``BackendData``; the remote VNI is ignored, as Linux flannel does (contract 3.18)."""

    VtepMAC: str


def parse_peer(remote: Remote, own_mac: MAC) -> Peer:
    """A peer from its lease.

    Raises:
        PeerDataError: no usable VTEP MAC in the backend data.
    """
    try:
        # Go matches keys in any case (contract 13.5); the exact spelling is the fast path.
        try:
            text = _decode_vtep(remote.data).VtepMAC
        except msgspec.ValidationError:
            fields = msgspec.json.decode(remote.data, type=dict[str, object])
            text = str(next((v for k, v in fields.items() if k.lower() == "vtepmac"), ""))
        mac = parse_mac(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise PeerDataError(f"lease {remote.subnet} has no VtepMAC in its backend data: not used") from exc
    if mac[0] & 1 or not any(mac):
        raise PeerDataError(f"lease {remote.subnet} has the unusable VtepMAC {format_mac(mac)}: not used")
    if mac == own_mac:
        raise PeerDataError(f"lease {remote.subnet} has our own VtepMAC {format_mac(mac)}: not used")
    return Peer(remote.subnet, mac, remote.public_ip, remote.revision, remote.created, remote.identity)


_decode_vtep = msgspec.json.Decoder(_VtepJSON).decode


class Overlay(NamedTuple):
    """One family's half of the backend on this host."""

    family: Family
    device: str
    mac: MAC
    network: Prefix
    subnet: Prefix
    """Our own."""
    mtu: TunnelMTU
    underlay: str
    """Name of the external interface."""
    alias: str
    vxlan: Vxlan

    def base_objects(self) -> Iterator[KernelObject]:
        """Everything that does not depend on peers: device, settings, address, covering route.

        The covering route brings a packet for a peer that is not in the tables to the neighbour layer,
        which keeps it and asks us (design/misses.md).
        """
        yield Link(self.device, self.mac, self.mtu, True, self.alias, self.vxlan)
        yield from self.settings()
        base = self.subnet.host(0)
        yield Address(self.device, base, self.family.bits)
        scope = Scope.LINK if self.family is Family.V4 else Scope.UNIVERSE  # what the kernel shows for IPv6
        yield Route(self.network, self.device, metric=metric_of(self.family), scope=scope)

    def settings(self) -> Iterator[Sysctl]:
        """Per-device settings; only ``app_solicit`` makes the kernel ask us (``l3miss`` does not)."""
        version = "ipv4" if self.family is Family.V4 else "ipv6"
        neigh = f"net/{version}/neigh/{self.device}"
        yield Sysctl(f"{neigh}/app_solicit", str(APP_SOLICIT))
        yield Sysctl(f"{neigh}/ucast_solicit", "0")
        yield Sysctl(f"{neigh}/mcast_solicit", "0")
        yield Sysctl(f"{neigh}/unres_qlen_bytes", str(UNRES_QUEUE_BYTES))
        if self.family is Family.V4:
            # Nobody asks here by ARP, so who does lies: the kernel would believe the sender's address
            yield Sysctl(f"net/ipv4/conf/{self.device}/arp_ignore", "8")
        else:
            yield Sysctl(f"net/ipv6/conf/{self.device}/accept_ra", "0")  # contract 6.13
            yield Sysctl(f"net/ipv6/conf/{self.device}/accept_dad", "0")  # nobody answers: failures F43

    def peer_objects(self, peer: Peer, direct: str) -> tuple[KernelObject, ...]:
        """Entries that reach one peer, in the order in which they must be written.

        Args:
            peer: whom to reach.
            direct: the interface through which the peer is on-link and may be routed to without a
                tunnel (DirectRouting); empty = through the tunnel.
        """
        if direct:
            return (direct_route(self.family, peer.subnet, peer.public_ip, direct),)
        base = peer.subnet.host(0)
        return (
            Fdb(self.device, peer.mac, peer.public_ip),
            Neighbour(self.device, base, peer.mac),
            Route(peer.subnet, self.device, base, onlink=True, metric=metric_of(self.family)),
        )


def overlays(
    conf: NetConf,
    settings: VxlanConf,
    ext: ExtIface,
    subnets: Mapping[Family, Prefix],
    macs: Mapping[Family, MAC],
    alias: str,
) -> tuple[Overlay, ...]:
    """The halves of the backend on this host.

    Raises:
        ConfigError: an enabled family has no address on the external interface, or its MTU is too small.
    """
    halves = []
    for family in conf.families():
        part, local = conf.family(family), ext.local(family)
        if part is None or local is None:
            raise ConfigError(f"interface {ext.name} has no {family.label} address, which the vxlan device needs")
        mtu = family_mtu(settings, ext, family)
        vxlan = Vxlan(settings.vni, ext.ifindex, local, settings.port, settings.learning, settings.gbp)
        device = DEVICE_NAME[family].format(settings.vni)
        halves.append(
            Overlay(family, device, macs[family], part.network, subnets[family].masked(), mtu, ext.name, alias, vxlan)
        )
    return tuple(halves)


def family_mtu(settings: VxlanConf, ext: ExtIface, family: Family) -> TunnelMTU:
    """MTU of one family's device.

    Raises:
        ConfigError: too little remains.
    """
    return tunnel_mtu(WireMTU(settings.mtu or ext.mtu), vxlan_overhead_bytes(family), family)


def lease_attrs(
    conf: NetConf, settings: VxlanConf, ext: ExtIface, macs: Mapping[Family, MAC], identity: str
) -> LeaseAttrs:
    """What we publish (contract 3.17): key order and form as Go flanneld writes them."""

    def data(family: Family) -> bytes:
        if conf.family(family) is None:
            return b""
        return b'{"VNI":%d,"VtepMAC":"%s"}' % (settings.vni, format_mac(macs[family]).encode())

    return LeaseAttrs(
        ext.public_ip if conf.v4 else None,
        ext.public_ip6 if conf.v6 else None,
        TYPE,
        data(Family.V4),
        data(Family.V6),
        identity,
    )
