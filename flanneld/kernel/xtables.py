"""Tells whether our rules in a legacy iptables table changed, without starting a process.

The kernel's legacy tables announce nothing, so they have to be polled; ``iptables-save`` would cost a
process each time, and megabytes beside a big kube-proxy (failures F38, F39). ``getsockopt`` hands out the
whole table as one blob, in 0.1 ms (in 30 ms where it has 20 000 rules); a few chains of it are looked at here.

A fingerprint is good for one thing, comparing it with an earlier one. It says nothing about what is
in the rules, so this file knows no matches and targets, only how long each entry is.

Source: include/uapi/linux/netfilter/x_tables.h, netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flanneld.model.addr import Family

_GET_INFO, _GET_ENTRIES = 64, 65
_NAME_SIZE = 32
_INFO = struct.Struct("=32sI5I5III")  # name, valid_hooks, hook_entry[5], underflow[5], num_entries, size
_ENTRIES_HEADER = 40  # name, size, and padding to the 8-byte alignment of an entry
_TARGET_HEADER = 32
_ERROR_TARGET_SIZE = 64  # what begins a user chain: a target of this size that carries the chain's name
_HOOKS = {"FORWARD": 2, "POSTROUTING": 4}

# 32-bit kernels lay some entries out differently; there the caller falls back to iptables-save
_SUPPORTED = ctypes.sizeof(ctypes.c_void_p) == 8
_libc = ctypes.CDLL(None, use_errno=True)


class _Layout(NamedTuple):
    """Where things stand in an entry; all offsets in bytes on 64-bit machines."""

    level: int
    names: str
    offsets: int
    """Two u16: of the target, and of the next entry."""
    volatile: tuple[int, int]
    """comefrom and the packet counters: different on each read."""
    header: int


_LAYOUTS = {
    Family.V4: _Layout(socket.IPPROTO_IP, "ip_tables_names", 88, (92, 112), 112),
    Family.V6: _Layout(socket.IPPROTO_IPV6, "ip6_tables_names", 140, (144, 168), 168),
}


def tables(family: Family) -> frozenset[str] | None:
    """Names of the legacy tables that exist in this network namespace.

    To ask the kernel about a table makes it, with hooks that every packet then passes, so look here first.

    Returns:
        Empty when the kernel has no such tables; None when it does not tell (not root).
    """
    try:
        # /proc/net would be that of the main thread
        text = Path("/proc/thread-self/net", _LAYOUTS[family].names).read_text()
    except FileNotFoundError:
        return frozenset()
    except OSError:
        return None
    return frozenset(text.split())


def fingerprint(family: Family, table: str, parent: str, *chains: str) -> bytes | None:
    """A value that stays the same while some chains stay the same, counters aside.

    Args:
        family: which of the two kinds of tables.
        table: ``nat`` or ``filter``.
        parent: a built-in chain, ``POSTROUTING`` or ``FORWARD``.
        chains: user chains, which need not exist.

    Returns:
        None when it cannot be told; the caller then has to run ``iptables-save``.
    """
    existing = tables(family)
    if existing is None or not _SUPPORTED:
        return None
    if table not in existing:
        return b"no such table"
    blob = _read(family, table)
    if blob is None:
        return None
    try:
        return _Blob(_LAYOUTS[family], *blob).fingerprint(_HOOKS[parent], *map(str.encode, chains))
    except (struct.error, IndexError):
        return None


def _read(family: Family, table: str) -> tuple[tuple[int, ...], bytearray] | None:
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        for _ in range(3):
            try:
                info = _getsockopt(sock, family, _GET_INFO, table, _INFO.size, b"")
                _, _, *hooks, _, size = _INFO.unpack(info)
                blob = _getsockopt(sock, family, _GET_ENTRIES, table, _ENTRIES_HEADER + size, struct.pack("=I", size))
            except OSError as exc:
                if exc.errno == errno.EAGAIN:  # replaced by somebody between the two calls
                    continue
                return None
            del blob[:_ENTRIES_HEADER]
            return tuple(hooks), blob
    return None


def _getsockopt(sock: socket.socket, family: Family, option: int, table: str, size: int, extra: bytes) -> bytearray:
    # socket.getsockopt passes no input and allows 1024 bytes only; here are megabytes, so nothing is copied
    answer = bytearray(size)
    question = table.encode().ljust(_NAME_SIZE, b"\0") + extra
    answer[: len(question)] = question
    length = ctypes.c_uint32(size)
    buffer = (ctypes.c_char * size).from_buffer(answer)
    if _libc.getsockopt(sock.fileno(), _LAYOUTS[family].level, option, buffer, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


class _Blob:
    """The entries of one table, as the kernel hands them out."""

    def __init__(self, layout: _Layout, hooks: tuple[int, ...], blob: bytearray) -> None:
        self._layout = layout
        self._starts, self._ends = hooks[:5], hooks[5:]
        self._blob = blob

    def fingerprint(self, hook: int, *chains: bytes) -> bytes:
        parts = [b"parent", *self._built_in(hook)]
        for chain in chains:
            parts += [b"chain", *self._user(chain)]
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    def _built_in(self, hook: int) -> Iterator[bytes]:
        offset = self._starts[hook]
        while offset <= self._ends[hook]:  # the underflow is the chain's last entry, its policy
            yield self._masked(offset)
            offset += self._size(offset)

    def _user(self, chain: bytes) -> Iterator[bytes]:
        offset = self._find(chain)
        if offset is None:
            return
        yield b"exists"
        while not self._begins_chain(offset):
            yield self._masked(offset)
            offset += self._size(offset)

    def _size(self, offset: int) -> int:
        # 0 would mean a walk without end; struct.error tells the caller that we misread the blob
        target, size = struct.unpack_from("=HH", self._blob, offset + self._layout.offsets)
        if size < target or target < self._layout.header:
            raise struct.error("not an entry")
        return int(size)

    def _masked(self, offset: int) -> bytes:
        """One entry without what changes by itself, and with the name of the chain it jumps to.

        A jump is an offset into the blob, which moves whenever anybody adds a rule before it.
        """
        end = offset + self._size(offset)
        first, last = self._layout.volatile
        target = offset + struct.unpack_from("=H", self._blob, offset + self._layout.offsets)[0]
        entry = bytes(self._blob[offset : offset + first] + self._blob[offset + last : target])
        name = self._name_at(target)
        if name:  # another module's target: compare all of it
            return entry + bytes(self._blob[target:end])
        (verdict,) = struct.unpack_from("=i", self._blob, target + _TARGET_HEADER)
        if verdict < 0:  # accept, drop, return
            return entry + struct.pack("=i", verdict)
        return entry + bytes(self._blob[verdict - _TARGET_HEADER : verdict - 2]).split(b"\0", 1)[0]

    def _name_at(self, target: int) -> bytes:
        # the standard target (accept, drop, return, jump) has an empty name
        return bytes(self._blob[target + 2 : target + 31]).split(b"\0", 1)[0]

    def _begins_chain(self, offset: int) -> bool:
        # user chains, and the blob's end, are marked by entries with the target ERROR
        return self._name_at(offset + self._layout.header) == b"ERROR" and (
            self._size(offset) == self._layout.header + _ERROR_TARGET_SIZE
        )

    def _find(self, chain: bytes) -> int | None:
        """Offset of the first rule of a user chain."""
        # the name may stand in a comment too, so look at what is around each place where it is found
        into_entry = self._layout.header + _TARGET_HEADER
        at = self._blob.find(chain + b"\0")
        while at >= 0:
            offset = at - into_entry
            if offset >= 0 and offset % 8 == 0 and self._begins_chain(offset):
                return offset + self._layout.header + _ERROR_TARGET_SIZE
            at = self._blob.find(chain + b"\0", at + 1)
        return None
