"""Settings of a device below ``/proc/sys/net/ipv4/conf`` as netlink has them; containers cannot write to /proc/sys.

Source: net/ipv4/devinet.c, inet_set_link_af; the numbers are IPV4_DEVCONF_* of include/uapi/linux/ip.h.
IPv6 has no such message: net/ipv6/addrconf.c, inet6_set_link_af, takes the token and the address mode only.
"""

from __future__ import annotations

import struct
from typing import Final

from flanneld.kernel.nlmsg import NLA_F_NESTED, RTM_NEWLINK, attr, message, put_u32

IFLA_AF_SPEC, IFLA_INET_CONF = 26, 1
AF_UNSPEC, AF_INET = 0, 2

IPV4_SETTINGS: Final = {"arp_ignore": 19}


def ipv4_setting(ifindex: int, name: str, value: int) -> bytes:
    """Set one of ``IPV4_SETTINGS`` of a device."""
    values = attr(IFLA_INET_CONF | NLA_F_NESTED, put_u32(IPV4_SETTINGS[name], value))
    body = struct.pack("=BxHiII", AF_UNSPEC, 0, ifindex, 0, 0)  # ifinfomsg
    return message(RTM_NEWLINK, 0, body + attr(IFLA_AF_SPEC | NLA_F_NESTED, attr(AF_INET | NLA_F_NESTED, values)))
