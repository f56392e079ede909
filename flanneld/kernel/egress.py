"""Through which interface this host sends to an address: the routing table's answer, policy rules included."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from flanneld.kernel import nlmsg, route_codec
from flanneld.kernel.nlsocket import BATCH_MESSAGES, Socket
from flanneld.model.addr import IP

RTA_SRC = 2  # include/uapi/linux/rtnetlink.h
_AF_INET = 2


def egress_interfaces(sock: Socket, addresses: Sequence[IP], source: IP) -> dict[IP, int]:
    """Interface index by address, for packets from one of our own addresses; absent where there is no route.

    Args:
        sock: where to ask.
        addresses: IPv4.
        source: a local IPv4 address; rules may route by it.

    Raises:
        KernelError: the kernel cannot be asked.
    """
    # One question differs from another in four bytes, and there are thousands at start.
    head = struct.pack("=8BI", _AF_INET, 32, 32, 0, 0, 0, 0, 0, 0)  # rtmsg; lengths of destination and source
    empty = IP(bytes(4))
    asked = head + nlmsg.attr(RTA_SRC, source) + nlmsg.attr(route_codec.RTA_DST, empty)
    question = nlmsg.message(nlmsg.RTM_GETROUTE, 0, asked)[:-4]
    found: dict[IP, int] = {}
    for start in range(0, len(addresses), BATCH_MESSAGES):
        part = addresses[start : start + BATCH_MESSAGES]
        for ip, body in zip(part, sock.ask([question + ip for ip in part]), strict=True):
            if body is not None and (ifindex := nlmsg.u32(route_codec.parse_route(body)[1].get(route_codec.RTA_OIF))):
                found[ip] = ifindex
    return found
