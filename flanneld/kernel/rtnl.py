"""The kernel over rtnetlink: ask, read state, apply operations.

A request completes inside ``send``: when it returns, the answers lie in the socket's buffer. So
nothing here needs to wait, and two requests of one thread can never interleave. Long reads and writes
are cut into pieces with a turn of the event loop between them, so that a miss is answered meanwhile
(on a socket of its own).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterable, Sequence
from typing import assert_never

from flanneld.contracts import Failure
from flanneld.errors import KernelError
from flanneld.kernel import conf_codec, ethtool, link_codec, neigh_codec, nexthops, procfs, route_codec
from flanneld.kernel.nexthops import Hop, Nexthops
from flanneld.kernel.nlsocket import BATCH_MESSAGES, DUMP_RETRIES, Socket
from flanneld.model.addr import IP, MAC, Family
from flanneld.model.objects import PROTO_OURS, Address, Fdb, Link, Neighbour, Offload, Route, RouteKind, Sysctl
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb
from flanneld.plan.ownership import Ownership

log = logging.getLogger("flanneld.kernel")

# Deleting what is gone and adding what is there are successes (style section 6): errno by verb and kind.
_GONE: dict[type, frozenset[int]] = {
    Route: frozenset({errno.ESRCH, errno.ENODEV, errno.ENETDOWN}),
    Neighbour: frozenset({errno.ENOENT, errno.ENODEV}),
    Fdb: frozenset({errno.ENOENT, errno.ENODEV}),
    Address: frozenset({errno.EADDRNOTAVAIL, errno.ENODEV}),
    Link: frozenset({errno.ENODEV}),
}

_NOWHERE = {errno.EINVAL: "blackhole", errno.EACCES: "prohibit", errno.EHOSTUNREACH: "unreachable"}
"""Kinds of routes, by what a lookup answers (net/ipv4/fib_semantics.c fib_props)."""


class Rtnl:
    """The real kernel.

    Args:
        tidies: whether ``read`` removes our nexthop objects that nothing uses; not beside a daemon at work.
    """

    def __init__(self, *, tidies: bool = True) -> None:
        self._sock = Socket()
        self._tidies = tidies
        self._index: dict[str, int] = {}
        """Interface indexes by name as of the last look; refreshed when a name is unknown."""
        self._nexthops = Nexthops()
        self._given_up: dict[str, str] = {}
        """Settings that cannot be written here; read as if they had been, so that nobody tries again and again."""

    def sibling(self) -> Rtnl:
        """A second way to the same kernel, on its own socket; what one of them learns or writes the other knows."""
        other = Rtnl()
        other._index, other._nexthops = self._index, self._nexthops
        return other

    @property
    def port_id(self) -> int:
        """Netlink port of our requests: notifications that carry it are echoes of our own writes."""
        return self._sock.port_id

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    # ---- reading ------------------------------------------------------------------------------

    async def read(self, own: Ownership, settings: Iterable[str]) -> State:
        """Everything of ours, what stands in our way, and the present values of some settings.

        Raises:
            KernelError: the kernel cannot be read, or keeps changing under the dump.
        """
        for attempt in range(DUMP_RETRIES):
            try:
                state = await self._read(own)
                _read_sysctls(settings, state)
                _read_offloads(state)
                state.sysctls.update(self._given_up)
                return state
            except KernelError as exc:
                # ENODEV: a device went between the list of devices and the look at what is on it
                if exc.code not in (errno.EINTR, errno.ENODEV) or attempt == DUMP_RETRIES - 1:
                    raise
                await asyncio.sleep(0.01 * (attempt + 1))
        raise KernelError("read kernel tables", errno.EINTR)

    async def _read(self, own: Ownership) -> State:
        state = State()
        names: dict[int, str] = {}
        for _kind, body in await self._collect(link_codec.dump_links()):
            index, link = link_codec.decode_link(body)
            names[index] = link.name
            if own.owns(link):
                state.add(link)
        self._index.clear()  # in place: a sibling looks into the same one
        self._index.update({name: index for index, name in names.items()})
        ours = {index: name for index, name in names.items() if name in state.links}
        await self._read_nexthops()
        for index in ours:
            await self._read_device(state, index, ours)
        for family in {network.family for network in own.networks}:
            wanted = [route_codec.dump_routes(family, proto=PROTO_OURS)]
            if underlay := self._index.get(own.underlay):
                wanted.append(route_codec.dump_routes(family, ifindex=underlay))
            for request in wanted:
                await self._add_routes(state, request, names)
        if self._tidies:
            self._sock.batch(self._nexthops.unused({*ours, self._index.get(own.underlay, 0)}))
        return state

    async def _read_nexthops(self) -> None:
        self._nexthops.forget()
        if self._nexthops.supported is False:
            return
        try:
            for _kind, body in await self._collect(nexthops.dump()):
                self._nexthops.seen_object(body)
            self._nexthops.supported = True
        except KernelError as exc:
            if exc.code == errno.EINTR:
                raise
            self._nexthops.supported = False
            log.info("this kernel has no nexthop objects, large networks will be slower to program: %s", exc)

    async def _read_device(self, state: State, index: int, ours: dict[int, str]) -> None:
        for _kind, body in await self._collect(link_codec.dump_addresses(index)):
            address = link_codec.decode_address(body, {index: ours[index]})
            if address and address.link:
                state.add(address)
        for bridge in (True, False):
            for _kind, body in await self._collect(neigh_codec.dump_neighbours(index, bridge=bridge)):
                obj = neigh_codec.decode_neigh(body, ours)
                if obj is not None:
                    state.add(obj)
                elif not bridge and (asked := neigh_codec.decode_unresolved(body, ours)):
                    state.unresolved[asked] = None
        for family in Family:
            await self._add_routes(state, route_codec.dump_routes(family, ifindex=index), ours)

    async def _add_routes(self, state: State, request: bytes, names: dict[int, str]) -> None:
        for _kind, body in await self._collect(request):
            route = route_codec.decode_route(body, names)
            if route is None or route in state.routes:  # seen on its device and by its protocol
                continue
            state.add(route)
            if route.gateway:
                self._nexthops.seen_route(route.dst, *route_codec.nexthop_of(body))

    async def _collect(self, request: bytes) -> list[tuple[int, memoryview]]:
        """A whole dump; the loop gets a turn now and then, between dumps, never inside one.

        A dump in progress occupies the socket, and its datagrams are cheap to receive; what takes
        time is decoding, which happens afterwards.
        """
        found: list[tuple[int, memoryview]] = []
        for part in self._sock.dump(request):
            found += part
        await asyncio.sleep(0)
        return found

    def links(self) -> dict[str, Link]:
        """All devices by name."""
        return {
            link.name: link
            for _index, link in map(link_codec.decode_link, self._sock.dump_all(link_codec.dump_links()))
        }

    def addresses(self) -> list[Address]:
        """All addresses of all devices."""
        names = dict(socket.if_nameindex())
        bodies = self._sock.dump_all(link_codec.dump_addresses())
        return [found for body in bodies if (found := link_codec.decode_address(body, names))]

    def routes(self) -> list[Route]:
        """The main table, of both families: what of it could be anybody's like us."""
        names = dict(socket.if_nameindex())
        bodies = [body for family in Family for body in self._sock.dump_all(route_codec.dump_routes(family))]
        return [route for body in bodies if (route := route_codec.decode_route(body, names))]

    def has_l2miss(self, name: str) -> bool:
        """Whether a device is a vxlan one that tells of unknown MACs; Go flanneld makes those anew (contract 6.12)."""
        index = self.index(name)
        links = ((link_codec.decode_link(body)[0], body) for body in self._sock.dump_all(link_codec.dump_links()))
        return any(link_codec.has_l2miss(body) for found, body in links if found == index)

    def onlink(self, addresses: Sequence[IP]) -> dict[IP, str]:
        """By address, the interface through which the kernel reaches it without a gateway (contract 6.19)."""
        result: dict[IP, str] = {}
        names = {index: name for name, index in self._index.items()}
        for start in range(0, len(addresses), BATCH_MESSAGES):
            part = addresses[start : start + BATCH_MESSAGES]
            for ip, body in zip(part, self._sock.ask([route_codec.lookup_route(ip) for ip in part]), strict=True):
                name = names.get(route_codec.direct_device(body)) if body is not None else None
                if name:
                    result[ip] = name
        return result

    def idle_s(self, device: str) -> dict[MAC, float]:
        """By MAC, seconds since a packet used the forwarding entry: the kernel's own clock (dependencies 3.4)."""
        index = self.index(device)
        return dict(map(neigh_codec.decode_idle, self._sock.dump_all(neigh_codec.dump_neighbours(index, bridge=True))))

    def answered(self, device: str) -> list[Neighbour]:
        """The non-permanent neighbours of a device: answers to misses that have not aged out yet."""
        index = self.index(device)
        dump = self._sock.dump_all(neigh_codec.dump_neighbours(index, bridge=False))
        found = [neigh_codec.decode_neigh(body, {index: device}) for body in dump]
        return [entry for entry in found if isinstance(entry, Neighbour) and not entry.permanent]

    # ---- writing ------------------------------------------------------------------------------

    async def apply(self, ops: Sequence[Op]) -> list[Failure]:
        """Do all operations in order; one that fails does not stop the rest. Raises nothing: see ``apply_now``."""
        failures: list[Failure] = []
        for start in range(0, len(ops), BATCH_MESSAGES):
            failures += self.apply_now(ops[start : start + BATCH_MESSAGES])
            await asyncio.sleep(0)
        return failures

    def apply_now(self, ops: Sequence[Op]) -> list[Failure]:
        """The same at once: for a handful of operations that somebody waits for.

        A kernel that cannot even be asked (no memory for the message) has refused what was asked.
        """
        failures: list[Failure] = []
        waiting: list[tuple[Op, bytes]] = []
        for op in ops:
            try:
                if isinstance(op.obj, Sysctl):
                    failures += self._flush(waiting)
                    self._set(op.obj)
                elif isinstance(op.obj, Offload):
                    failures += self._flush(waiting)
                    ethtool.set_tx_checksums(op.obj.link, op.obj.on)
                elif op.verb is Verb.CREATE:
                    failures += self._flush(waiting)  # what follows needs the new device's index
                    self._create(op)
                else:
                    waiting += ((op, request) for request in self._encode(op))
            except KernelError as exc:
                failures.append(Failure(op, exc))
        return failures + self._flush(waiting)

    def _flush(self, waiting: list[tuple[Op, bytes]]) -> list[Failure]:
        """Send what waits, and leave nothing waiting."""
        sent, waiting[:] = list(waiting), []
        try:
            results = self._sock.batch([request for _op, request in sent])
        except KernelError as exc:
            return [Failure(op, exc) for op in dict.fromkeys(op for op, _request in sent)]
        judged = (self._judge(op, *result) for (op, _request), result in zip(sent, results, strict=True))
        return [failure for failure in judged if failure]

    def _judge(self, op: Op, code: int, text: str) -> Failure | None:
        """Whether a result is a failure: what is gone need not be deleted, what is there need not be added."""
        if not code or (op.verb is Verb.DELETE and code in _GONE.get(type(op.obj), ())):
            return None
        if code == errno.EEXIST and op.verb is Verb.PUT and isinstance(op.obj, Route):
            # Where ours leads nowhere, so does whatever is there: whose ever it is, it does what ours would do.
            there = self._route_at(op.obj) if op.obj.kind is RouteKind.UNICAST else op.obj
            if there == op.obj:
                return None
            text = f"{there} of somebody else is in the way"
        return Failure(op, KernelError(str(op), code, text))

    def _set(self, obj: Sysctl) -> None:
        """Write a setting; where /proc/sys cannot be written, as in most containers, over netlink if it goes."""
        try:
            procfs.write(procfs.PROC_SYS / obj.path, obj.value)
        except KernelError as exc:
            if exc.code not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self._set_over_netlink(obj)

    def _set_over_netlink(self, obj: Sysctl) -> None:
        _net, version, kind, device, name = obj.path.split("/")
        if version == "ipv4" and kind == "conf" and name in conf_codec.IPV4_SETTINGS:
            request = conf_codec.ipv4_setting(self.index(device), name, int(obj.value))
        elif kind == "neigh" and name in neigh_codec.NEIGH_SETTINGS:
            family = Family.V4 if version == "ipv4" else Family.V6
            request = neigh_codec.neigh_setting(family, self.index(device), name, int(obj.value))
        else:
            # What remains are router advertisements and duplicate address detection on a device that hears
            # neither: worth a line, not worth a host (flannel ignores the error as well, contract 6.13).
            log.warning("%s cannot be set, /proc/sys is read-only: going on without", obj)
            self._given_up[obj.path] = obj.value
            return
        ((code, text),) = self._sock.batch([request])
        if code:
            raise KernelError(f"set {obj}", code, text)

    def _create(self, op: Op) -> None:
        if not isinstance(op.obj, Link):
            raise TypeError(f"only links are created: {op}")
        ((code, text),) = self._sock.batch([link_codec.link_create(op.obj)])
        if code:
            raise KernelError(str(op), code, text)
        self._index.pop(op.obj.name, None)
        self._sock.batch([link_codec.link_alias(op.obj, self.index(op.obj.name))])

    def remake(self, link: Link, then: Sequence[Op]) -> list[Failure]:
        """Make a device anew as Go flanneld would, without ``l2miss`` and mark, and do operations at once after it.

        Raises:
            KernelError: the device could not be made; it is gone.
        """
        requests = [
            link_codec.link_delete(self.index(link.name)),
            link_codec.link_create(link._replace(up=False), l2miss=False),
        ]
        for code, text in self._sock.batch(requests):
            if code:
                raise KernelError(f"make {link.name} anew", code, text)
        self._index.pop(link.name, None)
        self._nexthops.forget()  # those of the old device are gone with it
        return self.apply_now(then)

    def use_plain_routes(self) -> None:
        """Write routes without nexthop objects until the next ``read``; an object goes with its last route."""
        self._nexthops.retire()

    def index(self, name: str) -> int:
        """Interface index of a device.

        Raises:
            KernelError: there is no such device.
        """
        if name not in self._index:
            try:
                self._index[name] = socket.if_nametoindex(name)
            except OSError as exc:
                raise KernelError(f"find device {name}", errno.ENODEV) from exc
        return self._index[name]

    def _encode(self, op: Op) -> list[bytes]:
        obj, delete = op.obj, op.verb is Verb.DELETE
        match obj:
            case Fdb():
                return self._encode_fdb(op, obj)
            case Neighbour():
                return [neigh_codec.neighbour(obj, self.index(obj.link), delete=delete)]
            case Route():
                return self._encode_route(op, obj)
            case Address():
                return [link_codec.address(obj, self.index(obj.link), delete=delete)]
            case Link():
                return self._encode_link(op, obj)
            case Sysctl() | Offload():
                raise TypeError("settings do not go through netlink")
            case _:
                assert_never(obj)

    def _encode_fdb(self, op: Op, obj: Fdb) -> list[bytes]:
        index = self.index(obj.link)
        requests = [neigh_codec.fdb(obj, index, delete=op.verb is Verb.DELETE)]
        if op.verb is Verb.PUT and isinstance(op.was, Fdb) and not any(op.was.dst):
            # To replace an entry that names nexthop objects is no error and changes nothing (vxlan_fdb_replace)
            requests.insert(0, neigh_codec.fdb(obj, index, delete=True))
        return requests

    def _encode_route(self, op: Op, obj: Route) -> list[bytes]:
        if not obj.gateway:
            replace = op.was is not None
            return [route_codec.route(obj, self._route_index(obj), delete=op.verb is Verb.DELETE, replace=replace)]
        hop = Hop(self._route_index(obj), obj.gateway, obj.onlink)
        if op.verb is Verb.DELETE:
            number, after = self._nexthops.drop(obj.dst)
            return [route_codec.route(obj, hop.ifindex, delete=True, nexthop=number), *after]
        number, before, after = self._nexthops.put(obj.dst, hop)
        return [*before, route_codec.route(obj, hop.ifindex, replace=op.was is not None, nexthop=number), *after]

    def _route_at(self, obj: Route) -> Route | str:
        """The route that holds a destination now; one that leads nowhere shows only by what becomes of packets."""
        (answer,) = self._sock.answers([route_codec.match_route(obj.dst)])
        if isinstance(answer, int):
            return f"route {_NOWHERE.get(answer, 'throw')} {obj.dst}"
        names = {index: name for name, index in self._index.items()}
        found = route_codec.decode_route(answer, names)
        return found if found and found.dst == obj.dst else f"route throw {obj.dst}"

    def _route_index(self, obj: Route) -> int:
        if obj.link.startswith("#"):
            return int(obj.link[1:])
        return self.index(obj.link) if obj.link else 0

    def _encode_link(self, op: Op, obj: Link) -> list[bytes]:
        index = self.index(obj.name)
        if op.verb is Verb.DELETE:
            del self._index[obj.name]
            return [link_codec.link_delete(index)]
        was = op.was if isinstance(op.was, Link) else None
        alias = [link_codec.link_alias(obj, index)] if was is None or was.alias != obj.alias else []
        return [*link_codec.link_set(obj, was, index), *alias]


def _read_sysctls(paths: Iterable[str], state: State) -> None:
    for path in paths:
        value = procfs.look(procfs.PROC_SYS / path)
        if value is not None:  # else no such device yet: absent from the state
            state.add(Sysctl(path, value))


def _read_offloads(state: State) -> None:
    for link in state.links.values():
        if link.vxlan:
            state.add(Offload(link.name, ethtool.tx_checksums(link.name)))
