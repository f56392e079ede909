"""A set of kernel objects: the desired state, or what was read.

One container per kind, because planning orders by kind and because named tuples of different kinds
would compare equal if thrown together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import assert_never

from flanneld.model.addr import IP, MAC
from flanneld.model.objects import Address, Fdb, KernelObject, Link, Neighbour, Offload, Route, Sysctl


@dataclass(slots=True)
class State:
    """Kernel objects by subject. Mutable: paging adds and removes peers between two full cycles.

    Routes are kept by their whole value, because the kernel may hold several of one destination.
    """

    links: dict[str, Link] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    offloads: dict[str, Offload] = field(default_factory=dict)
    addresses: dict[Address, Address] = field(default_factory=dict)
    """By whole value too: one address may be there with several prefix lengths."""
    fdb: dict[tuple[str, MAC], Fdb] = field(default_factory=dict)
    neighbours: dict[tuple[str, IP], Neighbour] = field(default_factory=dict)
    routes: dict[Route, None] = field(default_factory=dict)
    """An ordered set."""
    unresolved: dict[tuple[str, IP], None] = field(default_factory=dict)
    """Addresses the kernel is asking for, as read; an ordered set, never desired."""

    @staticmethod
    def of(objects: Iterable[KernelObject]) -> State:
        """Collect objects; the later of two with one subject wins."""
        state = State()
        for obj in objects:
            state.add(obj)
        return state

    def add(self, obj: KernelObject) -> None:
        """Put one object in, in place of its predecessor."""
        match obj:
            case Fdb():
                self.fdb[obj.link, obj.mac] = obj
            case Neighbour():
                self.neighbours[obj.link, obj.ip] = obj
            case Route():
                self.routes[obj] = None
            case Address():
                self.addresses[obj] = obj
            case Link():
                self.links[obj.name] = obj
            case Sysctl():
                self.sysctls[obj.path] = obj.value
            case Offload():
                self.offloads[obj.link] = obj
            case _:
                assert_never(obj)

    def discard(self, obj: KernelObject) -> None:
        """Take one object out; absent is fine."""
        match obj:
            case Fdb():
                self.fdb.pop((obj.link, obj.mac), None)
            case Neighbour():
                self.neighbours.pop((obj.link, obj.ip), None)
            case Route():
                self.routes.pop(obj, None)
            case Address():
                self.addresses.pop(obj, None)
            case Link():
                self.links.pop(obj.name, None)
            case Sysctl():
                self.sysctls.pop(obj.path, None)
            case Offload():
                self.offloads.pop(obj.link, None)
            case _:
                assert_never(obj)

    def __contains__(self, obj: KernelObject) -> bool:
        match obj:
            case Fdb():
                return self.fdb.get((obj.link, obj.mac)) == obj
            case Neighbour():
                return self.neighbours.get((obj.link, obj.ip)) == obj
            case Route():
                return obj in self.routes
            case Address():
                return obj in self.addresses
            case Link():
                return self.links.get(obj.name) == obj
            case Sysctl():
                return self.sysctls.get(obj.path) == obj.value
            case Offload():
                return self.offloads.get(obj.link) == obj
            case _:
                assert_never(obj)

    def __iter__(self) -> Iterator[KernelObject]:
        yield from self.links.values()
        yield from (Sysctl(path, value) for path, value in self.sysctls.items())
        yield from self.offloads.values()
        yield from self.addresses.values()
        yield from self.fdb.values()
        yield from self.neighbours.values()
        yield from self.routes

    def __len__(self) -> int:
        return (
            len(self.links)
            + len(self.sysctls)
            + len(self.offloads)
            + len(self.addresses)
            + len(self.fdb)
            + len(self.neighbours)
            + len(self.routes)
        )

    def __str__(self) -> str:
        return "\n".join(sorted(map(str, self)))


class Desired(State):
    """What we want, and what of it changed since somebody last asked: a cycle then costs what the change weighs."""

    def __init__(self) -> None:
        super().__init__()
        self._changed: dict[KernelObject, None] = {}

    def add(self, obj: KernelObject) -> None:
        """Put one object in, in place of its predecessor."""
        if obj not in self:
            State.add(self, obj)
            self._changed[obj] = None

    def discard(self, obj: KernelObject) -> None:
        """Take one object out; absent is fine."""
        State.discard(self, obj)
        self._changed[obj] = None

    def take_changes(self) -> list[KernelObject]:
        """Objects that came or went since the last call, in order; whether each is in now must be looked up."""
        changed, self._changed = self._changed, {}
        return list(changed)

    def applied(self, objects: Iterable[KernelObject]) -> None:
        """Forget that these changed: the kernel has been told already."""
        for obj in objects:
            self._changed.pop(obj, None)
