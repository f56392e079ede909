"""Messages of rtnetlink about routes, to and from values. Frames: ``kernel/nlmsg.py``.

Sources: include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

from flanneld.kernel.nlmsg import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELROUTE,
    RTM_GETROUTE,
    RTM_NEWROUTE,
    attr,
    attrs,
    message,
    put_u32,
    read_ip,
    u32,
)
from flanneld.model.addr import IP, Family, Prefix, format_ip
from flanneld.model.objects import Route, RouteKind

RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
RTM_F_LOOKUP_TABLE, RTM_F_FIB_MATCH = 0x1000, 0x2000
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE = (
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    15,
)
RTA_VIA, RTA_ENCAP, RTA_NH_ID = 18, 22, 30
RTAX_LOCK = 1
_METRICS: Final = (
    "unspec", "lock", "mtu", "window", "rtt", "rttvar", "ssthresh", "cwnd", "advmss", "reordering", "hoplimit",
    "initcwnd", "features", "rto_min", "initrwnd", "quickack", "congctl", "fastopen_no_cookie",
)  # fmt: skip
"""RTAX_* by number, as ``ip route`` calls them."""

_RTMSG = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTNH = struct.Struct("=HBBi")  # rtnexthop: len, flags, hops, ifindex


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
        parts.append(put_u32(RTA_NH_ID, nexthop))
    else:
        if obj.gateway:
            parts.append(attr(RTA_GATEWAY, obj.gateway))
        if ifindex:
            parts.append(put_u32(RTA_OIF, ifindex))
    if obj.metric:
        parts.append(put_u32(RTA_PRIORITY, obj.metric))
    body = b"".join(parts)
    if delete:
        return message(RTM_DELROUTE, 0, body)
    return message(RTM_NEWROUTE, NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL), body)


def dump_routes(family: Family, *, ifindex: int = 0, proto: int = 0) -> bytes:
    """Ask for the main table's routes of a family, on one device and/or of one protocol (strict checking)."""
    body = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, proto, 0, 0, 0)
    return message(RTM_GETROUTE, NLM_F_DUMP, body + (put_u32(RTA_OIF, ifindex) if ifindex else b""))


def lookup_route(ip: IP) -> bytes:
    """Ask which route the kernel would take to an address (all rules and tables), and of which table it is."""
    family = Family.V4 if len(ip) == 4 else Family.V6
    flags = RTM_F_LOOKUP_TABLE if family is Family.V4 else 0  # IPv6 says it unasked, and refuses the flag
    return message(RTM_GETROUTE, 0, _RTMSG.pack(family, len(ip) * 8, 0, 0, 0, 0, 0, 0, flags) + attr(RTA_DST, ip))


def match_route(dst: Prefix) -> bytes:
    """Ask for the table entry, not the resolved way, that serves a block's first address (RTM_F_FIB_MATCH)."""
    family = Family.V4 if len(dst.ip) == 4 else Family.V6
    head = _RTMSG.pack(family, len(dst.ip) * 8, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    return message(RTM_GETROUTE, 0, head + attr(RTA_DST, dst.ip))


def parse_route(body: memoryview) -> tuple[tuple[int, ...], dict[int, bytes]]:
    """Header fields (family, dst_len, src_len, tos, table, protocol, scope, type, flags) and attributes."""
    return _RTMSG.unpack_from(body), attrs(body, _RTMSG.size)


_SPECIAL: Final = (RTA_MULTIPATH, RTA_VIA, RTA_ENCAP)
_MORE: Final = (*_SPECIAL, RTA_METRICS, RTA_PREFSRC)
_KINDS: Final = frozenset(RouteKind)


def decode_route(body: memoryview, links: Mapping[int, str]) -> Route | None:
    """A route of the main table that leads somewhere or nowhere, whichever device it is on.

    Devices not in ``links`` are written as ``#<index>``. What flannel never makes of a route, such as an MTU or
    several next hops, is in ``extra``, so that it never looks like one of ours. Left out is what stands beside
    ours without touching it: other tables, and routes for a TOS.
    """
    family, length, _src, tos, table, proto, scope, kind, flags = _RTMSG.unpack_from(body)
    found = attrs(body, _RTMSG.size)
    if tos or (u32(found.get(RTA_TABLE)) or table) != RT_TABLE_MAIN or kind not in _KINDS:
        return None
    size = 4 if family == Family.V4 else 16
    extra = "" if found.keys().isdisjoint(_MORE) else " ".join(_more(found))
    if kind == RTN_UNICAST and RTA_MULTIPATH in found:
        flags = _first_hop(found, flags)
    dst, gateway = found.get(RTA_DST, bytes(size)), found.get(RTA_GATEWAY)
    if len(dst) != size or length > size * 8 or (gateway is not None and len(gateway) != size):
        return None
    link, onlink = "", False
    if kind == RTN_UNICAST:  # the kernel hangs IPv6 blackholes on lo; for us they have no device
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
        extra,
    )


def _more(found: Mapping[int, bytes]) -> Iterator[str]:
    """In the words of ``ip route``, what our routes never say."""
    for kind, value in attrs(found.get(RTA_METRICS, b""), 0).items():
        if kind != RTAX_LOCK:
            name = _METRICS[kind] if kind < len(_METRICS) else f"metric#{kind}"
            yield f"{name} {u32(value)}" if len(value) == 4 else name
    if (source := read_ip(found.get(RTA_PREFSRC))) is not None:
        yield f"src {format_ip(source)}"
    if RTA_MULTIPATH in found:
        yield f"nexthops {len(list(_hops(found[RTA_MULTIPATH])))}"
    if RTA_VIA in found:
        yield "via another family"
    if RTA_ENCAP in found:
        yield "encap"


def _hops(raw: bytes) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """(flags, interface index, attributes) of each next hop of a multipath route."""
    offset = 0
    while offset + _RTNH.size <= len(raw):
        size, flags, _weight, index = _RTNH.unpack_from(raw, offset)
        if size < _RTNH.size:
            return
        yield flags, index, attrs(raw[: offset + size], offset + _RTNH.size)
        offset += (size + 3) & ~3


def _first_hop(found: dict[int, bytes], flags: int) -> int:
    """Take the first of several next hops for the route's own: it says whose the route is. Its flags."""
    for hop_flags, index, attributes in _hops(found[RTA_MULTIPATH]):
        found[RTA_OIF] = struct.pack("=i", index)
        if RTA_GATEWAY in attributes:
            found[RTA_GATEWAY] = attributes[RTA_GATEWAY]
        return hop_flags
    return flags


def nexthop_of(body: memoryview) -> tuple[int, int]:
    """(interface index, nexthop object's id or 0) of a route."""
    found = parse_route(body)[1]
    return u32(found.get(RTA_OIF)), u32(found.get(RTA_NH_ID))


def way_of(body: memoryview) -> tuple[int, int]:
    """(table, interface index) of a looked-up route."""
    head, found = parse_route(body)
    return u32(found.get(RTA_TABLE)) or head[4], u32(found.get(RTA_OIF))


def direct_device(body: memoryview) -> int:
    """Index of the device of a looked-up route if it is unicast without a gateway, else 0."""
    head, found = parse_route(body)
    return (
        0
        if head[7] != RTN_UNICAST or not found.keys().isdisjoint((RTA_GATEWAY, *_SPECIAL))
        else u32(found.get(RTA_OIF))
    )
