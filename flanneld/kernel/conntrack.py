"""The kernel's table of connections: only whether this host's firewall rewrites packets of its own tunnel.

The kernel filters while it walks the table (Linux 5.8 and later), so that a table of any size costs a walk and an
answer of a few entries. Linux before that ignores the filter and would send all it has.

Source: include/uapi/linux/netfilter/{nfnetlink,nfnetlink_conntrack,nf_conntrack_common}.h; the bits of the filter
are in net/netfilter/nf_internals.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from flanneld.errors import KernelError
from flanneld.kernel import nlmsg, procfs
from flanneld.model.addr import IP, Family, family_of, format_ip

NETLINK_NETFILTER = 12
CT_NEW, CT_GET = 1 << 8, 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_FILTER, CTA_STATUS_MASK = 1, 2, 3, 25, 26
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_SRC, CTA_IP_DST = {4: 1, 16: 3}, {4: 2, 16: 4}
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS = 1
BY_PROTOCOL, BY_TARGET_PORT = 1 << 3, 1 << 5
IPS_SRC_NAT, IPS_DST_NAT = 0x10, 0x20
NFGENMSG_BYTES = 4
ANSWER_BYTES = 1 << 16
TIMEOUT_S = 5.0

COUNT = procfs.PROC_SYS / "net/netfilter/nf_conntrack_count"


class Rewritten(NamedTuple):
    """A flow of tunnel packets, as this host made it and as it leaves."""

    source: tuple[IP, int]
    target: tuple[IP, int]
    source_after: tuple[IP, int]
    target_after: tuple[IP, int]

    def __str__(self) -> str:
        before = f"{_end(self.source)} > {_end(self.target)}"
        return f"{before} leaves as {_end(self.source_after)} > {_end(self.target_after)}"


def rewritten(source: IP, port: int) -> Rewritten | None:
    """A flow from an address of ours to a UDP port whose source or target a NAT rule of this host changes; any one.

    Costs two walks through the table, each 16 ms for 262144 buckets even when they are empty (measured).

    Raises:
        KernelError: the kernel does not tell: no ``nf_conntrack_netlink``, or older than 5.8.
    """
    if (procfs.look(COUNT) or "0") == "0":
        return None  # nothing tracks connections here, and asking would load the module
    for status in (IPS_SRC_NAT, IPS_DST_NAT):
        if (found := _first(request(family_of(source), port, status), status, source)) is not None:
            return found
    return None


def request(family: Family, port: int, status: int) -> bytes:
    """Ask for the flows to a UDP port that have a bit of their status set.

    Not by source: asked for an IPv6 one, the kernel leaves out just those flows (seen on 6.18).
    """
    protocol = nlmsg.attr(CTA_PROTO_NUM, bytes((socket.IPPROTO_UDP,)))
    protocol += nlmsg.attr(CTA_PROTO_DST_PORT, struct.pack("!H", port))
    flags = nlmsg.put_u32(CTA_FILTER_ORIG_FLAGS, BY_PROTOCOL | BY_TARGET_PORT)
    body = struct.pack("=BBH", family, 0, 0)
    body += _nested(CTA_TUPLE_ORIG, _nested(CTA_TUPLE_PROTO, protocol))
    body += _nested(CTA_FILTER, flags)
    body += nlmsg.attr(CTA_STATUS, struct.pack("!I", status)) + nlmsg.attr(CTA_STATUS_MASK, struct.pack("!I", status))
    return nlmsg.message(CT_GET, nlmsg.NLM_F_DUMP, body)


def decode(body: memoryview) -> tuple[int, Rewritten | None]:
    """Status and flow of one entry; None for what has no ports."""
    found = nlmsg.attrs(body, NFGENMSG_BYTES)
    status = found.get(CTA_STATUS, b"")
    orig, reply = _tuple(found.get(CTA_TUPLE_ORIG, b"")), _tuple(found.get(CTA_TUPLE_REPLY, b""))
    number = int.from_bytes(status, "big")
    # what leaves is the answer's tuple turned round
    return number, Rewritten(orig[0], orig[1], reply[1], reply[0]) if orig and reply else None


def _first(message: bytes, status: int, source: IP) -> Rewritten | None:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.send(message)
            while True:
                for kind, flags, _seq, _pid, body in nlmsg.messages(sock.recv(ANSWER_BYTES)):
                    if kind == nlmsg.NLMSG_DONE:
                        return None
                    if kind == nlmsg.NLMSG_ERROR:
                        code, text = nlmsg.parse_error(body, flags)
                        raise KernelError("look for rewritten tunnel packets", code, text)
                    number, flow = decode(body)
                    if not number & status:
                        raise KernelError("look for rewritten tunnel packets", errno.EOPNOTSUPP)
                    if flow is not None and flow.source[0] == source:
                        return flow
    except OSError as exc:
        raise KernelError("look for rewritten tunnel packets", exc.errno or errno.ETIMEDOUT) from exc


def _tuple(raw: bytes) -> tuple[tuple[IP, int], tuple[IP, int]] | None:
    """Source and target of a nested tuple."""
    parts = nlmsg.attrs(raw, 0)
    addresses = nlmsg.attrs(parts.get(CTA_TUPLE_IP, b""), 0)
    ports = nlmsg.attrs(parts.get(CTA_TUPLE_PROTO, b""), 0)
    ends = []
    for kinds, port in ((CTA_IP_SRC, CTA_PROTO_SRC_PORT), (CTA_IP_DST, CTA_PROTO_DST_PORT)):
        ip = next((addresses[kind] for kind in kinds.values() if len(addresses.get(kind, b"")) in (4, 16)), None)
        if ip is None or len(ports.get(port, b"")) != 2:
            return None
        ends.append((IP(ip), int.from_bytes(ports[port], "big")))
    return ends[0], ends[1]


def _nested(kind: int, payload: bytes) -> bytes:
    return nlmsg.attr(kind | nlmsg.NLA_F_NESTED, payload)


def _end(end: tuple[IP, int]) -> str:
    ip, port = end
    return f"{format_ip(ip)}:{port}" if family_of(ip) is Family.V4 else f"[{format_ip(ip)}]:{port}"
