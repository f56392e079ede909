"""From desired and observed state to an ordered list of operations. Pure.

Adding goes link, settings, address, up, forwarding entry, neighbour, route; deleting goes the other
way round and after the adding. The order is what keeps packets: a neighbour without its forwarding
entry drops them (failures section 0.2), a route without its neighbour only makes them wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, TypeVar

from flanneld.model.objects import ARP_OFF, Address, Fdb, KernelObject, Link, Neighbour, Offload, Route, Sysctl
from flanneld.model.state import State
from flanneld.plan.ownership import Ownership

K = TypeVar("K")
V = TypeVar("V", Offload, Address, Fdb, Neighbour)


class Verb(Enum):
    """What to do with an object."""

    CREATE = "create"
    """Make a link that is not there."""
    PUT = "put"
    """Add, or replace what has the same subject. A route replaces only what ``was`` there: any other in its
    way is somebody else's, and the operation fails."""
    DELETE = "delete"


class Op(NamedTuple):
    """One operation on one kernel object; stands alone and has its own result."""

    verb: Verb
    obj: KernelObject
    was: KernelObject | None = None
    """What is in its place now, for the audit line and for changes in place."""

    def __str__(self) -> str:
        return f"{self.verb.value} {self.obj}"


AnswerIsRight = Callable[[Neighbour], bool]
"""Whether a non-permanent neighbour on our device still answers its miss rightly."""


def plan(
    desired: State,
    observed: State,
    own: Ownership,
    *,
    deletions: bool = True,
    answer_is_right: AnswerIsRight = lambda _: True,
    recreate: frozenset[str] = frozenset(),
) -> list[Op]:
    """Operations that turn ``observed`` into ``desired`` plus what is not ours.

    Args:
        desired: everything we want.
        observed: what is there, ours and not, as far as it could matter.
        own: what of ``observed`` we may touch.
        deletions: False until the first complete snapshot of leases was seen; then nothing that peers
            may need is deleted (style section 1, rule 6).
        answer_is_right: judges the answers to misses, which are not part of ``desired``.
        recreate: links that the kernel refused to change in place.
    """
    removed, made, lost = _links(desired, observed, own, recreate)
    there = _without(observed, lost, {op.obj.name for op in made if isinstance(op.obj, Link) and _unlearns(op)}, set())
    ops = [*removed, *made]
    ops += (
        Op(Verb.PUT, Sysctl(path, value), Sysctl(path, old) if (old := there.sysctls.get(path)) is not None else None)
        for path, value in desired.sysctls.items()
        if there.sysctls.get(path) != value
    )
    ops += _missing(desired.offloads, there.offloads)
    in_the_way = list(_in_the_way(desired, there))
    ops += _surplus(in_the_way, own)
    there = _without(there, set(), set(), {address.link for address in in_the_way if len(address.ip) == 4})
    ops += _missing(desired.addresses, there.addresses)
    ops += (
        Op(Verb.PUT, op.obj._replace(up=True), op.obj)
        for op in made
        if isinstance(op.obj, Link) and op.verb is Verb.CREATE
    )
    ops += _missing(desired.fdb, there.fdb)
    ops += _missing(desired.neighbours, there.neighbours)
    routes, replaced = _routes(desired, there, own)
    ops += routes
    strange = [r for r in there.routes if r not in desired.routes and r not in replaced]
    ops += _surplus(strange if deletions else _nobodys(strange, desired, own), own)
    if deletions:
        ops += _surplus(
            (
                n
                for key, n in there.neighbours.items()
                if key not in desired.neighbours and (n.permanent or not answer_is_right(n))
            ),
            own,
        )
        ops += _surplus((f for key, f in there.fdb.items() if key not in desired.fdb), own)
    deleted = {op.obj for op in ops if op.verb is Verb.DELETE}
    ops += _surplus((a for a in there.addresses if a not in desired.addresses and a not in deleted), own)
    return ops


def plan_changes(changed: Iterable[KernelObject], desired: State) -> list[Op]:
    """Operations for what changed in ``desired`` alone, when all else is known to be right.

    Same order as ``plan``. What was replaced by another of its subject needs no deletion.
    """
    puts: dict[type, list[KernelObject]] = {Fdb: [], Neighbour: [], Route: []}
    drops: dict[type, list[KernelObject]] = {Fdb: [], Neighbour: [], Route: []}
    for obj in changed:
        (puts if obj in desired else drops).setdefault(type(obj), []).append(obj)
    kept = {(r.dst, r.metric) for r in puts[Route] if isinstance(r, Route)}
    before = {(r.dst, r.metric): r for r in drops[Route] if isinstance(r, Route)}
    ops = [
        Op(Verb.PUT, obj, before.get((obj.dst, obj.metric)) if isinstance(obj, Route) else None)
        for group in puts.values()
        for obj in group
    ]
    for kind in reversed(drops):
        for obj in drops[kind]:
            match obj:
                case Route():
                    replaced = (obj.dst, obj.metric) in kept
                case Neighbour():
                    replaced = (obj.link, obj.ip) in desired.neighbours
                case Fdb():
                    replaced = (obj.link, obj.mac) in desired.fdb
                case _:
                    replaced = True  # devices, addresses and settings change in full cycles only
            if not replaced:
                ops.append(Op(Verb.DELETE, obj))
    return ops


def compatible(want: Link, there: Link) -> bool:
    """Whether a device can stay, whatever its miss flags: a change in place is enough.

    Source: contract 6.12, without ``l2miss`` (a device made by Go flanneld has none and works) and
    without the local address and lower device, which the kernel changes in place.
    """
    if want.vxlan is None or there.vxlan is None:
        return want.vxlan is there.vxlan
    a, b = want.vxlan, there.vxlan
    same_family = b.local is not None and a.local is not None and len(a.local) == len(b.local)
    return (a.vni, a.port, a.gbp, a.group) == (b.vni, b.port, b.gbp, b.group) and same_family


def _links(
    desired: State, observed: State, own: Ownership, recreate: frozenset[str]
) -> tuple[list[Op], list[Op], set[str]]:
    """Operations on links, and the names of links whose dependants are gone with them."""
    removed, made, lost = [], [], set()
    for name, want in desired.links.items():
        there = observed.links.get(name)
        if there == want:
            continue
        if there is None and want.vxlan is None:
            continue  # a TUN: its owner makes it, opening it is what gives it life
        if there is None or name in recreate or not compatible(want, there):
            if there is not None:
                removed.append(Op(Verb.DELETE, there))
            made.append(Op(Verb.CREATE, want._replace(up=False), there))
            lost.add(name)
        else:
            made.append(Op(Verb.PUT, want, there))
    for name, there in observed.links.items():
        if name not in desired.links and own.owns(there):
            removed.append(Op(Verb.DELETE, there))
            lost.add(name)
    return removed, made, lost


def _unlearns(op: Op) -> bool:
    if not isinstance(op.obj, Link) or not isinstance(op.was, Link):
        return False
    return op.was.mac != op.obj.mac or ARP_OFF in op.was.extra


def _without(observed: State, lost: set[str], unlearned: set[str], unaddressed: set[str]) -> State:
    """What remains when links are re-created (their dependants go too), get a new MAC or ARP back, or are for a
    moment without IPv4 address.

    The kernel flushes a device's neighbours when its address changes or ARP is switched, permanent ones
    included (failures table 0.1; net/core/neighbour.c neigh_changeaddr). With a device's last IPv4 address go its
    IPv4 neighbours and routes, the latter without a word (net/ipv4/fib_frontend.c fib_disable_ip).
    """
    if not lost and not unlearned and not unaddressed:
        return observed
    gone = [
        obj for obj in observed if isinstance(obj, Offload | Address | Fdb | Neighbour | Route) and obj.link in lost
    ]
    gone += [n for n in observed.neighbours.values() if n.link in unlearned]
    gone += [n for n in observed.neighbours.values() if n.link in unaddressed and len(n.ip) == 4]
    gone += [r for r in observed.routes if r.link in unaddressed and len(r.dst.ip) == 4]
    kept = State(
        dict(observed.links),
        {path: value for path, value in observed.sysctls.items() if not lost.intersection(path.split("/"))},
        dict(observed.offloads),
        dict(observed.addresses),
        dict(observed.fdb),
        dict(observed.neighbours),
        dict(observed.routes),
    )
    for obj in gone:
        kept.discard(obj)
    return kept


def _missing(want: Mapping[K, V], there: Mapping[K, V]) -> Iterator[Op]:
    for key, obj in want.items():
        old = there.get(key)
        if old != obj:
            yield Op(Verb.PUT, obj, old)


def _in_the_way(desired: State, there: State) -> Iterator[Address]:
    """Addresses of ours that are not as they should be, and that the kernel would keep when told to add ours.

    Of IPv6 any; of IPv4 those of another scope. Other IPv4 ones go after the adding: with a device's last IPv4
    address all its routes vanish.
    """
    wanted = {(want.link, want.ip): want for want in desired.addresses}
    for found in there.addresses:
        want = wanted.get((found.link, found.ip), found)
        if found != want and (len(found.ip) == 16 or found == want._replace(scope=found.scope)):
            yield found


def _routes(desired: State, there: State, own: Ownership) -> tuple[list[Op], set[Route]]:
    """Routes to put, and the observed ones that vanish by being replaced: only ours are."""
    missing = [r for r in desired.routes if r not in there.routes]
    if not missing:
        return [], set()
    first: dict[tuple[object, ...], Route] = {}
    for route in there.routes:
        if own.owns(route):
            first.setdefault((route.dst, route.metric), route)
    ops = [Op(Verb.PUT, r, first.get((r.dst, r.metric))) for r in missing]
    return ops, {op.was for op in ops if isinstance(op.was, Route)}


def _nobodys(routes: Sequence[Route], desired: State, own: Ownership) -> list[Route]:
    """Those that no lease could ask for, though we do not know them all yet.

    They lead outside the network, as a host tool's default route does, or to where we know what should lead there.
    """
    known = {route.dst for route in desired.routes}
    return [r for r in routes if r.dst in known or not any(network.covers(r.dst) for network in own.networks)]


def _surplus(objects: Iterable[KernelObject], own: Ownership) -> Iterator[Op]:
    return (Op(Verb.DELETE, obj) for obj in objects if own.owns(obj))
