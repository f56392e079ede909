"""Tells, without starting a process, whether nftables rules that concern us may have changed.

The kernel numbers its ruleset (the generation, one more per transaction) and multicasts what each
transaction did. Together they answer "is what I verified still so?" with one netlink request, and
call us when it is not. Nothing here reads or writes a rule.

Source: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from flanneld.contracts import Wake
from flanneld.errors import KernelError
from flanneld.model.addr import Family

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_SUBSYS_NFTABLES = 10
_NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWGEN, _GETGEN = 3, 5, 6, 8, 15, 16
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_NEW = 0x1, 0x600
"""The latter is NLM_F_EXCL or NLM_F_CREATE; ``iptables -N`` has only the first."""

# A big transaction of kube-proxy's announces tens of thousands of rules; an overrun costs one look, no more.
_RCVBUF_BYTES = 4 << 20

# bounds how long one turn of the event loop is kept; the loop calls again for the rest
_DATAGRAMS_A_TURN = 32

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_HEADERS_SIZE = _HEADER.size + 4  # nlmsghdr, then nfgenmsg: family, version, resource

Concerns = Callable[[int, str, str], bool]
"""Whether a change concerns us: family (2 or 10, as in ``Family``; 1 = both, inet), table, chain (empty: the whole
table)."""


class NftEvents:
    """A version number per family that grows whenever rules that concern us may have changed.

    Not for use before the process is in its final network namespace: the first call opens the sockets.
    """

    def __init__(self, concerns: Concerns) -> None:
        self._concerns = concerns
        self._events: socket.socket | None = None
        self._query: socket.socket | None = None
        self._generation = -1
        self._versions = {int(family): 0 for family in Family}
        self._told = dict(self._versions)
        """Versions last returned or announced; those above are news."""
        self._pending: set[int] = set()
        """Families whose rules the transaction now being read has changed."""
        self._held = False
        self._wake: Wake | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def version(self, family: Family) -> int:
        """The present version; what is read from the kernel after this call belongs to it or a later one.

        Raises:
            KernelError: the kernel has no nftables, or we are not root.
        """
        self._open()
        self._drain()
        generation = self._ask()
        if generation != self._generation:
            # a transaction whose announcement has not come yet: it may concern us
            self._generation = generation
            self._bump(self._versions)
        self._told[family] = self._versions[family]
        return self._versions[family]

    def watch(self, wake: Wake) -> None:
        """Call ``wake`` on each new version that ``version()`` has not returned already.

        Raises:
            KernelError: as ``version``; watching then begins with the first ``version`` that does not raise.
        """
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        if self._events:
            self._loop.add_reader(self._events.fileno(), self._readable)
        else:
            self._open()

    @contextmanager
    def held(self) -> Iterator[None]:
        """No ``wake`` inside the block, where our own changes happen; afterwards for what is still news."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._tell()

    def close(self) -> None:
        """Stop watching."""
        if self._loop and self._events:
            self._loop.remove_reader(self._events.fileno())
        for sock in (self._events, self._query):
            if sock:
                sock.close()
        self._events = self._query = self._wake = self._loop = None

    def _open(self) -> None:
        if self._events:
            return
        try:
            with ExitStack() as opened:
                query = opened.enter_context(_netlink_socket())
                events = opened.enter_context(_netlink_socket())
                try:
                    events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RCVBUF_BYTES)
                except PermissionError:
                    events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RCVBUF_BYTES)
                events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
                opened.pop_all()
        except OSError as exc:
            raise KernelError("watch nftables changes", exc.errno or 0) from exc
        self._query, self._events = query, events
        if self._loop:
            self._loop.add_reader(events.fileno(), self._readable)

    def _ask(self) -> int:
        if self._query is None:  # _open raised or made it
            raise KernelError("read the nftables generation", errno.EBADF)
        request = _HEADER.pack(_HEADERS_SIZE, _SUBSYS_NFTABLES << 8 | _GETGEN, _NLM_F_REQUEST, 0, 0) + bytes(4)
        try:
            # the kernel answers while we send, so the answer is there already
            self._query.send(request)
            answer = self._query.recv(4096)
        except OSError as exc:
            raise KernelError("read the nftables generation", exc.errno or 0) from exc
        kind = _HEADER.unpack_from(answer)[1]
        if kind == _NLMSG_ERROR:
            raise KernelError("read the nftables generation", -struct.unpack_from("=i", answer, _HEADER.size)[0])
        return _generation(answer)

    def _readable(self) -> None:
        self._drain(_DATAGRAMS_A_TURN)
        self._tell()

    def _tell(self) -> None:
        if self._wake and not self._held and self._versions != self._told:
            self._told.update(self._versions)
            self._wake("nftables rules changed")

    def _drain(self, limit: int = sys.maxsize) -> None:
        for _ in range(limit):
            if self._events is None:
                return
            try:
                datagram = self._events.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as exc:
                # ENOBUFS: announcements were lost, any of them may have concerned us; the rest is readable.
                # Nothing else is known to happen here, and a look at the rules is the right answer to it too.
                self._bump(self._versions)
                if exc.errno == errno.ENOBUFS:
                    continue
                return
            for kind, message in _messages(datagram):
                self._take(kind, message)

    def _take(self, kind: int, message: memoryview) -> None:
        if kind >> 8 != _SUBSYS_NFTABLES:
            return
        kind &= 0xFF
        if kind != _NEWGEN:
            family = message[_HEADER.size]
            if family not in self._pending and self._concerns(family, *_table_and_chain(kind, message)):
                self._pending.update((family,) if family in self._versions else self._versions)
            return
        # the end of a transaction
        self._generation = _generation(message)
        self._bump(self._pending)
        self._pending.clear()

    def _bump(self, families: Iterable[int]) -> None:
        for family in families:
            self._versions[family] += 1


def _netlink_socket() -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    )
    sock.bind((0, 0))
    return sock


def _messages(datagram: bytes) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(datagram)
    while len(view) >= _HEADERS_SIZE:
        length, kind, _, _, _ = _HEADER.unpack_from(view)
        if not _HEADERS_SIZE <= length <= len(view):
            return
        yield kind, view[:length]
        view = view[(length + 3) & ~3 :]


def _attributes(message: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    view = memoryview(message)[_HEADERS_SIZE:]
    while len(view) >= _ATTR.size:
        length, kind = _ATTR.unpack_from(view)
        if not _ATTR.size <= length <= len(view):
            return
        yield kind & 0x3FFF, view[_ATTR.size : length]
        view = view[(length + 3) & ~3 :]


def _table_and_chain(kind: int, message: memoryview) -> tuple[str, str]:
    # attribute 1 names the table in messages of every kind (NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, ...)
    wanted = {_NEWCHAIN: 3, _DELCHAIN: 3, _NEWRULE: 2, _DELRULE: 2}.get(kind)
    table = chain = ""
    for number, value in _attributes(message):
        if number == 1:
            table = _text(value)
        elif number == wanted:
            chain = _text(value)
        if number >= 3:
            break
    if kind == _NEWCHAIN and not _HEADER.unpack_from(message)[2] & _NLM_F_NEW:
        # A chain that is there was changed, perhaps renamed: the old name, which may have been ours, is not told.
        # Kernels before 5.15 do not mark new chains; to them each is worth a look.
        chain = ""
    return table, chain


def _generation(message: bytes | memoryview) -> int:
    for number, value in _attributes(message):
        if number == 1 and len(value) == 4:  # NFTA_GEN_ID
            return int.from_bytes(value, "big")
    raise KernelError("read the nftables generation", errno.EBADMSG)


def _text(value: memoryview) -> str:
    return bytes(value).rstrip(b"\0").decode(errors="replace")
