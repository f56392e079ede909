"""What this host looks like to the daemon: its external interface and who it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flanneld.model.addr import IP, Family, Prefix
from flanneld.model.objects import Route

# include/uapi/linux/if_addr.h
IFA_F_TEMPORARY = 0x01
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_PERMANENT = 0x80


class ExtIface(NamedTuple):
    """The external interface, as selected (contract section 5)."""

    name: str
    ifindex: int
    mtu: int
    """Bytes, as the kernel reports it."""
    ip: IP | None
    """The interface's own IPv4 address; source of tunnel packets."""
    ip6: IP | None
    public_ip: IP | None
    """What peers are told to send to; differs from ``ip`` behind NAT."""
    public_ip6: IP | None
    broadcast: IP | None = None
    """Of the segment that ``ip`` is in; None where there is none."""

    def local(self, family: Family) -> IP | None:
        """The interface's own address of a family."""
        return self.ip if family is Family.V4 else self.ip6

    def public(self, family: Family) -> IP | None:
        """The advertised address of a family."""
        return self.public_ip if family is Family.V4 else self.public_ip6

    def addresses(self) -> frozenset[IP]:
        """All that lead here, the interface's own and what is advertised."""
        return frozenset(filter(None, (self.ip, self.ip6, self.public_ip, self.public_ip6)))


class LinkInfo(NamedTuple):
    """One network interface."""

    name: str
    ifindex: int
    mtu: int
    up: bool
    """Switched on, and with a carrier."""
    kind: str = ""
    """What made it: ``bridge``, ``vxlan``, …; empty for real ones."""


class AddrInfo(NamedTuple):
    """One address of one interface, with what matters for choosing among several (contract 5.9)."""

    ifindex: int
    ip: IP
    prefixlen: int
    deprecated: bool = False
    """Its preferred lifetime is over: good for old connections only (RFC 4862 section 5.5.4)."""
    temporary: bool = False
    """An IPv6 privacy address (RFC 8981); it will be gone tomorrow."""
    permanent: bool = True
    """Without lifetime; false for what DHCP or a router advertisement gave."""
    duplicate: bool = False
    """Duplicate address detection failed, so the kernel refuses to send from it."""

    def broadcast(self) -> IP | None:
        """The last address of the segment; None for IPv6 and for links of two (RFC 3021)."""
        if len(self.ip) != 4 or self.prefixlen > 30:
            return None
        return IP(Prefix(self.ip, self.prefixlen).last.to_bytes(4, "big"))

    @staticmethod
    def from_kernel(ifindex: int, ip: IP, prefixlen: int, flags: int) -> AddrInfo:
        """Decode the flags of RTM_NEWADDR.

        Args:
            ifindex: index of the interface.
            ip: the interface's own address (IFA_LOCAL when present, else IFA_ADDRESS).
            prefixlen: 0 to 32 or 128.
            flags: IFA_FLAGS when present (32 bits), else ``ifa_flags`` of the header.

        Source: include/uapi/linux/if_addr.h. Bit 0 is IFA_F_TEMPORARY for IPv6 only; for IPv4 the same
        bit is IFA_F_SECONDARY and says nothing about lifetime.
        """
        return AddrInfo(
            ifindex,
            ip,
            prefixlen,
            deprecated=bool(flags & IFA_F_DEPRECATED),
            temporary=bool(flags & IFA_F_TEMPORARY) and len(ip) == 16,
            permanent=bool(flags & IFA_F_PERMANENT),
            duplicate=bool(flags & IFA_F_DADFAILED),
        )


class DefaultRoute(NamedTuple):
    """A default route of the main table (no destination, or a destination of length 0)."""

    family: Family
    ifindex: int
    """Output interface; 0 = several next hops, so no single one (contract 5.8)."""
    gateway: IP | None
    metric: int


class Reach(NamedTuple):
    """The kernel's answer to "how would you send to that address?" (RTM_GETROUTE)."""

    ifindex: int
    source: IP | None
    """Preferred source address (RTA_PREFSRC)."""


class HostNet(NamedTuple):
    """A snapshot of the host's network, everything in the order in which the kernel lists it."""

    links: tuple[LinkInfo, ...]
    addrs: tuple[AddrInfo, ...]
    defaults: tuple[DefaultRoute, ...] = ()
    reach: Mapping[IP, Reach] = {}
    """Answers for the addresses that were asked for; without route = absent."""
    inside: tuple[Route, ...] = ()
    """Unicast routes of the main table into the blocks that were asked for, whoever made them."""
    serving: Mapping[IP, Route] = {}
    """By address that was asked for, the entry of the main table by which packets to it leave; absent: there is none,
    another table has it, or it is more than one way."""

    def link(self, name: str) -> LinkInfo | None:
        """The interface of a name."""
        return next((link for link in self.links if link.name == name), None)

    def link_at(self, ifindex: int) -> LinkInfo | None:
        """The interface of an index."""
        return next((link for link in self.links if link.ifindex == ifindex), None)


class IfaceWish(NamedTuple):
    """What the operator said about the external interface, as typed (contract 5.2, 5.3)."""

    iface: tuple[str, ...] = ()
    """``--iface``: names or addresses, in order."""
    iface_regex: tuple[str, ...] = ()
    """``--iface-regex``, in order."""
    can_reach: str = ""
    """``--iface-can-reach``; its address must be resolved in ``HostNet.reach``."""
    public_ip: str = ""
    public_ipv6: str = ""
