"""What of a host belongs to one network, and the operations that take it away or leave it to Go flanneld. Pure.

Removal is the ordinary plan with nothing desired, so it knows what is ours by the rules of ``ownership.py`` and
nothing else. Only the names of devices have to be found first: a daemon knows them from its configuration, which a
host that is being cleaned may not reach any more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from flanneld.model.addr import Prefix
from flanneld.model.objects import PROTO_BOOT, PROTO_OURS, Address, Link, Route, RouteKind, Sysctl
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb, plan
from flanneld.plan.ownership import RTPROT_KERNEL, Ownership

ALIAS_MARK = "flanneld "
"""How the ``ifalias`` of every device of ours begins, whatever its network."""

_NAMES = re.compile(r"flannel(-v6)?\.\d+|flannel\d+")
"""vxlan's (contract 6.2) and udp's (contract 6.48), ours or Go flanneld's."""


class Scope(NamedTuple):
    """One network, as far as this host knows it."""

    alias: str
    """``ifalias`` of its devices."""
    networks: tuple[Prefix, ...] = ()
    """Cluster networks."""
    subnets: tuple[Prefix, ...] = ()
    """Our own."""
    devices: frozenset[str] = frozenset()
    """Names that the operator gave."""


class Devices(NamedTuple):
    """Flannel's devices on this host."""

    ours: frozenset[str]
    unclear: tuple[str, ...]
    """Without a mark, while no network is known that they could be of."""


def find_devices(scope: Scope, links: Iterable[Link], addresses: Iterable[Address], routes: Iterable[Route]) -> Devices:
    """Which devices are this network's: by our mark; Go flanneld's, which have none, by addresses and routes."""
    placed = [(a.link, Prefix(a.ip, a.length)) for a in addresses] + [(r.link, r.dst) for r in routes]
    inside = {link for link, block in placed if any(network.covers(block) for network in scope.networks)}
    ours, unclear = set(), []
    for link in links:
        if link.name in scope.devices or (link.alias and link.alias == scope.alias):
            ours.add(link.name)
        elif _NAMES.fullmatch(link.name) and not link.alias.startswith(ALIAS_MARK):
            if link.name in inside:
                ours.add(link.name)
            elif not scope.networks:
                unclear.append(link.name)
    return Devices(frozenset(ours), tuple(sorted(unclear)))


def covering(routes: Iterable[Route], devices: Collection[str]) -> tuple[Prefix, ...]:
    """Cluster networks that our devices' own routes tell of (contract 6.48, design/misses.md)."""
    return tuple(
        dict.fromkeys(r.dst for r in routes if r.link in devices and not r.gateway and r.proto != RTPROT_KERNEL)
    )


def around(subnets: Collection[Prefix], blocks: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """Blocks that hold one of our subnets and more: cluster networks that firewall rules tell of."""
    return tuple(sorted({b for b in blocks if b.length and any(b != s and b.covers(s) for s in subnets)}))


def ownership(scope: Scope, devices: frozenset[str]) -> Ownership:
    """What a daemon of this network would own, but for the external interface."""
    lengths = frozenset(subnet.length for subnet in scope.subnets)
    return Ownership(devices, scope.alias, scope.networks, lengths)


def underlays(own: Ownership, routes: Iterable[Route]) -> list[str]:
    """Interfaces with routes of the shape of Go flanneld's direct ones; one, unless the host was re-cabled."""
    return sorted({r.link for r in routes if r.link and own._replace(underlay=r.link).owns(r)} - own.devices)


def removal(observed: State, own: Ownership) -> list[Op]:
    """Operations that remove everything of ours; what hangs on a device goes with it."""
    return plan(State(), observed, own, answer_is_right=lambda _: False)


def describe(op: Op, observed: State) -> str:
    """An operation's object in words; a device with what goes along."""
    if not isinstance(op.obj, Link):
        return str(op.obj)
    name = op.obj.name
    counts = {
        ("address", "addresses"): sum(a.link == name for a in observed.addresses),
        ("route", "routes"): sum(r.link == name for r in observed.routes),
        ("neighbour", "neighbours"): sum(n.link == name for n in observed.neighbours.values()),
        ("forwarding entry", "forwarding entries"): sum(f.link == name for f in observed.fdb.values()),
    }
    along = ", ".join(f"{count} {words[count != 1]}" for words, count in counts.items() if count)
    return f"{op.obj}" + (f", with {along}" if along else "")


# ---- leaving a host to Go flanneld ---------------------------------------------------------------------


def handover(observed: State, own: Ownership, defaults: Mapping[str, str]) -> list[Op]:
    """Operations that leave what Go flanneld would have made and take the rest away, without a moment's outage.

    Direct routes become plain ones: Go deletes a route by its gateway, and the kernel does not find one that
    goes through a nexthop object that way (``kernel/nexthops.py``).

    Args:
        observed: the kernel's state, with the present values of the settings in ``defaults``.
        own: what is ours.
        defaults: by path below ``/proc/sys``, what a setting of our devices is for a new device.
    """
    routes = [route for route in observed.routes if own.owns(route)]
    ops = [Op(Verb.PUT, r._replace(proto=PROTO_BOOT), r) for r in routes if r.gateway and r.proto == PROTO_OURS]
    ops += [Op(Verb.DELETE, r) for r in routes if not r.gateway]
    ops += [Op(Verb.DELETE, n) for n in observed.neighbours.values() if own.owns(n) and not n.permanent]
    ops += [
        Op(Verb.PUT, Sysctl(path, value), Sysctl(path, now))
        for path, value in defaults.items()
        if (now := observed.sysctls.get(path)) is not None and now != value
    ]
    ops += [
        Op(Verb.PUT, link._replace(alias=""), link) for link in observed.links.values() if own.owns(link) and link.alias
    ]
    return ops


def describe_handover(op: Op) -> str:
    """The same in words."""
    match op.obj:
        case Link():
            return f'take the mark "{op.was.alias if isinstance(op.was, Link) else ""}" off link {op.obj.name}'
        case Sysctl():
            return f"set {op.obj} back, it was {op.was.value if isinstance(op.was, Sysctl) else 'unknown'}"
        case _ if op.verb is Verb.DELETE:
            return f"remove {op.obj}"
        case _:
            return f"make {op.obj} a plain one, of protocol boot"


def remake(observed: State, link: Link) -> Sequence[Op]:
    """Operations after a device was made anew, bare: everything that was on it and that Go flanneld would keep."""
    name = link.name
    ops = [Op(Verb.PUT, a) for a in observed.addresses if a.link == name]
    ops.append(Op(Verb.PUT, link._replace(up=True, alias=""), link))
    ops += [Op(Verb.PUT, f) for f in observed.fdb.values() if f.link == name and f.permanent]
    ops += [Op(Verb.PUT, n) for n in observed.neighbours.values() if n.link == name and n.permanent]
    ops += [Op(Verb.PUT, r) for r in observed.routes if r.link == name and r.gateway and r.kind is RouteKind.UNICAST]
    return ops
