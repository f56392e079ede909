"""Which kernel notifications deserve a look, and how a repair is told. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flanneld.model.addr import format_mac
from flanneld.model.objects import Address, Fdb, KernelObject, Link, Neighbour, Route, Sysctl, subject
from flanneld.model.state import State
from flanneld.plan.diff import AnswerIsRight, Op, Verb
from flanneld.plan.ownership import Ownership

Entry = Fdb | Neighbour | Route


def judge(
    obj: Link | Address | Entry,
    *,
    new: bool,
    desired: State,
    own: Ownership,
    watch_routes: bool,
    answer_is_right: AnswerIsRight = lambda _: True,
) -> str | Entry | None:
    """What a notification calls for.

    Args:
        obj: the object announced.
        new: it appeared or changed; False: it went.
        desired: what we want, as of now.
        own: what is ours.
        watch_routes: whether routes of others decide something here (DirectRouting).
        answer_is_right: judges the answers to misses, which are not part of ``desired``.

    Returns:
        An entry that has to be put back; or the reason for a full look; or None when it agrees with what we
        want, or is not our business.
    """
    match obj:
        case Link():
            return _judge_link(obj, new=new, desired=desired, own=own)
        case Address():
            if obj.link == own.underlay:
                return "underlay address"
            if obj.link not in own.devices or new == (obj in desired):
                return None
            return f"address {obj.link}" if own.owns(obj) else None  # a link-local one is the kernel's
        case Neighbour():
            want = desired.neighbours.get((obj.link, obj.ip)) if obj.link in own.devices else None
            if want is not None:
                return None if new and obj == want else want
            if not new or obj.link not in own.devices:
                return None
            # Answered misses age as the kernel sees fit. What is no answer of ours, somebody has told the kernel over
            # the tunnel: whoever can send there can make up neighbour discovery.
            return "neighbour" if obj.permanent or (obj.mac and not answer_is_right(obj)) else None
        case Fdb():
            entry = desired.fdb.get((obj.link, obj.mac))
            if entry is not None:
                # an entry of another destination that goes makes room for ours: no damage
                return entry if (obj != entry) is new else None
            return "fdb" if new and own.owns(obj) else None
        case Route():
            return _judge_route(obj, new=new, desired=desired, own=own, watch_routes=watch_routes)


def _judge_route(obj: Route, *, new: bool, desired: State, own: Ownership, watch_routes: bool) -> str | Route | None:
    if obj in desired.routes:
        return None if new else obj
    if own.owns(obj):
        return "route" if new else None
    # another's route to a block of ours: it came in our way, or left it
    in_the_way = any(network.covers(obj.dst) for network in own.networks)
    return "underlay route" if watch_routes or in_the_way else None


def _judge_link(obj: Link, *, new: bool, desired: State, own: Ownership) -> str | None:
    if obj.name == own.underlay:
        return "underlay link"
    want = desired.links.get(obj.name)
    if want is not None:
        return f"link {obj.name}" if not new or obj != want else None
    return f"link {obj.name}" if new and own.owns(obj) else None


class Repair(NamedTuple):
    """One repair, for people and for counting."""

    about: tuple[object, ...]
    """``objects.subject``; the first element is the kind."""
    what: str
    """The object as it should be, or the one that should not be."""
    was: str
    """What stood there; empty = nothing."""
    text: str
    """All of it in words."""

    @property
    def kind(self) -> str:
        """``link``, ``route``, …"""
        return str(self.about[0])


def repairs(ops: Sequence[Op]) -> Iterator[Repair]:
    """Repairs in words: what, what it was, what it is now (design N1); one for each object.

    A device that had to be made anew takes all that hangs on it along in its one line.
    """
    made = {op.obj.name: op.was for op in ops if op.verb is Verb.CREATE and isinstance(op.obj, Link)}
    anew = dict.fromkeys(made, 0)
    lines = []
    for op in ops:
        name = device_of(op.obj)
        if name not in anew:
            was = op.obj if op.verb is Verb.DELETE else op.was
            lines.append(Repair(subject(op.obj), str(op.obj), str(was) if was else "", _audit_line(op)))
        elif not isinstance(op.obj, Link):
            anew[name] += 1
    for name, count in anew.items():
        found = made[name]
        state = f"another one was there ({_brief(found)})" if found else "it was gone"
        text = f"restored link {name}: {state}, with its {count} settings, addresses and entries"
        yield Repair(("link", name), f"link {name}", str(found) if found else "", text)
    yield from lines


def device_of(obj: KernelObject) -> str:
    """The device that an object is, or hangs on."""
    match obj:
        case Link():
            return obj.name
        case Sysctl():
            return obj.path.split("/")[-2]
        case _:
            return obj.link


def _audit_line(op: Op) -> str:
    if op.verb is Verb.DELETE:
        return f"removed {op.obj}: no lease asks for it"
    if op.was is None:
        return f"restored {op.obj}: it was gone"
    if isinstance(op.obj, Link) and isinstance(op.was, Link):
        return f"restored link {op.obj.name}: {', '.join(_changes(op.was, op.obj))}"
    return f"restored {op.obj}: it was {_brief(op.was)}"


def _changes(was: Link, now: Link) -> Iterator[str]:
    """Field by field what is put back."""
    if was.up != now.up:
        yield "it was down"
    if was.mac != now.mac:
        yield f"its MAC was {format_mac(was.mac)}, is {format_mac(now.mac)}"
    if was.mtu != now.mtu:
        yield f"its MTU was {was.mtu}, is {now.mtu}"
    if was.alias != now.alias:
        yield f"its alias was {was.alias!r}"
    if was.vxlan != now.vxlan:
        yield f"it was {_brief(was)}"
    elif was.extra:
        yield f"it had {was.extra}"


def _brief(obj: KernelObject) -> str:
    """The old value, without its kind: the sentence has named that already."""
    return str(obj).partition(" ")[2]
