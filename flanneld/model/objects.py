"""Kernel objects as values: what a desired or an observed state is made of.

Named tuples, because a node has three of them for each peer and they are compared by the thousand:
equality and hashing run in C. Links are named, not numbered: an index changes when a device is
re-created, its name is what makes it ours. Nothing here knows how the kernel is asked.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from flanneld.model.addr import IP, MAC, Prefix, format_ip, format_mac

PROTO_BOOT = 3
"""RTPROT_BOOT, what Go flanneld's routes carry (contract 6.1; include/uapi/linux/rtnetlink.h)."""

PROTO_OURS = 86
"""Our own route protocol: proves that a route which is not on our device is ours (design/adr-0004)."""

METRIC_V6 = 1024
"""What the kernel gives an IPv6 route without a metric (IP6_RT_PRIO_USER, contract 6.1)."""

METRIC_VOID = 65535
"""Metric of our unreachable routes: whatever else claims the same block, a bridge for instance, wins."""

METRIC_BLACKHOLE = 65534
"""Metric of the own subnet's blackhole route: above our unreachable routes, below any bridge's own route."""


class RouteKind(IntEnum):
    """RTN_* types (include/uapi/linux/rtnetlink.h): those we make, and those that stand in their way."""

    UNICAST = 1
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8
    THROW = 9


class Scope(IntEnum):
    """RT_SCOPE_*: how far a destination is; IPv6 routes always read UNIVERSE."""

    UNIVERSE = 0
    LINK = 253


class Vxlan(NamedTuple):
    """What makes one vxlan device different from another (contract 6.9)."""

    vni: int
    lower: int
    """Interface index of the underlay device; 0 = none."""
    local: IP | None
    """Source address of outer packets."""
    port: int
    """Destination UDP port."""
    learning: bool = False
    gbp: bool = False
    group: IP | None = None
    """Default destination; set on somebody else's device only."""


ARP_OFF = "arp off"
"""In ``Link.extra``. To switch it on again makes the kernel forget the device's neighbours."""


class Link(NamedTuple):
    """A device that we make, or found under its name."""

    name: str
    mac: MAC
    mtu: int
    up: bool
    alias: str
    """``ifalias``: says which network the device belongs to (failures F21)."""
    vxlan: Vxlan | None
    """None when the device found is of another kind."""
    extra: str = ""
    """What ours never have, in words: a bridge they are part of, ARP off, a TTL of outer packets."""

    def __str__(self) -> str:
        state = "up" if self.up else "down"
        text = f"link {self.name} {format_mac(self.mac)} mtu {self.mtu} {state}"
        if self.vxlan:
            local = format_ip(self.vxlan.local) if self.vxlan.local else "any"
            text += f" vxlan id {self.vxlan.vni} local {local} dev {self.vxlan.lower} port {self.vxlan.port}"
            text += (" learning" if self.vxlan.learning else "") + (" gbp" if self.vxlan.gbp else "")
            text += f" remote {format_ip(self.vxlan.group)}" if self.vxlan.group else ""
        return f"{text} ({self.extra})" if self.extra else text


class Sysctl(NamedTuple):
    """One kernel setting of a device."""

    path: str
    """Below ``/proc/sys``, with slashes: device names contain dots."""
    value: str

    def __str__(self) -> str:
        return f"sysctl {self.path} = {self.value}"


class Offload(NamedTuple):
    """Whether a device takes packets whose checksums are left to the card (failures F03)."""

    link: str
    on: bool

    def __str__(self) -> str:
        return f"offload tx-checksum-ip-generic {'on' if self.on else 'off'} dev {self.link}"


class Address(NamedTuple):
    """An address on a device."""

    link: str
    ip: IP
    length: int
    peer: IP | None = None
    """The other end; ours have none."""
    scope: int = Scope.UNIVERSE
    """Ours are global: the kernel sends from no other to other hosts. IPv4 only."""

    def __str__(self) -> str:
        peer = f" peer {format_ip(self.peer)}" if self.peer else ""
        scope = f" scope {self.scope}" if self.scope else ""
        return f"address {format_ip(self.ip)}{peer}/{self.length} dev {self.link}{scope}"


class Fdb(NamedTuple):
    """Forwarding entry of a vxlan device: which host a VTEP's MAC lives on. Always self; ours are permanent."""

    link: str
    mac: MAC
    dst: IP
    permanent: bool = True

    def __str__(self) -> str:
        kind = "" if self.permanent else " temporary"
        return f"fdb {format_mac(self.mac)} dst {format_ip(self.dst)} dev {self.link}{kind}"


class Neighbour(NamedTuple):
    """ARP or neighbour-discovery entry. Permanent ones are programmed; the others answer one miss."""

    link: str
    ip: IP
    mac: MAC
    permanent: bool = True

    def __str__(self) -> str:
        kind = "permanent" if self.permanent else "noarp"
        return f"neighbour {format_ip(self.ip)} lladdr {format_mac(self.mac)} {kind} dev {self.link}"


class Route(NamedTuple):
    """A route in the main table."""

    dst: Prefix
    link: str
    """Output device; empty for blackhole and unreachable."""
    gateway: IP | None = None
    onlink: bool = False
    kind: RouteKind = RouteKind.UNICAST
    proto: int = PROTO_BOOT
    metric: int = 0
    scope: int = Scope.UNIVERSE
    extra: str = ""
    """What ours never say, in words: an MTU, a source address, several next hops."""

    def __str__(self) -> str:
        words = [] if self.kind is RouteKind.UNICAST else [RouteKind(self.kind).name.lower()]
        words.append(str(self.dst))
        if self.gateway:
            words += ["via", format_ip(self.gateway)]
        if self.link:
            words += ["dev", self.link]
        if self.metric:
            words += ["metric", str(self.metric)]
        words += filter(None, ["onlink" if self.onlink else "", self.extra])
        return "route " + " ".join(words)


KernelObject = Link | Sysctl | Offload | Address | Fdb | Neighbour | Route


def subject(obj: KernelObject) -> tuple[object, ...]:
    """What an object is about, without its value: two objects of one subject exclude each other."""
    match obj:
        case Link():
            return ("link", obj.name)
        case Sysctl():
            return ("sysctl", obj.path)
        case Offload():
            return ("offload", obj.link)
        case Address():
            return ("address", obj.link, obj.ip)
        case Fdb():
            return ("fdb", obj.link, obj.mac)
        case Neighbour():
            return ("neighbour", obj.link, obj.ip)
        case Route():
            return ("route", obj.dst, obj.metric)
