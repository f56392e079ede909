"""Reads the host's interfaces, addresses and default routes, for choosing the external interface."""

from __future__ import annotations

from collections.abc import Iterable

from flanneld.kernel import rtnl_codec as nl
from flanneld.kernel.rtnl import Socket
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
        links = [(*nl.decode_link(body), nl.is_running(body)) for body in sock.dump_all(nl.dump_links())]
        addrs = [nl.parse_address(body) for body in sock.dump_all(nl.dump_addresses())]
        defaults = [d for family in Family for body in sock.dump_all(nl.dump_routes(family)) if (d := _default(body))]
        wanted = list(reach)
        answers = sock.ask([nl.lookup_route(ip) for ip in wanted]) if wanted else []
    finally:
        sock.close()
    return HostNet(
        tuple(LinkInfo(link.name, index, link.mtu, running) for index, link, running in links),
        tuple(AddrInfo.from_kernel(index, ip, length, flags) for index, length, flags, _scope, ip in addrs if ip),
        tuple(defaults),
        {ip: _reach(body) for ip, body in zip(wanted, answers, strict=True) if body is not None},
    )


def _default(body: memoryview) -> DefaultRoute | None:
    head, found = nl.parse_route(body)
    table = nl.u32(found.get(nl.RTA_TABLE)) or head[4]
    if head[1] or nl.RTA_DST in found or table != nl.RT_TABLE_MAIN or head[7] != nl.RTN_UNICAST:
        return None
    gateway = found.get(nl.RTA_GATEWAY)
    return DefaultRoute(
        Family(head[0]),
        nl.u32(found.get(nl.RTA_OIF)),
        IP(gateway) if gateway else None,
        nl.u32(found.get(nl.RTA_PRIORITY)),
    )


def _reach(body: memoryview) -> Reach:
    _head, found = nl.parse_route(body)
    source = found.get(nl.RTA_PREFSRC)
    return Reach(nl.u32(found.get(nl.RTA_OIF)), IP(source) if source else None)
