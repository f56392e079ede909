"""Messages of rtnetlink about neighbours and forwarding entries, to and from values. Frames: ``kernel/nlmsg.py``.

Sources: include/uapi/linux/neighbour.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from flanneld.kernel.nlmsg import (
    AF_BRIDGE,
    AF_UNSPEC,
    ATTR,
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REPLACE,
    RTM_DELNEIGH,
    RTM_GETNEIGH,
    RTM_NEWNEIGH,
    attr,
    attrs,
    message,
    put_u32,
    read_ip,
    read_mac,
    u32,
)
from flanneld.model.addr import IP, MAC, Family
from flanneld.model.objects import Fdb, Neighbour

RTM_SETNEIGHTBL = 67
NDTA_NAME, NDTA_PARMS, NDTPA_IFINDEX = 1, 6, 1

NUD_INCOMPLETE, NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x01, 0x02, 0x04, 0x08, 0x10
NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x20, 0x40, 0x80
NUD_ANSWERED = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_NOARP
NTF_SELF = 0x02
RTN_UNICAST = 1  # the type of every entry

NDA_DST, NDA_LLADDR, NDA_CACHEINFO, NDA_PORT, NDA_VNI, NDA_IFINDEX, NDA_NH_ID = 1, 2, 3, 6, 7, 8, 13

_NDMSG = struct.Struct("=BxxxiHBB")  # ndmsg: family, ifindex, state, flags, type


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
    parms = put_u32(NDTPA_IFINDEX, ifindex) + put_u32(NEIGH_SETTINGS[name], value)
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
    return message(RTM_GETNEIGH, NLM_F_DUMP, _NDMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + put_u32(NDA_IFINDEX, ifindex))


def parse_neigh(body: memoryview) -> tuple[int, int, int, dict[int, bytes]]:
    """Header fields and attributes of a neighbour message: (family, ifindex, state, attributes)."""
    family, ifindex, state, _flags, _kind = _NDMSG.unpack_from(body)
    return family, ifindex, state, attrs(body, _NDMSG.size)


def decode_unresolved(body: memoryview, links: Mapping[int, str]) -> tuple[str, IP] | None:
    """Device and address of a neighbour that the kernel is still asking for; None for any other."""
    _family, ifindex, state, found = parse_neigh(body)
    link, ip = links.get(ifindex), read_ip(found.get(NDA_DST))
    return (link, ip) if link and ip and state & NUD_INCOMPLETE else None


# The usual forwarding entry, whole: MAC, IPv4 address, times of use. Thousands of them are announced when thousands
# of peers come or go (the driver does not say on whose behalf, so echoes cannot be told), hence a way without a dict.
_FDB4 = struct.Struct("=4s6sH4s4s")
_FDB4_BYTES = _NDMSG.size + _FDB4.size + 20  # and nda_cacheinfo
_LLADDR_HEAD, _DST4_HEAD = ATTR.pack(10, NDA_LLADDR), ATTR.pack(8, NDA_DST)


def decode_neigh(body: memoryview, links: Mapping[int, str], *, any_state: bool = False) -> Neighbour | Fdb | None:
    """A neighbour or forwarding entry on one of the named links; None for what does not concern us.

    Unresolved and failed neighbours and those of multicast and broadcast addresses belong to the kernel
    and are left out of states. ``any_state`` lets neighbours of every
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
    dst, mac = read_ip(found.get(NDA_DST)), read_mac(found.get(NDA_LLADDR))
    if mac is None and any_state and NDA_LLADDR not in found:
        mac = MAC(b"")
    if dst is None and NDA_NH_ID in found:
        dst = IP(bytes(4))  # a forwarding entry that names nexthop objects has no address
    if dst is None or mac is None:
        return None
    if family != AF_BRIDGE:
        if state & NUD_NOARP and (dst[0] == 0xFF or (len(dst) == 4 and dst[0] >= 224)):
            return None
        return Neighbour(link, dst, mac, bool(state & NUD_PERMANENT))
    # One with a port, VNI or device of its own leads elsewhere, whatever its address: it reads as "nowhere",
    # which no peer is, so it gets replaced; and naming no address deletes it whatever else it says.
    elsewhere = any(kind in found for kind in (NDA_PORT, NDA_VNI, NDA_IFINDEX))
    return Fdb(link, mac, IP(bytes(len(dst))) if elsewhere else dst, bool(state & NUD_PERMANENT))


def decode_miss(body: memoryview) -> tuple[int, IP | None, MAC | None]:
    """(ifindex, address asked for, MAC asked for) of an RTM_GETNEIGH; what is absent or no address is None."""
    _family, ifindex, _state, found = parse_neigh(body)
    return ifindex, read_ip(found.get(NDA_DST)), read_mac(found.get(NDA_LLADDR))


def decode_idle(body: memoryview) -> tuple[MAC, float]:
    """MAC and seconds since last use of a forwarding entry.

    ``used`` is the second word of nda_cacheinfo, in clock ticks of 1/100 s (USER_HZ) on every architecture
    Linux runs on today but alpha and ia64.
    """
    found = parse_neigh(body)[3]
    cache = found.get(NDA_CACHEINFO, b"")
    used = u32(cache[4:8]) / 100
    return MAC(found.get(NDA_LLADDR, b"")), used
