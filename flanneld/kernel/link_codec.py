"""Messages of rtnetlink about devices and their addresses, to and from values. Frames: ``kernel/nlmsg.py``.

Sources: include/uapi/linux/{if_link,if_addr}.h.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping

from flanneld.kernel.nlmsg import (
    AF_UNSPEC,
    NLA_F_NESTED,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    attr,
    attrs,
    message,
    put_u8,
    put_u32,
    read_ip,
    u32,
)
from flanneld.model.addr import IP, MAC
from flanneld.model.objects import ARP_OFF, Address, Link, Vxlan

IFF_UP, IFF_RUNNING, IFF_NOARP = 0x1, 0x40, 0x80
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK = 1, 3, 4, 13, 18, 20, 29
IFLA_MASTER, IFLA_PROTO_DOWN, IFLA_PROTO_DOWN_REASON = 10, 39, 55
PROTO_DOWN_REASON_MASK, PROTO_DOWN_REASON_VALUE = 1, 2
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
RTEXT_FILTER_SKIP_STATS = 1 << 3

# enum in include/uapi/linux/if_link.h, IFLA_VXLAN_*
VX_ID, VX_GROUP, VX_LINK, VX_LOCAL, VX_TTL, VX_TOS, VX_LEARNING = 1, 2, 3, 4, 5, 6, 7
VX_PROXY, VX_RSC, VX_L2MISS, VX_L3MISS, VX_PORT, VX_GROUP6, VX_LOCAL6 = 11, 12, 13, 14, 15, 16, 17
VX_ZERO_CSUM6_TX, VX_ZERO_CSUM6_RX, VX_GBP, VX_LABEL, VX_DF = 19, 20, 23, 26, 29
_OUTER = {"ttl": VX_TTL, "tos": VX_TOS, "df": VX_DF, "flowlabel": VX_LABEL}
"""What outer packets say of their own; all 0 on ours (contract 6.9), and changed in place (vxlan_changelink)."""

MASTER = "master #"
"""In ``Link.extra``: the device is part of a bridge, a bond or a VRF."""
HELD_DOWN = "protodown on"
"""In ``Link.extra``: it is up and drops whatever is sent, as a daemon of link protocols asked for."""

_IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBi")  # ifaddrmsg: family, prefixlen, flags, scope, index
_U16_NET = struct.Struct("!H")


# ---- devices ---------------------------------------------------------------------------------------


def _vxlan_attrs(vx: Vxlan, *, create: bool, l2miss: bool = True) -> bytes:
    """IFLA_INFO_DATA of a device as contract 6.9 has it, plus ``l2miss``.

    A change in place names only what the kernel lets change on a live device (vxlan_changelink).
    """
    parts = [put_u32(VX_ID, vx.vni)]
    if vx.lower:
        parts.append(put_u32(VX_LINK, vx.lower))
    if vx.local:
        parts.append(attr(VX_LOCAL if len(vx.local) == 4 else VX_LOCAL6, vx.local))
    parts.append(put_u8(VX_LEARNING, vx.learning))
    if create:
        parts += [
            attr(VX_PORT, _U16_NET.pack(vx.port)),
            put_u8(VX_L2MISS, l2miss),
            *(put_u8(kind, 0) for kind in (VX_TTL, VX_TOS, VX_PROXY, VX_RSC, VX_L3MISS)),
            *(put_u8(kind, 0) for kind in (VX_ZERO_CSUM6_TX, VX_ZERO_CSUM6_RX)),
        ]
        if vx.gbp:
            parts.append(attr(VX_GBP, b""))
    return b"".join(parts)


def _link_common(obj: Link, vxlan: bytes) -> bytes:
    parts = [attr(IFLA_ADDRESS, obj.mac), put_u32(IFLA_MTU, obj.mtu)]
    if vxlan:
        nested = attr(IFLA_INFO_KIND, b"vxlan") + attr(IFLA_INFO_DATA | NLA_F_NESTED, vxlan)
        parts.append(attr(IFLA_LINKINFO | NLA_F_NESTED, nested))
    return b"".join(parts)


def link_create(obj: Link, *, l2miss: bool = True) -> bytes:
    """Make a vxlan device, down. txqueuelen 0 as flannel's (contract 6.4)."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + attr(IFLA_IFNAME, obj.name.encode() + b"\0") + put_u32(IFLA_TXQLEN, 0)
    vxlan = _vxlan_attrs(obj.vxlan, create=True, l2miss=l2miss) if obj.vxlan else b""
    return message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body + _link_common(obj, vxlan))


def link_set(obj: Link, was: Link | None, ifindex: int) -> list[bytes]:
    """Change a device in place: vxlan settings that differ, then MAC, MTU, up or down.

    Two messages, because the driver refuses an MTU beside its own settings (vxlan_nl2conf, "Cannot change mtu").
    What was ``extra`` is taken back: the master, the flags, and what outer packets said.
    """
    requests = []
    extra = was.extra if was else ""
    if obj.vxlan and was and (was.vxlan != obj.vxlan or extra):
        settings = _vxlan_attrs(obj.vxlan, create=False)
        settings += b"".join(_reset(kind) for name, kind in _OUTER.items() if f"{name} " in extra)
        nested = attr(IFLA_INFO_KIND, b"vxlan") + attr(IFLA_INFO_DATA | NLA_F_NESTED, settings)
        head = _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0)
        requests.append(message(RTM_NEWLINK, 0, head + attr(IFLA_LINKINFO | NLA_F_NESTED, nested)))
    change = IFF_UP | (IFF_NOARP if ARP_OFF in extra else 0)
    body = _IFINFO.pack(AF_UNSPEC, 0, ifindex, IFF_UP if obj.up else 0, change)
    if MASTER in extra:
        body += put_u32(IFLA_MASTER, 0)
    if HELD_DOWN in extra:
        no_reason = put_u32(PROTO_DOWN_REASON_MASK, 0xFFFFFFFF) + put_u32(PROTO_DOWN_REASON_VALUE, 0)
        body += attr(IFLA_PROTO_DOWN_REASON | NLA_F_NESTED, no_reason) + put_u8(IFLA_PROTO_DOWN, 0)
    if was is None or was.mac != obj.mac:
        body += attr(IFLA_ADDRESS, obj.mac)
    if was is None or was.mtu != obj.mtu:
        body += put_u32(IFLA_MTU, obj.mtu)
    return [*requests, message(RTM_NEWLINK, 0, body)]


def _reset(kind: int) -> bytes:
    return put_u32(kind, 0) if kind == VX_LABEL else put_u8(kind, 0)


def link_alias(obj: Link, ifindex: int) -> bytes:
    """Set ``ifalias``; a message of its own because creation ignores the attribute."""
    return message(RTM_NEWLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0) + attr(IFLA_IFALIAS, obj.alias.encode()))


def link_delete(ifindex: int) -> bytes:
    """Remove a device."""
    return message(RTM_DELLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0))


def get_link(ifindex: int) -> bytes:
    """Ask for one device."""
    return message(RTM_GETLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, ifindex, 0, 0))


def dump_links() -> bytes:
    """Ask for all devices, without statistics."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    return message(RTM_GETLINK, NLM_F_DUMP, body)


def _decode_vxlan(found: Mapping[int, bytes]) -> Vxlan:
    return Vxlan(
        u32(found.get(VX_ID)),
        u32(found.get(VX_LINK)),
        read_ip(found.get(VX_LOCAL) or found.get(VX_LOCAL6)),
        int.from_bytes(found.get(VX_PORT, b""), "big"),
        found.get(VX_LEARNING, b"\0") != b"\0",
        VX_GBP in found,
        read_ip(found.get(VX_GROUP) or found.get(VX_GROUP6)),
    )


def decode_link(body: memoryview) -> tuple[int, Link]:
    """(ifindex, device) of a link message."""
    _family, _kind, ifindex, flags, _change = _IFINFO.unpack_from(body)
    found = attrs(body, _IFINFO.size)
    vxlan, extra = None, []
    if master := u32(found.get(IFLA_MASTER)):
        extra.append(f"{MASTER}{master}")
    if IFLA_LINKINFO in found:
        info = attrs(found[IFLA_LINKINFO], 0)
        if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") == b"vxlan":
            data = attrs(info.get(IFLA_INFO_DATA, b""), 0)
            vxlan = _decode_vxlan(data)
            extra += [HELD_DOWN] if any(found.get(IFLA_PROTO_DOWN, b"")) else []
            extra += [ARP_OFF] if flags & IFF_NOARP else []  # a TUN device has the flag by nature
            values = {name: int.from_bytes(data.get(kind, b""), sys.byteorder) for name, kind in _OUTER.items()}
            extra += [f"{name} {value}" for name, value in values.items() if value]
    return ifindex, Link(
        found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        MAC(found.get(IFLA_ADDRESS, b"")),
        u32(found.get(IFLA_MTU)),
        bool(flags & IFF_UP),
        found.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
        vxlan,
        ", ".join(extra),
    )


def has_l2miss(body: memoryview) -> bool:
    """Whether a device of a link message is a vxlan one that tells of unknown MACs."""
    info = attrs(attrs(body, _IFINFO.size).get(IFLA_LINKINFO, b""), 0)
    if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0") != b"vxlan":
        return False
    return attrs(info.get(IFLA_INFO_DATA, b""), 0).get(VX_L2MISS, b"\0") != b"\0"


def kind_of(body: memoryview) -> str:
    """What made a device of a link message: ``bridge``, ``vxlan``, …; empty for real ones."""
    info = attrs(attrs(body, _IFINFO.size).get(IFLA_LINKINFO, b""), 0)
    return info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace")


def is_running(body: memoryview) -> bool:
    """Whether a device of a link message is up and has a carrier (IFF_RUNNING)."""
    flags: int = _IFINFO.unpack_from(body)[3]
    return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING


# ---- addresses -------------------------------------------------------------------------------------


def address(obj: Address, ifindex: int, *, delete: bool = False) -> bytes:
    """Add (or refresh) or delete one address; no duplicate address detection (failures F43)."""
    nodad = 0x02 if len(obj.ip) == 16 else 0  # IFA_F_NODAD
    head = _IFADDR.pack(2 if len(obj.ip) == 4 else 10, obj.length, nodad, obj.scope, ifindex)
    body = head + attr(IFA_LOCAL, obj.ip) + attr(IFA_ADDRESS, obj.peer or obj.ip)
    return message(RTM_DELADDR, 0, body) if delete else message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def dump_addresses(ifindex: int = 0) -> bytes:
    """Ask for addresses of both families, of one device or of all."""
    return message(RTM_GETADDR, NLM_F_DUMP, _IFADDR.pack(AF_UNSPEC, 0, 0, 0, ifindex))


def decode_address(body: memoryview, links: Mapping[int, str]) -> Address | None:
    """An address of whatever device; one that is not in ``links`` has no name."""
    ifindex, length, _flags, scope, ip = parse_address(body)
    if ip is None:
        return None
    other = read_ip(attrs(body, _IFADDR.size).get(IFA_ADDRESS))
    # of IPv6 the address itself says its scope
    return Address(links.get(ifindex, ""), ip, length, other if other != ip else None, scope if len(ip) == 4 else 0)


def parse_address(body: memoryview) -> tuple[int, int, int, int, IP | None]:
    """(ifindex, prefix length, flags, scope, address) of an address message."""
    _family, length, flags, scope, ifindex = _IFADDR.unpack_from(body)
    found = attrs(body, _IFADDR.size)
    ip = read_ip(found.get(IFA_LOCAL) or found.get(IFA_ADDRESS))
    return ifindex, length, u32(found.get(IFA_FLAGS)) or flags, scope, ip
