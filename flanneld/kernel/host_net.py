"""Reads the host's interfaces, addresses and routes: to choose the external interface, and to see what overlaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from flanneld.kernel import link_codec, nlmsg, route_codec
from flanneld.kernel.nlsocket import Socket
from flanneld.model.addr import IP, Family, Prefix
from flanneld.model.host import AddrInfo, DefaultRoute, HostNet, LinkInfo, Reach
from flanneld.model.objects import Route, RouteKind


def read_host_net(reach: Iterable[IP] = (), inside: Iterable[Prefix] = (), served: Iterable[IP] = ()) -> HostNet:
    """A snapshot of the host's network, in kernel order.

    Args:
        reach: addresses for which to ask the kernel how it would send to them.
        inside: blocks whose routes are wanted.
        served: addresses for which the entry of the main table is wanted.

    Raises:
        KernelError: netlink is not to be had.
    """
    sock, wanted, served = Socket(), list(reach), list(served)
    try:
        links = sock.dump_all(link_codec.dump_links())
        addrs = [link_codec.parse_address(body) for body in sock.dump_all(link_codec.dump_addresses())]
        routes = [body for family in Family for body in sock.dump_all(route_codec.dump_routes(family))]
        answers = sock.ask([route_codec.lookup_route(ip) for ip in wanted]) if wanted else []
        entries = sock.ask([route_codec.match_route(Prefix(ip, len(ip) * 8)) for ip in served]) if served else []
    finally:
        sock.close()
    infos = tuple(map(_link, links))
    names = {link.ifindex: link.name for link in infos}
    return HostNet(
        infos,
        tuple(AddrInfo.from_kernel(index, ip, length, flags) for index, length, flags, _scope, ip in addrs if ip),
        tuple(default for body in routes if (default := _default(body))),
        {ip: _reach(body) for ip, body in zip(wanted, answers, strict=True) if body is not None},
        tuple(_inside(routes, tuple(inside), names)),
        {ip: route for ip, body in zip(served, entries, strict=True) if (route := _entry(body, names))},
    )


def _link(body: memoryview) -> LinkInfo:
    index, link = link_codec.decode_link(body)
    return LinkInfo(link.name, index, link.mtu, link_codec.is_running(body), link_codec.kind_of(body))


def _inside(routes: Iterable[memoryview], blocks: Sequence[Prefix], names: Mapping[int, str]) -> Iterator[Route]:
    shortest = min((block.length for block in blocks), default=None)
    for body in routes:
        if shortest is None or body[1] < shortest:  # rtm_dst_len; thousands of others need not be decoded
            continue
        route = _entry(body, names)
        if route and any(block.covers(route.dst) for block in blocks):
            yield route


def _entry(body: memoryview | None, names: Mapping[int, str]) -> Route | None:
    """A unicast route of the main table."""
    route = route_codec.decode_route(body, names) if body is not None else None
    return route if route and route.kind is RouteKind.UNICAST else None


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
