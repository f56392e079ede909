"""Whether the cluster network stands where this host has other networks already (failure F22). Pure.

What decides is which route a packet takes. The longest prefix wins, so a network that merely contains ours (a default
route, 10.0.0.0/8 to a gateway) does no harm; one that is equal to ours or lies in it takes packets from peers, or is
taken by them. Not looked at: single addresses, other routing tables, and what only looks foreign:

- devices and routes of ours, of a former run, of Go flanneld (``plan/ownership.py``);
- whatever stands in a subnet that this host has or had: bridges, routes to pods;
- bridges of a lease's size elsewhere: a former lease's, told by ``plan/bridges.py``;
- routes of a lease's size to other hosts: Go's direct ones, and what a routing daemon made of peers' leases;
- what lies outside of the range that subnets are leased from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flanneld.model.addr import IP, Family, Prefix, family_of, format_ip
from flanneld.model.host import ExtIface, HostNet
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.model.objects import METRIC_V6, PROTO_OURS, Route

ROUTING_DAEMONS = frozenset({8, 11, 12, 14, 42, 186, 187, 188, 189, 192})
"""gated, zebra, bird, xorp, babel, bgp, isis, ospf, rip, eigrp (include/uapi/linux/rtnetlink.h, RTPROT_*)."""

WITHOUT_COVERING_ROUTE = frozenset({"host-gw"})
"""Backends that route to peers only; the others have one route for the whole network."""

WITHOUT_ROUTES = frozenset({"alloc"})

MOST_TOLD = 3
"""Overlaps that are told one by one."""


class Mine(NamedTuple):
    """What of this host belongs to the network."""

    ext: ExtIface
    devices: frozenset[str]
    """Devices of ours and of other flannels."""
    subnets: tuple[Prefix, ...]
    """Ours, and those that this host had: containers may still stand in them."""
    allocates: bool = True
    """Whether subnets are cut out of the network by ``SubnetLen`` and its companions (contract 9.15)."""


class Needed(NamedTuple):
    """An address that this host cannot do without."""

    ip: IP
    what: str
    """``the etcd server of --etcd-endpoints``."""


class Overlap(NamedTuple):
    """One overlap, in words."""

    network: Prefix
    """The cluster's."""
    what: str
    """``Network 10.244.0.0/16 contains …``."""
    harm: str
    remedy: str
    fatal: bool
    """Worth refusing to start: this host did not serve the network until now, or would be cut off by doing so."""

    def __str__(self) -> str:
        return f"{self.what}: {self.harm}"


def overlaps(conf: NetConf, host: HostNet, mine: Mine, needed: Iterable[Needed] = ()) -> list[Overlap]:
    """What of this host's networks and addresses overlaps the cluster's, the worst first.

    Args:
        conf: the network configuration.
        host: the host; ``inside`` for the cluster networks, ``serving`` for the needed addresses in them.
        mine: what of it is ours.
        needed: addresses that have to stay within reach.
    """
    if conf.backend_type in WITHOUT_ROUTES:
        return []
    found: list[Overlap] = []
    for family in conf.families():
        if part := conf.family(family):
            judge = _Judge(part, conf.backend_type not in WITHOUT_COVERING_ROUTE, host, mine)
            found += judge.own_addresses()
            found += judge.needed(needed)
            found += judge.routes()
    return sorted(dict.fromkeys(found), key=lambda overlap: not overlap.fatal)


def sentences(found: Sequence[Overlap]) -> list[str]:
    """Each overlap in words; of many only the first, and a last sentence that does not change with their number."""
    told = list(map(str, found[:MOST_TOLD]))
    return (
        [*told, f"more networks than that overlap: ip route show root {found[0].network}"]
        if found[MOST_TOLD:]
        else told
    )


def refusal(found: Sequence[Overlap]) -> str | None:
    """The sentence with which a start is refused; None when nothing is worth it."""
    fatal = [overlap for overlap in found if overlap.fatal]
    if not fatal:
        return None
    more = f" (and {len(fatal) - MOST_TOLD} more)" if len(fatal) > MOST_TOLD else ""
    return f"{'; '.join(map(str, fatal[:MOST_TOLD]))}{more}; {fatal[0].remedy}, or start with --allow-overlap"


def former_subnets(conf: NetConf, host: HostNet, devices: frozenset[str]) -> list[Prefix]:
    """Subnets that the addresses of flannel's devices tell of, where the files that would are gone."""
    found = []
    for addr in host.addrs:
        part, link = conf.family(family_of(addr.ip)), host.link_at(addr.ifindex)
        if part and link and link.name in devices and part.network.covers(addr.ip):
            found.append(Prefix(addr.ip, part.subnet_len).masked())
    return found


class _Judge:
    """One family's network against one host."""

    def __init__(self, part: FamilyConf, covering: bool, host: HostNet, mine: Mine) -> None:
        self.network, self.part, self.covering = part.network, part, covering
        self.host, self.mine = host, mine
        self.family = part.network.family
        self.name = f"{'Network' if self.family is Family.V4 else 'IPv6Network'} {part.network}"
        self.served = any(part.network.covers(subnet) for subnet in mine.subnets)
        self.foreign = [route for route in host.inside if self.network.covers(route.dst) and not self._is_ours(route)]

    def own_addresses(self) -> Iterator[Overlap]:
        """Our own and our advertised address: other hosts have theirs nearby."""
        ext = self.mine.ext
        for ip in dict.fromkeys((ext.local(self.family), ext.public(self.family))):
            if ip is None or not self.network.covers(ip):
                continue
            ways = [route for route in self.foreign if route.dst.covers(ip) and not _is_single(route.dst)]
            if any(route.dst.length > self.network.length for route in ways):
                continue  # routes() judges that one
            captured = self.covering and not any(map(self._stands, ways))
            if captured or self._may_be_leased(Prefix(ip, self.family.bits)):
                which = "address" if ip == ext.local(self.family) else "advertised address"
                yield self._overlap(
                    f"contains this host's {which} {format_ip(ip)}, interface {ext.name}",
                    "this host and others would lose each other",
                    ext.name,
                    captured,
                )

    def needed(self, wanted: Iterable[Needed]) -> Iterator[Overlap]:
        """Servers that packets would not reach any more."""
        for ip, what in wanted:
            way = self.host.serving.get(ip) if self.network.covers(ip) else None
            if way is None or way.link in self.mine.devices or way.dst.length > self.network.length:
                continue  # not reached now, reached through the network itself, or by a route that wins over ours
            if any(subnet.covers(ip) for subnet in self.mine.subnets):
                continue
            captured = self.covering and not self._stands(way)
            if captured or self._may_be_leased(Prefix(ip, self.family.bits)):
                yield self._overlap(
                    f"contains {format_ip(ip)}, {what}, reached through interface {way.link}",
                    "this host would lose it",
                    way.link,
                    fatal=False,  # pods and services of the cluster may be servers, too
                )

    def routes(self) -> Iterator[Overlap]:
        """Networks of other interfaces."""
        for route in self.foreign:
            if not _is_single(route.dst) and not self._is_harmless(route) and self._may_be_leased(route.dst):
                how = f" (by a route via {format_ip(route.gateway)})" if route.gateway else ""
                same = "is also the network" if route.dst == self.network else f"contains {route.dst}, a network"
                yield self._overlap(
                    f"{same} of interface {route.link}{how}",
                    "packets to pods with such addresses go there",
                    route.link,
                    fatal=False,
                )

    def _overlap(self, what: str, harm: str, link: str, fatal: bool) -> Overlap:
        remedy = f"choose another {self.name.split()[0]}, or renumber or remove what is on {link}"
        return Overlap(self.network, f"{self.name} {what}", harm, remedy, fatal or not self.served)

    def _is_ours(self, route: Route) -> bool:
        return route.link in self.mine.devices or route.proto == PROTO_OURS

    def _stands(self, route: Route) -> bool:
        """Whether a route keeps its packets when our covering route comes."""
        ours = METRIC_V6 if self.family is Family.V6 else 0
        return route.dst.length > self.network.length or (route.dst == self.network and route.metric <= ours)

    def _is_harmless(self, route: Route) -> bool:
        """Whether a foreign route does what the cluster wants; see the module's list."""
        on_ext = route.link == self.mine.ext.name
        if not on_ext and any(subnet.covers(route.dst) for subnet in self.mine.subnets):
            return True
        if not self._is_as_long_as_a_lease(route.dst):
            return False
        if route.gateway:
            return on_ext or route.proto in ROUTING_DAEMONS
        link = self.host.link(route.link)
        return not on_ext and link is not None and link.kind == "bridge"

    def _is_as_long_as_a_lease(self, block: Prefix) -> bool:
        if self.mine.allocates:
            return block.length == self.part.subnet_len
        return block.length > self.network.length  # whoever names subnets chooses

    def _may_be_leased(self, block: Prefix) -> bool:
        if not self.mine.allocates:
            return True
        size = 1 << (self.family.bits - self.part.subnet_len)
        begin, end = self.part.subnet_min, self.part.subnet_max + size
        if begin == self.network.first + size:  # the default (contract 2.6): nobody has set these addresses apart
            begin = self.network.first
        return block.first < end and begin <= block.last


def _is_single(block: Prefix) -> bool:
    return block.length == block.family.bits
