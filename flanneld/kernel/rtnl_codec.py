"""rtnetlink messages to and from values. No sockets: bytes in, values out.

Encoders return whole messages with length, type and flags filled and sequence number 0; the socket
numbers them. Decoders take the body of one message (without the 16-byte header) as ``messages`` hands it
out, that is with its fixed part whole; whatever else is wrong with it they leave out, and never raise.

Sources: include/uapi/linux/{netlink,rtnetlink,neighbour,if_link,if_addr}.h; RFC 3549. Byte order is
the host's except addresses, MACs and ports, which are in network order.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from flanneld.model.addr import IP, MAC, Family, Prefix
from flanneld.model.objects import Address, Fdb, Link, Neighbour, Route, RouteKind, Vxlan

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_SETNEIGHTBL = 67
NDTA_NAME, NDTA_PARMS, NDTPA_IFINDEX = 1, 6, 1

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400

AF_UNSPEC, AF_BRIDGE = 0, 7
IFF_UP, IFF_RUNNING = 0x1, 0x40

NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x01, 0x02, 0x04, 0x08, 0x10
NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x20, 0x40, 0x80
NUD_ANSWERED = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP
NTF_SELF = 0x02

RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTPROT_KERNEL = 2
RTNH_F_ONLINK = 4
RTM_F_FIB_MATCH = 0x2000

NDA_DST, NDA_LLADDR, NDA_CACHEINFO, NDA_PORT, NDA_VNI, NDA_IFINDEX = 1, 2, 3, 6, 7, 8
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = 1, 3, 4, 13, 18, 20, 29
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
RTEXT_FILTER_SKIP_STATS = 1 << 3
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 6, 7, 9, 15
RTA_VIA, RTA_ENCAP, RTA_NH_ID = 18, 22, 30
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

# enum in include/uapi/linux/if_link.h, IFLA_VXLAN_*
VX_ID, VX_GROUP, VX_LINK, VX_LOCAL, VX_TTL, VX_TOS, VX_LEARNING = 1, 2, 3, 4, 5, 6, 7
VX_PROXY, VX_RSC, VX_L2MISS, VX_L3MISS, VX_PORT, VX_GROUP6, VX_LOCAL6 = 11, 12, 13, 14, 15, 16, 17
VX_ZERO_CSUM6_TX, VX_ZERO_CSUM6_RX, VX_GBP = 19, 20, 23

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: len, type, flags, seq, pid
_ATTR = struct.Struct("=HH")  # nlattr: len, type
_IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefixlen, flags, scope, index
_NDMSG = struct.Struct("=BxxxiHBB")  # ndmsg: family, ifindex, state, flags, type
_RTMSG = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_U32 = struct.Struct("=I")
_U16_NET = struct.Struct("!H")

HEADER_BYTES = _HEADER.size

_FIXED_BYTES: Final[Mapping[int, int]] = {
    NLMSG_ERROR: 4,
    **dict.fromkeys((RTM_NEWLINK, RTM_DELLINK), _IFINFO.size),
    **dict.fromkeys((RTM_NEWADDR, RTM_DELADDR), _IFADDR.size),
    **dict.fromkeys((RTM_NEWROUTE, RTM_DELROUTE), _RTMSG.size),
    **dict.fromkeys((RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH), _NDMSG.size),
}
"""Length of the fixed part of a body, by message type."""


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One request with its header; the length covers the padded body."""
    return _HEADER.pack(HEADER_BYTES + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = 4 + len(payload)
    return _ATTR.pack(size, kind) + payload + b"\0" * (-size % 4)


def _u32(kind: int, value: int) -> bytes:
    return _ATTR.pack(8, kind) + _U32.pack(value)


def _u8(kind: int, value: int) -> bytes:
    return attr(kind, bytes((value,)))


def attrs(body: bytes | memoryview, offset: int) -> dict[int, bytes]:
    """Attributes of a message body by type; the last of one type wins, a broken tail is ignored."""
    found: dict[int, bytes] = {}
    end = len(body)
    while offset + 4 <= end:
        size, kind = _ATTR.unpack_from(body, offset)
        if size < 4 or offset + size > end:
            break
        found[kind & NLA_TYPE_MASK] = bytes(body[offset + 4 : offset + size])
        offset += (size + 3) & ~3
    return found


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, int, memoryview]]:
    """Split a datagram into (type, flags, sequence, port id, body); what is cut short is left out."""
    view, offset, end = memoryview(datagram), 0, len(datagram)
    while offset + HEADER_BYTES <= end:
        size, kind, flags, seq, pid = _HEADER.unpack_from(view, offset)
        if size < HEADER_BYTES or offset + size > end:
            return
        if size - HEADER_BYTES >= _FIXED_BYTES.get(kind, 0):
            yield kind, flags, seq, pid, view[offset + HEADER_BYTES : offset + size]
        offset += (size + 3) & ~3


# ---- neighbours and forwarding entries -------------------------------------------------------------


def neighbour(obj: Neighbour, ifindex: int, *, delete: bool = False) -> bytes:
    """Create, replace or delete an ARP / neighbour-discovery entry.

    An entry without a MAC is a refusal: it fails what the kernel is resolving, and the queued packets are
    answered with "unreachable" at once. One that is not permanent is NOARP: never asked about again, and the
    first to make room when the kernel's table is full. REACHABLE ones cannot be collected for 5 s
    (net/core/neighbour.c neigh_forced_gc), so that a scan through leased subnets would fill the 1024 places
    of gc_thresh3 and keep every new destination of the machine out meanwhile.
    """
    if not obj.mac and not delete:
        return _neighbour_failed(obj.ip, ifindex)
    state = NUD_PERMANENT if obj.permanent else NUD_NOARP
    head = _NDMSG.pack(2 if len(obj.ip) == 4 else 10, ifindex, state, 0, RTN_UNICAST)
    if delete:
        return message(RTM_DELNEIGH, 0, head + attr(NDA_DST, obj.ip))
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, head + attr(NDA_DST, obj.ip) + attr(NDA_LLADDR, obj.mac))


def _neighbour_failed(ip: IP, ifindex: int) -> bytes:
    head = _NDMSG.pack(2 if len(ip) == 4 else 10, ifindex, NUD_FAILED, 0, RTN_UNICAST)
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, head + attr(NDA_DST, ip))


def fdb(obj: Fdb, ifindex: int, *, delete: bool = False) -> bytes:
    """Create, replace or delete a vxlan forwarding entry; permanent and self, as flannel's (contract 6.15).

    Deleting names the MAC alone and so takes all its destinations: a broadcast entry may have several.
    """
    head = _NDMSG.pack(AF_BRIDGE, ifindex, NUD_PERMANENT, NTF_SELF, 0)
    if delete:
        return message(RTM_DELNEIGH, 0, head + attr(NDA_LLADDR, obj.mac))
    body = head + attr(NDA_DST, obj.dst) + attr(NDA_LLADDR, obj.mac)
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


NEIGH_SETTINGS: Final = {"app_solicit": 9, "ucast_solicit": 10, "mcast_solicit": 11, "unres_qlen_bytes": 16}
"""Files below /proc/sys/net/*/neigh/DEV that are attributes of RTM_SETNEIGHTBL too: NDTPA_* of neighbour.h."""


def neigh_setting(family: Family, ifindex: int, name: str, value: int) -> bytes:
    """Set one of ``NEIGH_SETTINGS`` of a device; needs no writable /proc/sys, which containers lack."""
    table = b"arp_cache\0" if family is Family.V4 else b"ndisc_cache\0"
    parms = _u32(NDTPA_IFINDEX, ifindex) + _u32(NEIGH_SETTINGS[name], value)
    head = struct.pack("=BxH", family, 0)  # ndtmsg
    return message(
        RTM_SETNEIGHTBL, NLM_F_REPLACE, head + attr(NDTA_NAME, table) + attr(NDTA_PARMS | NLA_F_NESTED, parms)
    )


def dump_neighbours(ifindex: int, *, bridge: bool) -> bytes:
    """Ask for all neighbours, or all forwarding entries, of one device.

    The kernel filters neighbours by attribute (NDA_IFINDEX) but forwarding entries by the header's
    index (net/core/neighbour.c neigh_valid_dump_req, net/core/rtnetlink.c valid_fdb_dump_strict).
    """
    if bridge:
        return message(RTM_GETNEIGH, NLM_F_DUMP, _NDMSG.pack(AF_BRIDGE, ifindex, 0, 0, 0))
    return message(RTM_GETNEIGH, NLM_F_DUMP, _NDMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + _u32(NDA_IFINDEX, ifindex))


def parse_neigh(body: memoryview) -> tuple[int, int, int, dict[int, bytes]]:
    """Header fields and attributes of a neighbour message: (family, ifindex, state, attributes)."""
    family, ifindex, state, _flags, _kind = _NDMSG.unpack_from(body)
    return family, ifindex, state, attrs(body, _NDMSG.size)


def decode_unresolved(body: memoryview, links: Mapping[int, str]) -> tuple[str, IP] | None:
    """Device and address of a neighbour that the kernel is still asking for; None for any other."""
    _family, ifindex, state, found = parse_neigh(body)
    link, ip = links.get(ifindex), _ip(found.get(NDA_DST))
    return (link, ip) if link and ip and state & NUD_INCOMPLETE else None


def _ip(raw: bytes | None) -> IP | None:
    """An address attribute of either family; None when absent or of another length."""
    return IP(raw) if raw is not None and len(raw) in (4, 16) else None


def _mac(raw: bytes | None) -> MAC | None:
    return MAC(raw) if raw is not None and len(raw) == 6 else None


# The usual forwarding entry, whole: MAC, IPv4 address, times of use. Thousands of them are announced when thousands
# of peers come or go (the driver does not say on whose behalf, so echoes cannot be told), hence a way without a dict.
_FDB4 = struct.Struct("=4s6sH4s4s")
_FDB4_BYTES = _NDMSG.size + _FDB4.size + 20  # and nda_cacheinfo
_LLADDR_HEAD, _DST4_HEAD = _ATTR.pack(10, NDA_LLADDR), _ATTR.pack(8, NDA_DST)


def decode_neigh(body: memoryview, links: Mapping[int, str], *, any_state: bool = False) -> Neighbour | Fdb | None:
    """A neighbour or forwarding entry on one of the named links; None for what does not concern us.

    Unresolved and failed neighbours and those of multicast and broadcast addresses belong to the kernel
    and are left out of states; so are learned forwarding entries. ``any_state`` lets neighbours of every
    state through, for notifications: a deleted entry is announced as failed, without its MAC.
    """
    family, ifindex, state, _flags, _kind = _NDMSG.unpack_from(body)
    link = links.get(ifindex)
    if link is None or not (any_state or state & (NUD_PERMANENT | NUD_ANSWERED)):
        return None
    if family == AF_BRIDGE and len(body) == _FDB4_BYTES and state & NUD_PERMANENT:
        head, lladdr, _pad, tail, address = _FDB4.unpack_from(body, _NDMSG.size)
        if head == _LLADDR_HEAD and tail == _DST4_HEAD:
            return Fdb(link, MAC(lladdr), IP(address))
    found = attrs(body, _NDMSG.size)
    dst, mac = _ip(found.get(NDA_DST)), _mac(found.get(NDA_LLADDR))
    if mac is None and any_state and NDA_LLADDR not in found:
        mac = MAC(b"")
    if dst is None or mac is None:
        return None
    if family != AF_BRIDGE:
        if state & NUD_NOARP and (dst[0] == 0xFF or (len(dst) == 4 and dst[0] >= 224)):
            return None
        return Neighbour(link, dst, mac, bool(state & NUD_PERMANENT))
    if not state & NUD_PERMANENT:
        return None
    # One with a port, VNI or device of its own leads elsewhere, whatever its address: it reads as "nowhere",
    # which no peer is, so it gets replaced; and naming no address deletes it whatever else it says.
    elsewhere = any(kind in found for kind in (NDA_PORT, NDA_VNI, NDA_IFINDEX))
    return Fdb(link, mac, IP(bytes(len(dst))) if elsewhere else dst)


def decode_miss(body: memoryview) -> tuple[int, IP | None, MAC | None]:
    """(ifindex, address asked for, MAC asked for) of an RTM_GETNEIGH; what is absent or no address is None."""
    _family, ifindex, _state, found = parse_neigh(body)
    return ifindex, _ip(found.get(NDA_DST)), _mac(found.get(NDA_LLADDR))


def decode_idle(body: memoryview) -> tuple[MAC, float]:
    """MAC and seconds since last use of a forwarding entry.

    ``used`` is the second word of nda_cacheinfo, in clock ticks of 1/100 s (USER_HZ) on every architecture
    Linux runs on today but alpha and ia64.
    """
    found = parse_neigh(body)[3]
    cache = found.get(NDA_CACHEINFO, b"")
    used = _U32.unpack_from(cache, 4)[0] / 100 if len(cache) >= 8 else 0.0
    return MAC(found.get(NDA_LLADDR, b"")), used


# ---- routes ----------------------------------------------------------------------------------------


def route(obj: Route, ifindex: int, *, delete: bool = False, replace: bool = False, nexthop: int = 0) -> bytes:
    """Create, replace or delete one route in the main table; deletion names every field, so only ours goes.

    ``nexthop`` is the id of an object that stands for gateway and device (``kernel/nexthops.py``).
    """
    family = Family.V4 if len(obj.dst.ip) == 4 else Family.V6
    flags = RTNH_F_ONLINK if obj.onlink and not nexthop else 0
    scope = obj.scope if family is Family.V4 else 0
    parts = [
        _RTMSG.pack(family, obj.dst.length, 0, 0, RT_TABLE_MAIN, obj.proto, scope, obj.kind, flags),
        attr(RTA_DST, obj.dst.ip),
    ]
    if nexthop:
        parts.append(_u32(RTA_NH_ID, nexthop))
    else:
        if obj.gateway:
            parts.append(attr(RTA_GATEWAY, obj.gateway))
        if ifindex:
            parts.append(_u32(RTA_OIF, ifindex))
    if obj.metric:
        parts.append(_u32(RTA_PRIORITY, obj.metric))
    body = b"".join(parts)
    if delete:
        return message(RTM_DELROUTE, 0, body)
    return message(RTM_NEWROUTE, NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL), body)


def dump_routes(family: Family, *, ifindex: int = 0, proto: int = 0) -> bytes:
    """Ask for the main table's routes of a family, on one device and/or of one protocol (strict checking)."""
    body = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, proto, 0, 0, 0)
    return message(RTM_GETROUTE, NLM_F_DUMP, body + (_u32(RTA_OIF, ifindex) if ifindex else b""))


def lookup_route(ip: IP) -> bytes:
    """Ask which route the kernel would take to an address (all rules and tables)."""
    family = Family.V4 if len(ip) == 4 else Family.V6
    return message(RTM_GETROUTE, 0, _RTMSG.pack(family, len(ip) * 8, 0, 0, 0, 0, 0, 0, 0) + attr(RTA_DST, ip))


def match_route(dst: Prefix) -> bytes:
    """Ask for the table entry, not the resolved way, that serves a block's first address (RTM_F_FIB_MATCH)."""
    family = Family.V4 if len(dst.ip) == 4 else Family.V6
    head = _RTMSG.pack(family, len(dst.ip) * 8, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    return message(RTM_GETROUTE, 0, head + attr(RTA_DST, dst.ip))


def parse_route(body: memoryview) -> tuple[tuple[int, ...], dict[int, bytes]]:
    """Header fields (family, dst_len, src_len, tos, table, protocol, scope, type, flags) and attributes."""
    return _RTMSG.unpack_from(body), attrs(body, _RTMSG.size)


def u32(value: bytes | None) -> int:
    """A 32-bit attribute in host order; 0 when absent."""
    return _U32.unpack(value)[0] if value and len(value) == 4 else 0


_SPECIAL: Final = (RTA_MULTIPATH, RTA_VIA, RTA_ENCAP)


def decode_route(body: memoryview, links: Mapping[int, str]) -> Route | None:
    """A unicast, blackhole or unreachable route of the main table, whichever device it is on.

    Devices not in ``links`` are written as ``#<index>``. Left out is what flannel never makes and what would
    look like a plain route here: multipath, policy tables, a TOS, another family's gateway, encapsulation.
    """
    family, length, _src, tos, table, proto, scope, kind, flags = _RTMSG.unpack_from(body)
    found = attrs(body, _RTMSG.size)
    if tos or (u32(found.get(RTA_TABLE)) or table) != RT_TABLE_MAIN or not found.keys().isdisjoint(_SPECIAL):
        return None
    if kind not in (RouteKind.UNICAST, RouteKind.BLACKHOLE, RouteKind.UNREACHABLE):
        return None
    size = 4 if family == Family.V4 else 16
    dst, gateway = found.get(RTA_DST, bytes(size)), found.get(RTA_GATEWAY)
    if len(dst) != size or length > size * 8 or (gateway is not None and len(gateway) != size):
        return None
    link, onlink = "", False
    if kind == RouteKind.UNICAST:  # the kernel hangs IPv6 blackholes on lo; for us they have no device
        oif = u32(found.get(RTA_OIF))
        link, onlink = links.get(oif) or f"#{oif}", bool(flags & RTNH_F_ONLINK)
    return Route(
        Prefix(IP(dst), length),
        link,
        IP(gateway) if gateway else None,
        onlink,
        RouteKind(kind),
        proto,
        u32(found.get(RTA_PRIORITY)),
        scope if size == 4 else 0,
    )


def nexthop_of(body: memoryview) -> tuple[int, int]:
    """(interface index, nexthop object's id or 0) of a route."""
    found = parse_route(body)[1]
    return u32(found.get(RTA_OIF)), u32(found.get(RTA_NH_ID))


def direct_device(body: memoryview) -> int:
    """Index of the device of a looked-up route if it is unicast without a gateway, else 0."""
    head, found = parse_route(body)
    return (
        0
        if head[7] != RTN_UNICAST or not found.keys().isdisjoint((RTA_GATEWAY, *_SPECIAL))
        else u32(found.get(RTA_OIF))
    )


# ---- addresses -------------------------------------------------------------------------------------


def address(obj: Address, ifindex: int, *, delete: bool = False) -> bytes:
    """Add (or refresh) or delete one address; global scope, no duplicate address detection (failures F43)."""
    nodad = 0x02 if len(obj.ip) == 16 else 0  # IFA_F_NODAD
    head = _IFADDR.pack(2 if len(obj.ip) == 4 else 10, obj.length, nodad, 0, ifindex)
    body = head + attr(IFA_LOCAL, obj.ip) + attr(IFA_ADDRESS, obj.ip)
    return message(RTM_DELADDR, 0, body) if delete else message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def dump_addresses(ifindex: int = 0) -> bytes:
    """Ask for addresses of both families, of one device or of all."""
    return message(RTM_GETADDR, NLM_F_DUMP, _IFADDR.pack(AF_UNSPEC, 0, 0, 0, ifindex))


def parse_address(body: memoryview) -> tuple[int, int, int, int, IP | None]:
    """(ifindex, prefix length, flags, scope, address) of an address message."""
    _family, length, flags, scope, ifindex = _IFADDR.unpack_from(body)
    found = attrs(body, _IFADDR.size)
    ip = _ip(found.get(IFA_LOCAL) or found.get(IFA_ADDRESS))
    return ifindex, length, u32(found.get(IFA_FLAGS)) or flags, scope, ip


# ---- links -----------------------------------------------------------------------------------------


def _vxlan_attrs(vx: Vxlan, *, create: bool, l2miss: bool = True) -> bytes:
    """IFLA_INFO_DATA of a device as contract 6.9 has it, plus ``l2miss``.

    A change in place names only what the kernel lets change on a live device (vxlan_changelink).
    """
    parts = [_u32(VX_ID, vx.vni)]
    if vx.lower:
        parts.append(_u32(VX_LINK, vx.lower))
    if vx.local:
        parts.append(attr(VX_LOCAL if len(vx.local) == 4 else VX_LOCAL6, vx.local))
    parts.append(_u8(VX_LEARNING, vx.learning))
    if create:
        parts += [
            attr(VX_PORT, _U16_NET.pack(vx.port)),
            _u8(VX_L2MISS, l2miss),
            *(_u8(kind, 0) for kind in (VX_TTL, VX_TOS, VX_PROXY, VX_RSC, VX_L3MISS)),
            *(_u8(kind, 0) for kind in (VX_ZERO_CSUM6_TX, VX_ZERO_CSUM6_RX)),
        ]
        if vx.gbp:
            parts.append(attr(VX_GBP, b""))
    return b"".join(parts)


def _link_common(obj: Link, vxlan: bytes) -> bytes:
    parts = [attr(IFLA_ADDRESS, obj.mac), _u32(IFLA_MTU, obj.mtu)]
    if vxlan:
        nested = attr(IFLA_INFO_KIND, b"vxlan") + attr(IFLA_INFO_DATA | NLA_F_NESTED, vxlan)
        parts.append(attr(IFLA_LINKINFO | NLA_F_NESTED, nested))
    return b"".join(parts)


def link_create(obj: Link, *, l2miss: bool = True) -> bytes:
    """Make a vxlan device, down. txqueuelen 0 as flannel's (contract 6.4)."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + attr(IFLA_IFNAME, obj.name.encode() + b"\0") + _u32(IFLA_TXQLEN, 0)
    vxlan = _vxlan_attrs(obj.vxlan, create=True, l2miss=l2miss) if obj.vxlan else b""
    return message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body + _link_common(obj, vxlan))


def link_set(obj: Link, was: Link | None, ifindex: int) -> list[bytes]:
    """Change a device in place: vxlan settings that differ, then MAC, MTU, up or down.

    Two messages, because the driver refuses an MTU beside its own settings (vxlan_nl2conf, "Cannot change mtu").
    """
    requests = []
    if obj.vxlan and was and was.vxlan != obj.vxlan:
        nested = attr(IFLA_INFO_KIND, b"vxlan")
        nested += attr(IFLA_INFO_DATA | NLA_F_NESTED, _vxlan_attrs(obj.vxlan, create=False))
        head = _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0)
        requests.append(message(RTM_NEWLINK, 0, head + attr(IFLA_LINKINFO | NLA_F_NESTED, nested)))
    body = _IFINFO.pack(AF_UNSPEC, 0, ifindex, IFF_UP if obj.up else 0, IFF_UP)
    if was is None or was.mac != obj.mac:
        body += attr(IFLA_ADDRESS, obj.mac)
    if was is None or was.mtu != obj.mtu:
        body += _u32(IFLA_MTU, obj.mtu)
    return [*requests, message(RTM_NEWLINK, 0, body)]


def link_alias(obj: Link, ifindex: int) -> bytes:
    """Set ``ifalias``; a message of its own because creation ignores the attribute."""
    return message(RTM_NEWLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0) + attr(IFLA_IFALIAS, obj.alias.encode()))


def link_delete(ifindex: int) -> bytes:
    """Remove a device."""
    return message(RTM_DELLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0))


def dump_links() -> bytes:
    """Ask for all devices, without statistics."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + _u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    return message(RTM_GETLINK, NLM_F_DUMP, body)


def _decode_vxlan(raw: bytes) -> Vxlan:
    found = attrs(raw, 0)
    return Vxlan(
        u32(found.get(VX_ID)),
        u32(found.get(VX_LINK)),
        _ip(found.get(VX_LOCAL) or found.get(VX_LOCAL6)),
        int.from_bytes(found.get(VX_PORT, b""), "big"),
        found.get(VX_LEARNING, b"\0") != b"\0",
        VX_GBP in found,
        _ip(found.get(VX_GROUP) or found.get(VX_GROUP6)),
    )


def decode_link(body: memoryview) -> tuple[int, Link]:
    """(ifindex, device) of a link message."""
    _family, _kind, ifindex, flags, _change = _IFINFO.unpack_from(body)
    found = attrs(body, _IFINFO.size)
    vxlan = None
    if IFLA_LINKINFO in found:
        info = attrs(found[IFLA_LINKINFO], 0)
        if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") == b"vxlan":
            vxlan = _decode_vxlan(info.get(IFLA_INFO_DATA, b""))
    return ifindex, Link(
        found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        MAC(found.get(IFLA_ADDRESS, b"")),
        u32(found.get(IFLA_MTU)),
        bool(flags & IFF_UP),
        found.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
        vxlan,
    )


def has_l2miss(body: memoryview) -> bool:
    """Whether a device of a link message is a vxlan one that tells of unknown MACs."""
    info = attrs(attrs(body, _IFINFO.size).get(IFLA_LINKINFO, b""), 0)
    if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") != b"vxlan":
        return False
    return attrs(info.get(IFLA_INFO_DATA, b""), 0).get(VX_L2MISS, b"\0") != b"\0"


def is_running(body: memoryview) -> bool:
    """Whether a device of a link message is up and has a carrier (IFF_RUNNING)."""
    flags: int = _IFINFO.unpack_from(body)[3]
    return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING


def parse_error(body: memoryview, flags: int) -> tuple[int, str]:
    """(errno, kernel's message) of an NLMSG_ERROR; errno 0 is an acknowledgement.

    The extended message (NLMSGERR_ATTR_MSG = 1) follows the echoed request, which NETLINK_CAP_ACK cuts
    to its header (NLM_F_CAPPED = 0x100); NLM_F_ACK_TLVS = 0x200 says that there is one.
    """
    echoed = HEADER_BYTES if flags & 0x100 else u32(bytes(body[4:8]))
    return _errno(body), _ext_ack(body, flags, 4 + ((echoed + 3) & ~3))


def parse_done(body: memoryview, flags: int) -> tuple[int, str]:
    """(errno, kernel's message) of an NLMSG_DONE: a dump that fails on its way says so at its end only.

    Source: net/netlink/af_netlink.c netlink_dump_done.
    """
    return _errno(body), _ext_ack(body, flags, 4)


def _errno(body: memoryview) -> int:
    return -int.from_bytes(body[:4], sys.byteorder, signed=True)


def _ext_ack(body: memoryview, flags: int, offset: int) -> str:
    return attrs(body, offset).get(1, b"").rstrip(b"\0").decode(errors="replace") if flags & 0x200 else ""
