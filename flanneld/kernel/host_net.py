"""Reads the host's interfaces, addresses and default routes, for choosing the external interface."""

from __future__ import annotations

from collections.abc import Iterable

from flanneld.kernel import link_codec, nlmsg, route_codec
from flanneld.kernel.nlsocket import Socket
from flanneld.model.addr import IP, Family
from flanneld.model.host import AddrInfo, DefaultRoute, HostNet, LinkInfo, Reach


def read_host_net(reach: Iterable[IP] = ()) -> HostNet:
    """A snapshot of the host's network, in kernel order.

    Args:
        reach: addresses for which to ask the kernel how it would send to them.

    Raises:
        KernelError: netlink is not to be had.
    """
    sock = Socket()
    try:
        links = [
            (*link_codec.decode_link(body), link_codec.is_running(body))
            for body in sock.dump_all(link_codec.dump_links())
        ]
        addrs = [link_codec.parse_address(body) for body in sock.dump_all(link_codec.dump_addresses())]
        defaults = [
            d for family in Family for body in sock.dump_all(route_codec.dump_routes(family)) if (d := _default(body))
        ]
        wanted = list(reach)
        answers = sock.ask([route_codec.lookup_route(ip) for ip in wanted]) if wanted else []
    finally:
        sock.close()
    return HostNet(
        tuple(LinkInfo(link.name, index, link.mtu, running) for index, link, running in links),
        tuple(AddrInfo.from_kernel(index, ip, length, flags) for index, length, flags, _scope, ip in addrs if ip),
        tuple(defaults),
        {ip: _reach(body) for ip, body in zip(wanted, answers, strict=True) if body is not None},
    )


def _default(body: memoryview) -> DefaultRoute | None:
    head, found = route_codec.parse_route(body)
    table = nlmsg.u32(found.get(route_codec.RTA_TABLE)) or head[4]
    if (
        head[1]
        or route_codec.RTA_DST in found
        or table != route_codec.RT_TABLE_MAIN
        or head[7] != route_codec.RTN_UNICAST
    ):
        return None
    gateway = found.get(route_codec.RTA_GATEWAY)
    return DefaultRoute(
        Family(head[0]),
        nlmsg.u32(found.get(route_codec.RTA_OIF)),
        IP(gateway) if gateway else None,
        nlmsg.u32(found.get(route_codec.RTA_PRIORITY)),
    )


def _reach(body: memoryview) -> Reach:
    _head, found = route_codec.parse_route(body)
    source = found.get(route_codec.RTA_PREFSRC)
    return Reach(nlmsg.u32(found.get(route_codec.RTA_OIF)), IP(source) if source else None)
