"""Kernel notifications: misses on one socket, hints of change on another.

Two sockets, because they must not drown each other: a scan that floods misses may overrun the first,
and costs one re-read of unresolved neighbours; a route storm may overrun the second, and costs one
full cycle. Neither carries state: what a message says is looked up again.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from flanneld.errors import KernelError
from flanneld.kernel import link_codec, neigh_codec, nlmsg, route_codec
from flanneld.model.addr import IP, MAC
from flanneld.model.objects import Address, Fdb, Link, Neighbour, Route

log = logging.getLogger("flanneld.kernel")

# Legacy group bits of NETLINK_ROUTE (include/uapi/linux/rtnetlink.h, RTMGRP_*).
GROUP_LINK, GROUP_NEIGH = 0x1, 0x4
GROUP_TC = 0x8
GROUP_RULE4, GROUP_RULE6 = 0x80, 0x40000
GROUP_ADDR4, GROUP_ROUTE4, GROUP_ADDR6, GROUP_ROUTE6 = 0x10, 0x40, 0x100, 0x400
GROUP_NETCONF4, GROUP_NETCONF6 = 0x800000, 0x1000000  # 1 << RTNLGRP_IPV4_NETCONF - 1, and of IPv6

RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER = 37, 44, 45
_ADDED = frozenset({nlmsg.RTM_NEWLINK, nlmsg.RTM_NEWADDR, nlmsg.RTM_NEWROUTE, nlmsg.RTM_NEWNEIGH})
REMOVALS = frozenset({nlmsg.RTM_DELLINK, RTM_DELQDISC, RTM_DELTFILTER})

SO_RCVBUFFORCE, SO_ATTACH_FILTER = 33, 26
RECEIVE_BUFFER_BYTES = 8 << 20
"""The default 208 KiB holds 256 misses (measured); a burst of thousands must fit."""
DATAGRAMS_PER_TURN = 256
"""Notifications taken in one turn of the event loop, so that a flood leaves turns to everything else."""


class Miss(NamedTuple):
    """One RTM_GETNEIGH: the kernel asks who has ``ip`` (L3), or where ``mac`` lives (L2, ``ip`` None)."""

    ifindex: int
    ip: IP | None
    mac: MAC | None


class Hint(NamedTuple):
    """Something changed: the object as announced, and whether it came (or changed) or went."""

    new: bool
    obj: Link | Address | Route | Neighbour | Fdb
    port: int = 0
    """Netlink port of who asked for it; 0 = the kernel itself, or it does not say."""


class _Listener:
    """A multicast socket on the event loop: drain a bounded number of datagrams, report overruns."""

    def __init__(self, groups: int, overrun: Callable[[], None]) -> None:
        self._overrun = overrun
        try:
            self._sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )
            self._sock.bind((0, groups))
        except OSError as exc:
            raise KernelError("listen for kernel notifications", exc.errno or 0) from exc
        for option in (SO_RCVBUFFORCE, socket.SO_RCVBUF):  # FORCE needs CAP_NET_ADMIN in the initial user namespace
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, option, RECEIVE_BUFFER_BYTES)
                break
            except PermissionError:
                continue

    def start(self) -> None:
        """Begin to deliver; call from the event loop's thread."""
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._drain)

    def close(self) -> None:
        """Stop delivering."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()

    def _drain(self) -> None:
        datagrams = []
        try:
            for _ in range(DATAGRAMS_PER_TURN):
                datagrams.append(self._sock.recv(1 << 16))
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
            self.overran()
        if datagrams:
            self.take(datagrams)

    def overran(self) -> None:
        """Tell that the kernel had to drop notifications."""
        self._overrun()

    def take(self, datagrams: Sequence[bytes]) -> None:
        """Handle what one turn brought."""
        raise NotImplementedError


class MissListener(_Listener):
    """Delivers the kernel's questions, a turn's worth at a time."""

    def __init__(self, answer: Callable[[list[Miss]], None], overrun: Callable[[], None]) -> None:
        super().__init__(GROUP_NEIGH, overrun)
        self._answer = answer
        _accept_only(self._sock, nlmsg.RTM_GETNEIGH)

    def take(self, datagrams: Sequence[bytes]) -> None:
        """Hand over all misses of one turn together, so that duplicates can be merged."""
        misses = [
            Miss(*neigh_codec.decode_miss(body))
            for datagram in datagrams
            for kind, _flags, _seq, _pid, body in nlmsg.messages(datagram)
            if kind == nlmsg.RTM_GETNEIGH
        ]
        if misses:
            self._answer(misses)


class HintListener(_Listener):
    """Delivers changes that others made: what carries one of our own port ids is an echo and is dropped."""

    def __init__(self, hint: Callable[[Hint], None], overrun: Callable[[], None], own_ports: frozenset[int]) -> None:
        groups = GROUP_LINK | GROUP_NEIGH | GROUP_ADDR4 | GROUP_ROUTE4 | GROUP_ADDR6 | GROUP_ROUTE6
        super().__init__(groups, overrun)
        self._hint = hint
        self._own_ports = own_ports
        self._names = dict(socket.if_nameindex())
        _drop_echoes(self._sock, own_ports)

    def overran(self) -> None:
        """What was lost may have named a device: without its name all that follows about it would be lost too."""
        self._names = dict(socket.if_nameindex())
        super().overran()

    def take(self, datagrams: Sequence[bytes]) -> None:
        """Hand over changes one by one, echoes of our own left out."""
        for datagram in datagrams:
            for kind, _flags, _seq, pid, body in nlmsg.messages(datagram):
                hint = self._decode(kind, body)
                if hint is not None and pid not in self._own_ports:
                    self._hint(hint._replace(port=pid))

    def _decode(self, kind: int, body: memoryview) -> Hint | None:
        obj: Link | Address | Route | Neighbour | Fdb | None = None
        if kind in (nlmsg.RTM_NEWLINK, nlmsg.RTM_DELLINK):
            if body[0] == nlmsg.AF_BRIDGE:
                return None  # a bridge port's state, not a device's; DELLINK of this family means "left its bridge"
            index, obj = link_codec.decode_link(body)
            self._names[index] = obj.name
        elif kind in (nlmsg.RTM_NEWADDR, nlmsg.RTM_DELADDR):
            obj = link_codec.decode_address(body, self._names)
        elif kind in (nlmsg.RTM_NEWROUTE, nlmsg.RTM_DELROUTE):
            obj = route_codec.decode_route(body, self._names)
        elif kind in (nlmsg.RTM_NEWNEIGH, nlmsg.RTM_DELNEIGH):
            obj = neigh_codec.decode_neigh(body, self._names, any_state=True)
        return Hint(kind in _ADDED, obj) if obj else None


class RuleListener(_Listener):
    """Tells that routing rules have changed: never which."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(GROUP_RULE4 | GROUP_RULE6, changed)
        self._changed = changed

    def take(self, datagrams: Sequence[bytes]) -> None:
        """One call for all that one turn brought."""
        self._changed()


class HookListener(_Listener):
    """Tells when one of some devices is removed or changed, or a qdisc or filter on it, or a filter of ours replaced.

    What is there instead the caller finds out.

    Args:
        changed: called from the event loop.
        priorities: of our filters.
        own_port: netlink port from which we hang them; 0 = hear of that, too.
    """

    def __init__(self, changed: Callable[[], None], priorities: Set[int], own_port: int = 0) -> None:
        super().__init__(GROUP_LINK | GROUP_TC, changed)
        self._changed, self._priorities, self._own_port = changed, priorities, own_port
        self.devices: frozenset[int] = frozenset()
        """Interface indexes of those that matter."""
        self.kept: frozenset[int] = frozenset()
        """Those of them whose settings matter, too."""

    def take(self, datagrams: Sequence[bytes]) -> None:
        """One call for all that one turn brought."""
        for datagram in datagrams:
            for kind, _flags, _seq, pid, body in nlmsg.messages(datagram):
                # ifinfomsg and tcmsg both have their index at offset 4
                if self._matters(kind, body, struct.unpack_from("=i", body, 4)[0], pid == self._own_port):
                    self._changed()
                    return

    def _matters(self, kind: int, body: memoryview, ifindex: int, by_us: bool) -> bool:
        if kind == nlmsg.RTM_NEWLINK:
            return ifindex in self.kept and not by_us
        return ifindex in self.devices and (
            kind in REMOVALS or (kind == RTM_NEWTFILTER and not by_us and self._is_ours(body))
        )

    def _is_ours(self, tcmsg: memoryview) -> bool:
        """Whether a filter has one of our priorities, as one has that was put in the place of ours."""
        return struct.unpack_from("=I", tcmsg, 16)[0] >> 16 in self._priorities


class NetconfListener(_Listener):
    """Tells when forwarding or source validation of a device, or of all, was set: by whatever mount of proc."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(GROUP_NETCONF4 | GROUP_NETCONF6, changed)
        self._changed = changed

    def take(self, datagrams: Sequence[bytes]) -> None:
        """One call for all that one turn brought."""
        self._changed()


# Classic BPF: (code, jump if true, jump if false, operand). Source: linux/filter.h; kernel docs networking/filter.rst.
# Loads are big-endian whatever the machine, netlink headers are in its own order, hence htons and htonl.
Instruction = tuple[int, int, int, int]
_TYPE: Instruction = (0x28, 0, 0, 4)  # ldh [4], nlmsg_type
_PORT: Instruction = (0x20, 0, 0, 12)  # ld [12], nlmsg_pid
_ACCEPT: Instruction = (0x06, 0, 0, 0xFFFFFFFF)
_DROP: Instruction = (0x06, 0, 0, 0)
_EQUAL = 0x15


def _accept_only(sock: socket.socket, message_type: int) -> None:
    """Drop every other message type in the kernel, so that echoes of our own answers never wake us."""
    _filter(sock, [_TYPE, (_EQUAL, 0, 1, socket.htons(message_type)), _ACCEPT, _DROP])


def _drop_echoes(sock: socket.socket, own_ports: frozenset[int]) -> None:
    """Drop in the kernel what our own requests caused: at the start that is most of what is announced.

    Links are let through, because they name the devices that all else speaks of.
    """
    ports = sorted(own_ports)
    links = [
        (_EQUAL, len(ports) + 2 - i, 0, socket.htons(kind))
        for i, kind in enumerate((nlmsg.RTM_NEWLINK, nlmsg.RTM_DELLINK))
    ]
    echoes = [(_EQUAL, len(ports) - i, 0, socket.htonl(port)) for i, port in enumerate(ports)]
    _filter(sock, [_TYPE, *links, _PORT, *echoes, _ACCEPT, _DROP])


def _filter(sock: socket.socket, program: Sequence[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))
