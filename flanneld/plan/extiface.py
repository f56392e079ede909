"""Choose the external interface and its addresses, and follow them when they change (contract section 5).

Pure: it decides on a snapshot (``HostNet``) and says why; ``kernel/`` takes the snapshot, the app logs the
sentence. Both families take one path.

Where we differ from flannel on purpose: an interface that lacks an address of an enabled family is passed
over instead of ending the search; an IPv6 ``--iface`` works in dual stack (5.5) and never lands in the
IPv4 slot (5.14); when the advertised address stands on the interface we also send from it, so that
host-gw's condition (5.13) holds and replies come from where peers send to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import NamedTuple

from flanneld.errors import ConfigError
from flanneld.model.addr import IP, Family, family_of, format_ip, parse_ip
from flanneld.model.host import AddrInfo, ExtIface, HostNet, IfaceWish, LinkInfo

LOOPBACK_IFINDEX = 1
"""``lo`` in every network namespace, whatever it was renamed to (include/net/flow.h)."""


def select(
    net: HostNet, wish: IfaceWish, families: tuple[Family, ...], exclude: AbstractSet[str] = frozenset()
) -> tuple[ExtIface, str]:
    """Choose the external interface.

    Args:
        net: the host's network now; ``reach`` must hold the answer for ``wish.can_reach``.
        wish: the operator's options.
        families: the enabled families, one or two (contract 5.1).
        exclude: names of our own devices; a tunnel never runs over itself.

    Returns:
        The interface, and one sentence for the log: which rule won, what was taken, what failed before.

    Raises:
        ConfigError: nothing fits, or a public address is not one; says what was tried and what there is.
    """
    search = _Search(net, families, _advertised(wish, families), exclude)
    failed: list[str] = []
    for label, rule in search.rules(wish):
        try:
            found = rule()
            chosen = search.complete(found)
        except _NoMatchError as exc:
            failed.append(f"{label} ({exc})")
        else:
            return chosen, _explain(chosen, families, label, failed)
    raise ConfigError(
        f"no external interface found: tried {', '.join(failed)}; available: {_inventory(net, families)}; "
        "name one with --iface"
    )


def follow(
    previous: ExtIface,
    net: HostNet,
    wish: IfaceWish,
    families: tuple[Family, ...],
) -> ExtIface | None:
    """The same interface after the host's network changed; the choice of the interface is not made again.

    An address stays while it is there, whatever is added beside it; only an address named by ``--iface``
    is taken back when it returns. A global address is never exchanged for a link-local one: that is what
    an interface looks like in the middle of a renumbering.

    Returns:
        What to use from now on, equal to ``previous`` when nothing changed; None while the interface is
        away or has no address to use in some family (keep ``previous`` and wait).
    """
    link = net.link(previous.name)
    if link is None or link.mtu <= 0:
        return None
    # rules judge this interface alone: they only say which of its addresses the operator meant
    addrs = tuple(addr for addr in net.addrs if addr.ifindex in (link.ifindex, LOOPBACK_IFINDEX))
    alone = _Search(net._replace(links=(link,), addrs=addrs), families, _advertised(wish, families), frozenset())
    named = [ip for ip in map(_ip_or_none, _asked(wish, families)) if ip]
    meant = alone.meant(wish)
    chosen: dict[Family, IP] = {}
    for family in families:
        ip = alone.succeed(link, family, previous.local(family), named, meant)
        if ip is None:
            return None
        chosen[family] = ip
    return alone.result(link, chosen)


class _NoMatchError(Exception):
    """One rule led nowhere; the text says why."""


class _Found(NamedTuple):
    """What a rule found: an interface, and the addresses it was found by (may be none)."""

    link: LinkInfo
    ips: tuple[IP, ...] = ()


Rule = Callable[[], _Found]


class _Search:
    """The rules of contract 5.2 to 5.9 over one snapshot."""

    def __init__(
        self, net: HostNet, families: tuple[Family, ...], advertised: dict[Family, IP], exclude: AbstractSet[str]
    ) -> None:
        self.net = net
        self.families = families
        self.advertised = advertised
        self.exclude = exclude

    def rules(self, wish: IfaceWish) -> Iterator[tuple[str, Rule]]:
        """The rules in force, in their order (contract 5.2, 5.3), each with its name for the operator."""
        if wish.iface or wish.iface_regex or wish.can_reach:
            for text in wish.iface:
                yield f"--iface={text}", partial(self.by_iface, text)
            for text in wish.iface_regex:
                yield f"--iface-regex={text}", partial(self.by_regex, text)
            if wish.can_reach:
                yield f"--iface-can-reach={wish.can_reach}", partial(self.by_reach, wish.can_reach)
        elif public := next((f for f in self.families if f in self.advertised), None):
            ip = self.advertised[public]
            option = "--public-ip" if public is Family.V4 else "--public-ipv6"
            yield f"{option}={format_ip(ip)}", partial(self.by_public, ip)
        else:
            yield "default route", self.by_default

    def by_iface(self, text: str) -> _Found:
        """``--iface``: an address, else a name (contract 5.4)."""
        ip = _ip_or_none(text)
        if ip is not None:
            return self.by_address(ip)
        link = self.net.link(text)
        if link is None:
            raise _NoMatchError("there is no interface of that name")
        return _Found(link)

    def by_address(self, ip: IP) -> _Found:
        """The interface that owns an address (contract 5.4); in dual stack a local public IPv6 must agree."""
        if family_of(ip) not in self.families:
            raise _NoMatchError(f"the network has no {family_of(ip).label}")
        if not (_is_link_local(ip) or _is_global(ip)):
            raise _NoMatchError("peers cannot send to such an address")
        link = self.owner(ip)
        if link is None:
            raise _NoMatchError("no interface has that address")
        public = self.advertised.get(Family.V6)
        other = self.owner(public) if public and len(self.families) > 1 else None
        if public is None or other is None or other == link:
            return _Found(link, (ip,))
        if family_of(ip) is Family.V4:
            raise _NoMatchError(f"it is on {link.name}, but --public-ipv6={format_ip(public)} is on {other.name}")
        return _Found(other, (public,))

    def by_public(self, ip: IP) -> _Found:
        """A public address without any interface option has to be local (contract 5.2)."""
        if self.owner(ip) is None:
            raise _NoMatchError("no interface has that address; behind NAT give --iface as well")
        return self.by_address(ip)

    def by_regex(self, text: str) -> _Found:
        """``--iface-regex``: on the addresses first, then on the names (contract 5.6)."""
        try:
            pattern = re.compile(text)
        except re.error as exc:
            raise _NoMatchError(f"not a regular expression: {exc}") from exc
        candidates = [link for link in self.net.links if self.is_candidate(link)]
        # a link that is down is a match all the same (it may be on its way up), but the last one
        candidates.sort(key=lambda link: not link.up)
        for link in candidates:
            ips = [self.matching(link, family, pattern) for family in self.families]
            if all(ips):
                return _Found(link, tuple(ip for ip in ips if ip))
        for link in candidates:
            if pattern.search(link.name) and all(self.usable(link, family) for family in self.families):
                return _Found(link)
        raise _NoMatchError("it matches no usable address and no name of an interface with one")

    def by_reach(self, text: str) -> _Found:
        """``--iface-can-reach``: where the kernel would send, and from which address (contract 5.7)."""
        ip = _ip_or_none(text)
        if ip is None:
            raise _NoMatchError("not an IP address")
        reach = self.net.reach.get(ip)
        link = self.net.link_at(reach.ifindex) if reach else None
        if reach is None or link is None:
            raise _NoMatchError("the kernel has no route to it")
        if not self.is_candidate(link):
            raise _NoMatchError(f"the kernel would send through {link.name}")
        source = reach.source
        if source and (_is_global(source) or _is_link_local(source)) and family_of(source) in self.families:
            return _Found(link, (source,))
        return _Found(link)

    def by_default(self) -> _Found:
        """The default route of every enabled family, on one interface (contract 5.8)."""
        links = {family: self.default_link(family) for family in self.families}
        if len(set(links.values())) > 1:
            where = ", ".join(f"{family.label} through {link.name}" for family, link in links.items())
            raise _NoMatchError(f"the families differ: {where}")
        return _Found(next(iter(links.values())))

    def default_link(self, family: Family) -> LinkInfo:
        """Where the default route that the kernel prefers leaves; among equals the first listed."""
        routes = [
            route
            for route in self.net.defaults
            if route.family == family and ((link := self.net.link_at(route.ifindex)) is None or self.is_candidate(link))
        ]
        if not routes:
            raise _NoMatchError(f"there is none for {family.label}")
        link = self.net.link_at(min(routes, key=lambda route: route.metric).ifindex)
        if link is None:
            raise _NoMatchError(f"the one for {family.label} has several next hops")
        return link

    def complete(self, found: _Found) -> ExtIface:
        """Fill in the addresses that the rule left open (contract 5.9 to 5.11)."""
        link = found.link
        if link.name in self.exclude:
            raise _NoMatchError(f"{link.name} is flanneld's own device")
        if link.mtu <= 0:
            raise _NoMatchError(f"{link.name} has no MTU")
        chosen: dict[Family, IP] = {}
        for family in self.families:
            ips = [*_of(family, found.ips), *self.public_here(link, family), *self.usable(link, family)]
            if not ips:
                raise _NoMatchError(f"{link.name} has no usable {family.label} address")
            chosen[family] = ips[0]
        return self.result(link, chosen)

    def succeed(
        self, link: LinkInfo, family: Family, old: IP | None, named: Sequence[IP], meant: Sequence[IP]
    ) -> IP | None:
        """The address to go on with on a link whose addresses may have changed."""
        usable = self.usable(link, family)
        here = [addr.ip for addr in self.net.addrs if not addr.duplicate]
        order = [ip for ip in _of(family, named) if ip in here]
        order += [old] if old in usable else []
        order += [ip for ip in (*_of(family, meant), *self.public_here(link, family), *usable) if ip in here]
        if old and not _is_link_local(old):
            order = [ip for ip in order if not _is_link_local(ip)]
        # deprecated or moved to lo (hosts that announce themselves by BGP), but still ours to send from
        order += [old] if old and old in here else []
        return order[0] if order else None

    def meant(self, wish: IfaceWish) -> tuple[IP, ...]:
        """The addresses by which the first rule that still holds finds the interface."""
        for _, rule in self.rules(wish):
            try:
                return rule().ips
            except _NoMatchError:
                continue
        return ()

    def result(self, link: LinkInfo, chosen: dict[Family, IP]) -> ExtIface:
        """Put together; the advertised address defaults to the interface's own (contract 5.11)."""
        public = {**chosen, **self.advertised}
        v4, v6 = Family.V4, Family.V6
        broadcast = next(
            (addr.broadcast() for addr in self.net.addrs if (addr.ifindex, addr.ip) == (link.ifindex, chosen.get(v4))),
            None,
        )
        return ExtIface(
            link.name,
            link.ifindex,
            link.mtu,
            *(chosen.get(v4), chosen.get(v6), public.get(v4), public.get(v6)),
            broadcast,
        )

    def usable(self, link: LinkInfo, family: Family) -> list[IP]:
        """Usable addresses of a link, best first; among equals in the kernel's order (contract 5.9)."""
        addrs = [addr for addr in self.net.addrs if addr.ifindex == link.ifindex and _is_usable(addr, family)]
        addrs.sort(key=lambda addr: (not _is_global(addr.ip), not addr.permanent, addr.temporary))
        return [addr.ip for addr in addrs]

    def public_here(self, link: LinkInfo, family: Family) -> list[IP]:
        """The advertised address, if it stands on this link."""
        return [ip for ip in self.usable(link, family) if ip == self.advertised.get(family)]

    def matching(self, link: LinkInfo, family: Family, pattern: re.Pattern[str]) -> IP | None:
        """The best usable address whose text matches."""
        return next((ip for ip in self.usable(link, family) if pattern.search(format_ip(ip))), None)

    def owner(self, ip: IP) -> LinkInfo | None:
        """The first link that has an address; any state of it will do, the operator named it."""
        links = (self.net.link_at(addr.ifindex) for addr in self.net.addrs if addr.ip == ip)
        return next((link for link in links if link), None)

    def is_candidate(self, link: LinkInfo) -> bool:
        """Whether a rule may come up with this link by itself."""
        return link.ifindex != LOOPBACK_IFINDEX and link.name not in self.exclude


def _advertised(wish: IfaceWish, families: tuple[Family, ...]) -> dict[Family, IP]:
    """The public addresses given, of the enabled families; both texts are checked whether needed or not."""
    advertised: dict[Family, IP] = {}
    for option, text, family in (
        ("--public-ip", wish.public_ip, Family.V4),
        ("--public-ipv6", wish.public_ipv6, Family.V6),
    ):
        if not text:
            continue
        ip = _ip_or_none(text)
        if ip is None or family_of(ip) is not family:
            raise ConfigError(f"{option}={text} is not an {family.label} address")
        if family in families:
            advertised[family] = ip
    return advertised


def _asked(wish: IfaceWish, families: tuple[Family, ...]) -> tuple[str, ...]:
    """The interfaces named outright: by ``--iface``, or by a bare public address (contract 5.2)."""
    if wish.iface or wish.iface_regex or wish.can_reach:
        return wish.iface
    return tuple(format_ip(ip) for ip in _advertised(wish, families).values())


def _ip_or_none(text: str) -> IP | None:
    try:
        return parse_ip(text)
    except ValueError:
        return None


def _of(family: Family, ips: Sequence[IP]) -> list[IP]:
    return [ip for ip in ips if family_of(ip) is family]


def _is_usable(addr: AddrInfo, family: Family) -> bool:
    return (
        family_of(addr.ip) is family
        and not addr.deprecated
        and not addr.duplicate
        and (_is_global(addr.ip) or _is_link_local(addr.ip))
    )


def _is_link_local(ip: IP) -> bool:
    """169.254.0.0/16 (RFC 3927) or fe80::/10 (RFC 4291)."""
    return ip[:2] == b"\xa9\xfe" if len(ip) == 4 else ip[0] == 0xFE and ip[1] & 0xC0 == 0x80


def _is_global(ip: IP) -> bool:
    """Unicast beyond the link, in the sense of Go's ``IsGlobalUnicast``: private ranges count."""
    if not any(ip) or _is_link_local(ip):
        return False
    if len(ip) == 4:
        return ip[0] != 127 and not 224 <= ip[0] <= 239 and ip != b"\xff\xff\xff\xff"
    return ip[0] != 0xFF and ip != bytes(15) + b"\x01"


def _explain(chosen: ExtIface, families: tuple[Family, ...], label: str, failed: list[str]) -> str:
    parts = []
    for family in families:
        local, public = chosen.local(family), chosen.public(family)
        if local and public:
            seen = f" advertised as {format_ip(public)}" if public != local else ""
            parts.append(f"{family.label} {format_ip(local)}{seen}")
    before = f"; tried before: {', '.join(failed)}" if failed else ""
    return f"external interface {chosen.name} by {label}: {', '.join(parts)}, MTU {chosen.mtu}{before}"


def _inventory(net: HostNet, families: tuple[Family, ...]) -> str:
    """Every interface but ``lo`` with its addresses, for the operator to choose from."""
    lines = []
    for link in net.links:
        if link.ifindex == LOOPBACK_IFINDEX:
            continue
        own = [addr for addr in net.addrs if addr.ifindex == link.ifindex and family_of(addr.ip) in families]
        ips = " ".join(format_ip(addr.ip) + (" deprecated" if addr.deprecated else "") for addr in own)
        lines.append(f"{link.name} ({ips or 'no address'}{'' if link.up else ', down'})")
    return ", ".join(lines) or "none but lo"
