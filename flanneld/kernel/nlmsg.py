"""Frames of netlink: messages with header and attributes, acknowledgements. No sockets: bytes in, values out.

Encoders return whole messages with length, type and flags filled and sequence number 0; the socket
(``kernel/nlsocket.py``) numbers them. What the bodies say is the business of ``link_codec``, ``neigh_codec`` and
``route_codec``; a decoder there takes the body of one message (without the 16-byte header) as ``messages`` hands it
out, that is with its fixed part whole; whatever else is wrong with it it leaves out, and never raises.

Sources: include/uapi/linux/{netlink,rtnetlink}.h; RFC 3549. Byte order is the host's except addresses, MACs and
ports, which are in network order.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from flanneld.model.addr import IP, MAC

NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

AF_UNSPEC, AF_BRIDGE = 0, 7

HEADER = struct.Struct("=IHHII")  # nlmsghdr: len, type, flags, seq, pid
HEADER_BYTES = HEADER.size
ATTR = struct.Struct("=HH")  # nlattr: len, type
_U32 = struct.Struct("=I")

_FIXED_BYTES: Final[Mapping[int, int]] = {
    NLMSG_ERROR: 4,
    **dict.fromkeys((RTM_NEWLINK, RTM_DELLINK), 16),
    **dict.fromkeys((RTM_NEWADDR, RTM_DELADDR), 8),
    **dict.fromkeys((RTM_NEWROUTE, RTM_DELROUTE), 12),
    **dict.fromkeys((RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH), 12),
}
"""Length of the fixed part of a body (ifinfomsg, ifaddrmsg, rtmsg, ndmsg), by message type."""


def message(kind: int, flags: int, body: bytes) -> bytes:
    """One request with its header; the length covers the padded body."""
    return HEADER.pack(HEADER_BYTES + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = 4 + len(payload)
    return ATTR.pack(size, kind) + payload + b"\0" * (-size % 4)


def put_u32(kind: int, value: int) -> bytes:
    """One attribute of 32 bits in host order."""
    return ATTR.pack(8, kind) + _U32.pack(value)


def put_u8(kind: int, value: int) -> bytes:
    """One attribute of a byte."""
    return attr(kind, bytes((value,)))


def attrs(body: bytes | memoryview, offset: int) -> dict[int, bytes]:
    """Attributes of a message body by type; the last of one type wins, a broken tail is ignored."""
    found: dict[int, bytes] = {}
    end = len(body)
    while offset + 4 <= end:
        size, kind = ATTR.unpack_from(body, offset)
        if size < 4 or offset + size > end:
            break
        found[kind & NLA_TYPE_MASK] = bytes(body[offset + 4 : offset + size])
        offset += (size + 3) & ~3
    return found


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, int, memoryview]]:
    """Split a datagram into (type, flags, sequence, port id, body); what is cut short is left out."""
    view, offset, end = memoryview(datagram), 0, len(datagram)
    while offset + HEADER_BYTES <= end:
        size, kind, flags, seq, pid = HEADER.unpack_from(view, offset)
        if size < HEADER_BYTES or offset + size > end:
            return
        if size - HEADER_BYTES >= _FIXED_BYTES.get(kind, 0):
            yield kind, flags, seq, pid, view[offset + HEADER_BYTES : offset + size]
        offset += (size + 3) & ~3


def u32(value: bytes | None) -> int:
    """A 32-bit attribute in host order; 0 when absent."""
    return _U32.unpack(value)[0] if value and len(value) == 4 else 0


def read_ip(raw: bytes | None) -> IP | None:
    """An address attribute of either family; None when absent or of another length."""
    return IP(raw) if raw is not None and len(raw) in (4, 16) else None


def read_mac(raw: bytes | None) -> MAC | None:
    """A MAC attribute; None when absent or of another length."""
    return MAC(raw) if raw is not None and len(raw) == 6 else None


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
