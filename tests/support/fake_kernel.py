"""A kernel in memory with the habits that matter: what dies with what (failures table 0.1).

Verified by ``tests/scenario``, which runs the same scenarios on this and on the real one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from flanneld.contracts import Failure
from flanneld.errors import KernelError
from flanneld.model.addr import IP
from flanneld.model.objects import ARP_OFF, Address, Fdb, KernelObject, Link, Neighbour, Offload, Route, Sysctl
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb
from flanneld.plan.ownership import Ownership


class FakeKernel:
    """Implements ``contracts.Kernel``; the operation of number ``break_number`` fails."""

    def __init__(self, underlay: dict[str, bool]) -> None:
        self.state = State()
        self.underlay = underlay
        self.direct: dict[IP, str] = {}
        self.break_number: int | None = None
        self.log: list[Op] = []

    async def read(self, own: Ownership, settings: Iterable[str]) -> State:
        seen = State.of(self.state)
        wanted = set(settings)
        for path in list(seen.sysctls):
            if path not in wanted:
                del seen.sysctls[path]
        for link in list(seen.links.values()):
            if not own.owns(link):
                seen.discard(link)
        return seen

    def onlink(self, addresses: Sequence[IP]) -> dict[IP, str]:
        return {ip: self.direct[ip] for ip in addresses if ip in self.direct}

    async def apply(self, ops: Sequence[Op]) -> list[Failure]:
        return self.apply_now(ops)

    def apply_now(self, ops: Sequence[Op]) -> list[Failure]:
        failures = []
        for op in ops:
            self.log.append(op)
            try:
                if len(self.log) - 1 == self.break_number:
                    raise KernelError(str(op), errno.EBUSY)
                self._apply(op)
            except KernelError as exc:
                failures.append(Failure(op, exc))
        return failures

    def _apply(self, op: Op) -> None:
        obj = op.obj
        if op.verb is Verb.DELETE:
            self._delete(obj)
        elif isinstance(obj, Link):
            self._put_link(obj, create=op.verb is Verb.CREATE)
        else:
            self._need_device(op)
            if isinstance(obj, Route):
                for old in [r for r in self.state.routes if (r.dst, r.metric) == (obj.dst, obj.metric)][:1]:
                    if op.was is None and old != obj:
                        raise KernelError(str(op), errno.EEXIST)
                    self.state.discard(old)
            if isinstance(obj, Neighbour) and not obj.mac:
                return  # a failed entry is no entry
            if isinstance(obj, Address) and any(_is_kept(old, obj) for old in self.state.addresses):
                return
            self.state.add(obj)

    def _need_device(self, op: Op) -> None:
        obj = op.obj
        if isinstance(obj, Sysctl):
            if not any(name in obj.path.split("/") for name in self.state.links):
                raise KernelError(str(op), errno.ENOENT)
            return
        name = obj.link if isinstance(obj, Address | Fdb | Neighbour | Route | Offload) else ""
        link = self.state.links.get(name)
        if name and link is None and name not in self.underlay:
            raise KernelError(str(op), errno.ENODEV)
        if isinstance(obj, Route) and name and not (link.up if link else self.underlay[name]):
            raise KernelError(str(op), errno.ENETDOWN)

    def _put_link(self, link: Link, *, create: bool) -> None:
        old = self.state.links.get(link.name)
        if create == (old is not None):
            raise KernelError(f"put {link}", errno.EEXIST if create else errno.ENODEV)
        if old is None:
            self.state.add(Offload(link.name, True))
        if old is not None and (old.mac != link.mac or ARP_OFF in old.extra):
            self.forget_neighbours(link.name)
        self.state.add(link)
        if old is not None and old.up and not link.up:
            self.set_down(link.name)

    def _delete(self, obj: KernelObject) -> None:
        if isinstance(obj, Link):
            for gone in [o for o in self.state if getattr(o, "link", "") == obj.name]:
                self.state.discard(gone)
            for path in [p for p in self.state.sysctls if obj.name in p.split("/")]:
                del self.state.sysctls[path]
        self.state.discard(obj)
        if isinstance(obj, Address) and len(obj.ip) == 4 and obj.link not in {a.link for a in self.state.addresses}:
            self.forget_neighbours(obj.link)
            self._forget_routes(obj.link)

    # ---- what happens to kernels -------------------------------------------------------------

    def forget_neighbours(self, link: str) -> None:
        """The MAC of a device changed, or it went down."""
        for entry in [n for n in self.state.neighbours.values() if n.link == link]:
            self.state.discard(entry)

    def set_down(self, link: str) -> None:
        """``ip link set DEV down``: routes and neighbours go, forwarding entries stay."""
        self.state.add(self.state.links[link]._replace(up=False))
        self.forget_neighbours(link)
        self._forget_routes(link)
        for address in [a for a in self.state.addresses.values() if a.link == link and len(a.ip) == 16]:
            self.state.discard(address)

    def _forget_routes(self, link: str) -> None:
        for route in [r for r in self.state.routes if r.link == link]:
            self.state.discard(route)

    def delete_link(self, link: str) -> None:
        """``ip link del DEV``."""
        self._delete(self.state.links[link])


def _is_kept(old: Address, new: Address) -> bool:
    """Whether the kernel keeps an address as it is when told to put another one of the same name."""
    if len(new.ip) == 16:
        return (old.link, old.ip) == (new.link, new.ip)
    return old._replace(scope=new.scope) == new
