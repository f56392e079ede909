"""A few hosts and a store as values: what they are, and small changes of them.

Decisions, and what may happen when, stand in ``hosts.py``.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from flanneld.model.addr import parse_ip
from flanneld.model.lease import LeaseAttrs
from flanneld.model.lease_codec import parse_key
from flanneld.plan.allocate import Subnets

OFF, CLAIM, ACT, CHECK, HOLD, GUARD, LOST = "off", "claim", "act", "check", "hold", "guard", "lost"
NOBODY, GO = -1, 9
"""Writers who are no host of ours."""


class Entry(NamedTuple):
    """A key of the store."""

    key: str
    attrs: LeaseAttrs
    revision: int
    created: int
    writer: int
    """Who wrote it last; for judging, no decision sees it."""
    grant: int
    """Whose etcd lease it is attached to."""
    current: bool
    """Whether that host runs still, so that it knows the etcd lease for its own."""


class Step(NamedTuple):
    """A write that was decided."""

    key: str
    over: int
    """Revision that was read; 0 = absent."""
    by_guard: bool


class Host(NamedTuple):
    """A host. What a crash leaves: ``before``, ``marked``."""

    phase: str = OFF
    own: str = ""
    """Key of our lease."""
    revision: int = 0
    """Of our last write that we know of."""
    serves: str = ""
    """Key whose addresses leave this host; empty in quarantine."""
    before: str = ""
    """Subnet as remembered."""
    marked: bool = False
    """Remembered: another host has it."""
    lost: frozenset[str] = frozenset()
    moving: bool = False
    in_use: bool = False
    """Started without the store, with the remembered subnet."""
    step: Step | None = None
    restores: int = 0
    stalled: bool = False
    expired: bool = False
    unchecked: bool = False
    """Our key may be new, and nobody has looked for an older one that overlaps it."""
    seen: int = 0
    """Latest revision of the store that we know."""
    same: bool = True
    """Whether the store is the one in which our lease was confirmed, as far as we can tell."""
    epoch: int = 0
    """The store in which it was; for judging, no decision sees it."""


class State(NamedTuple):
    """All of it."""

    hosts: tuple[Host, ...]
    keys: tuple[Entry, ...] = ()
    revision: int = 1
    zombies: tuple[tuple[int, Step], ...] = ()
    """Writes that somebody gave up waiting for, and that are still under way."""
    backup: tuple[tuple[Entry, ...], int] | None = None
    epoch: int = 0
    """How often the store was rebuilt."""
    faults: int = 0


@cache
def subnets(key: str) -> Subnets:
    """What a key stands for."""
    return Subnets(*parse_key(f"/{key}".encode())) if key else Subnets(None, None)


def attrs_of(number: int, identity: str, data: bytes = b"") -> LeaseAttrs:
    """What the host at 192.0.2.NUMBER publishes."""
    return LeaseAttrs(parse_ip(f"192.0.2.{number}"), data=data, identity=identity)


def entry_at(state: State, key: str) -> Entry | None:
    return next((entry for entry in state.keys if entry.key == key), None)


def is_unsure(host: Host) -> bool:
    """Whether a host is in no position to say that it holds its lease."""
    return host.stalled or host.expired or host.unchecked


def knows(state: State, host: Host) -> bool:
    """Whether a look would tell a host nothing new."""
    entry = entry_at(state, host.own)
    return entry is not None and (entry.revision, state.epoch) == (host.revision, host.epoch)


def with_entry(state: State, entry: Entry) -> State:
    others = [e for e in state.keys if e.key != entry.key]
    return state._replace(keys=tuple(sorted((*others, entry), key=lambda e: e.key)))


def without(state: State, key: str) -> State:
    """A deletion is a revision of its own."""
    keys = tuple(entry for entry in state.keys if entry.key != key)
    return state._replace(keys=keys, revision=state.revision + 1)


def put(state: State, number: int, host: Host) -> State:
    hosts = state.hosts
    return state._replace(hosts=(*hosts[:number], host, *hosts[number + 1 :]))


def crashed(state: State, number: int, host: Host) -> State:
    """The etcd lease lives on, but the next run does not know it."""
    keys = tuple(entry._replace(current=False) if entry.grant == number else entry for entry in state.keys)
    return put(state, number, host)._replace(keys=keys)


def reads(state: State, host: Host) -> Host:
    """``History``: a store whose revision is below the one known is another one."""
    return host._replace(seen=state.revision, same=host.same and state.revision >= host.seen)


def rebuilt(state: State, keys: tuple[Entry, ...], revision: int) -> State:
    """What was under way does not reach the new store."""
    hosts = tuple(
        host._replace(step=None, phase=HOLD if host.step.by_guard else CLAIM) if host.step else host
        for host in state.hosts
    )
    return state._replace(hosts=hosts, keys=keys, revision=revision, zombies=(), epoch=state.epoch + 1)


def canonical(state: State) -> State:
    """The same with revisions numbered densely: only their order means anything."""
    used = {0, state.revision}
    entries = (*state.keys, *(state.backup[0] if state.backup else ()))
    for entry in entries:
        used |= {entry.revision, entry.created}
    for host in state.hosts:
        used |= {host.revision, host.seen, host.step.over if host.step else 0}
    used.update(step.over for _, step in state.zombies)
    if state.backup:
        used.add(state.backup[1])
    rank = {revision: index for index, revision in enumerate(sorted(used))}
    if len(rank) == max(used) + 1:
        return state  # dense already

    def entry_of(entry: Entry) -> Entry:
        return entry._replace(revision=rank[entry.revision], created=rank[entry.created])

    def step_of(step: Step) -> Step:
        return step._replace(over=rank[step.over])

    return state._replace(
        hosts=tuple(
            host._replace(revision=rank[host.revision], seen=rank[host.seen], step=host.step and step_of(host.step))
            for host in state.hosts
        ),
        keys=tuple(map(entry_of, state.keys)),
        revision=rank[state.revision],
        zombies=tuple((number, step_of(step)) for number, step in state.zombies),
        backup=state.backup and (tuple(map(entry_of, state.backup[0])), rank[state.backup[1]]),
    )
