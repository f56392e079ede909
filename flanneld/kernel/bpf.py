"""bpf(2): maps, programs and trial runs, with ctypes and nothing else.

A map or program lives while a descriptor, or a program attached in the kernel, holds it. So what is attached keeps
working when the daemon goes, and everything else vanishes with it; nothing is pinned to a file system. Which packets
a program looks at is none of this module's business.

Sources: include/uapi/linux/bpf.h (commands, ``union bpf_attr``), bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from flanneld.errors import KernelError

_SYSCALL = {"x86_64": 321, "aarch64": 280}
"""Number of bpf(2) by machine: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h."""

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY, _PROG_LOAD = range(6)
_TEST_RUN, _PROG_BY_ID, _MAP_BY_ID, _INFO = 10, 13, 14, 15
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27

_CREATE = struct.Struct("=7I16s")  # type, key, value, entries, flags, inner_map_fd, numa_node, name
_ELEMENT = struct.Struct("=IxxxxQQQ")  # map_fd, key, value, flags
_BATCH = struct.Struct("=QQQQIIQQ")  # in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags
_LOAD = struct.Struct("=IIQQIIQII16s")  # type, count, code, license, log level/size/buffer, version, flags, name
_RUN = struct.Struct("=IIIIQQIIIIQQ")  # fd, verdict, sizes in/out, data in/out, repeat, ns, context sizes, contexts
_OBJECT = struct.Struct("=IIQ")  # fd, info_len, info
_PROG_INFO = struct.Struct("=II8sII3QIIQ16s")  # type, id, tag, …, map count, map ids, name
_MAP_INFO = struct.Struct("=6I16s")  # type, id, key, value, entries, flags, name

SCHED_CLS: Final = 3  # BPF_PROG_TYPE_SCHED_CLS
NO_PREALLOC: Final = 1
_LICENSE = ctypes.create_string_buffer(b"Apache-2.0")  # none of the helpers we call is reserved for GPL programs
_LOG_BYTES: Final = 1 << 18
_CONTEXT_BYTES: Final = 192  # struct __sk_buff
_CONTEXT_IFINDEX, _CONTEXT_GSO_SEGS, _CONTEXT_GSO_SIZE = 40, 164, 176

_REMEDIES = {
    errno.EPERM: "needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN; kernel lockdown and seccomp refuse too",
    errno.ENOSYS: "this kernel was built without CONFIG_BPF_SYSCALL",
    errno.ENOMEM: "the kernel, or the container's memory limit, has no room for it",
    errno.E2BIG: "more entries than the map was made for",
}

_libc = ctypes.CDLL(None, use_errno=True)


class MapKind(IntEnum):
    """Kinds of map, as numbered by ``enum bpf_map_type``."""

    HASH = 1
    PERCPU_ARRAY = 6
    LPM_TRIE = 11


class Map:
    """A map. Keys and values are bytes of the sizes it was made with.

    Args:
        fd: of the map; taken over.
        key_bytes: size of a key.
        value_bytes: size of a value.
    """

    def __init__(self, fd: int, kind: int, key_bytes: int, value_bytes: int, entries: int, name: str) -> None:
        self.fd = fd
        self.kind = kind
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.entries = entries
        self.name = name

    @staticmethod
    def create(kind: MapKind, key_bytes: int, value_bytes: int, entries: int, name: str) -> Map:
        """Make a map.

        Args:
            kind: what sort; hash maps and tries take memory as entries come.
            key_bytes: 4 for arrays; 4 more than the address for tries.
            value_bytes: per CPU for a per-CPU array.
            entries: how many it can hold.
            name: up to 15 letters, digits, ``_`` and ``.``; shown by bpftool.

        Raises:
            KernelError: no permission, no BPF in this kernel, no memory.
        """
        flags = NO_PREALLOC if kind in (MapKind.HASH, MapKind.LPM_TRIE) else 0
        attr = _CREATE.pack(kind, key_bytes, value_bytes, entries, flags, 0, 0, name.encode())
        fd = _with_memory(f"create BPF map {name}", _MAP_CREATE, attr)
        return Map(fd, kind, key_bytes, value_bytes, entries, name)

    @staticmethod
    def by_id(number: int) -> Map:
        """Open a map that a program of the kernel uses.

        Raises:
            KernelError: it is gone, or no permission.
        """
        fd, _attr = _bpf(f"open BPF map {number}", _MAP_BY_ID, struct.pack("=III", number, 0, 0))
        kind, _id, key, value, entries, _flags, name = _MAP_INFO.unpack(_info(fd, _MAP_INFO.size))
        return Map(fd, kind, key, value, entries, _text(name))

    def close(self) -> None:
        """Let go of it; it lives on while a program uses it."""
        os.close(self.fd)

    def update(self, items: Mapping[bytes, bytes]) -> None:
        """Add or replace entries, in one call where the kernel can.

        Raises:
            KernelError: no room; entries before the refused one are in.
        """
        if not items or self._batch(_UPDATE_BATCH, items, b"".join(items.values())):
            return
        for key, value in items.items():
            self._one(_MAP_UPDATE, key, value)

    def delete(self, keys: Iterable[bytes]) -> None:
        """Remove entries; those that are gone already are fine."""
        wanted = list(keys)
        if not wanted or self._batch(_DELETE_BATCH, wanted, b""):
            return
        for key in wanted:
            try:
                self._one(_MAP_DELETE, key)
            except KernelError as exc:
                if exc.code != errno.ENOENT:
                    raise

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None. Of a per-CPU map all values, one after the other, each padded to 8 bytes."""
        size = self.value_bytes
        if self.kind == MapKind.PERCPU_ARRAY:
            size = (size + 7 & ~7) * possible_cpus()
        value = ctypes.create_string_buffer(size)
        try:
            self._one(_MAP_LOOKUP, key, value)
        except KernelError as exc:
            if exc.code == errno.ENOENT:
                return None
            raise
        return value.raw

    def keys(self) -> list[bytes]:
        """All keys; of a map that changes meanwhile, some may be missed or repeated."""
        found: list[bytes] = []
        key: bytes | None = None
        following = ctypes.create_string_buffer(self.key_bytes)
        while len(found) <= self.entries:
            try:
                self._one(_MAP_NEXT_KEY, key, following)
            except KernelError as exc:
                if exc.code == errno.ENOENT:
                    break
                raise
            key = following.raw
            found.append(key)
        return found

    def items(self) -> dict[bytes, bytes]:
        """All entries, in one call where the kernel can; of a map that changes meanwhile, some may be missed."""
        keys, values = self.dump()
        return dict(zip(_cut(keys, self.key_bytes), _cut(values, self.value_bytes), strict=True))

    def dump(self) -> tuple[bytes, bytes]:
        """All keys and all values, each one after the other; the same bytes while nobody changes the map."""
        keys = ctypes.create_string_buffer(self.entries * self.key_bytes)
        values = ctypes.create_string_buffer(self.entries * self.value_bytes)
        where = ctypes.create_string_buffer(max(self.key_bytes, 4))
        at = [_address(buffer) for buffer in (where, keys, values)]
        buffer = ctypes.create_string_buffer(_BATCH.pack(0, *at, self.entries, self.fd, 0, 0), _BATCH.size)
        try:
            _bpf_in_place(f"read BPF map {self.name}", _LOOKUP_BATCH, buffer)
        except KernelError as exc:
            if exc.code != errno.ENOENT:  # which says that this was the end of the map
                found = {key: value for key in self.keys() if (value := self.lookup(key)) is not None}
                return b"".join(found), b"".join(found.values())
        count = _BATCH.unpack(buffer.raw)[4]
        return ctypes.string_at(keys, count * self.key_bytes), ctypes.string_at(values, count * self.value_bytes)

    def sums(self) -> list[tuple[int, ...]]:
        """Of a per-CPU array of 64-bit counters: by index, each counter summed over the CPUs."""
        width = self.value_bytes // 8
        result = []
        for index in range(self.entries):
            words = memoryview(self.lookup(struct.pack("=I", index)) or b"").cast("Q")
            result.append(tuple(sum(words[at::width]) for at in range(width)))
        return result

    def _one(self, command: int, key: bytes | None, value: bytes | ctypes.Array[ctypes.c_char] | None = None) -> int:
        attr = _ELEMENT.pack(self.fd, _address(key), _address(value), 0)
        return _bpf(f"use BPF map {self.name}", command, attr)[0]

    def _batch(self, command: int, keys: Iterable[bytes], values: bytes) -> bool:
        """Whether the kernel took it as a whole; if not, one by one tells what is wrong, or works on old kernels."""
        packed = b"".join(keys)
        attr = _BATCH.pack(0, 0, _address(packed), _address(values), len(packed) // self.key_bytes, self.fd, 0, 0)
        try:
            _bpf(f"use BPF map {self.name}", command, attr)
        except KernelError:
            return False
        return True


class Outcome(NamedTuple):
    """What a program did with a packet in a trial run."""

    verdict: int
    """TC_ACT_*; negative is given as its two's complement of 32 bits."""
    packet: bytes
    """The packet after, with its Ethernet header."""


class ProgramInfo(NamedTuple):
    """What the kernel says of a program."""

    id: int
    map_ids: tuple[int, ...]
    name: str


class Loaded:
    """A program in the kernel.

    Args:
        fd: of the program; taken over.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    def load(name: str, code: bytes) -> Loaded:
        """Have a traffic-control program verified and compiled.

        Args:
            name: up to 15 letters, digits, ``_`` and ``.``.
            code: as from ``bpfasm``.

        Raises:
            KernelError: refused; the text ends with what the verifier said last.
        """
        what = f"load BPF program {name}"
        source = ctypes.create_string_buffer(code, len(code))

        def attr(level: int, size: int, log: int) -> bytes:
            code_at, license_at = ctypes.addressof(source), ctypes.addressof(_LICENSE)
            return _LOAD.pack(SCHED_CLS, len(code) // 8, code_at, license_at, level, size, log, 0, 0, name.encode())

        try:
            return Loaded(_with_memory(what, _PROG_LOAD, attr(0, 0, 0)))
        except KernelError as exc:
            log = ctypes.create_string_buffer(_LOG_BYTES)
            try:
                return Loaded(_with_memory(what, _PROG_LOAD, attr(1, _LOG_BYTES, ctypes.addressof(log))))
            except KernelError:
                said = [line for line in log.value.decode(errors="replace").splitlines() if _says_something(line)]
                raise KernelError(what, exc.code, said[-1] if said else exc.detail) from exc

    @staticmethod
    def by_id(number: int) -> Loaded:
        """Open a program by the number under which tc lists it.

        Raises:
            KernelError: it is gone, or no permission.
        """
        return Loaded(_bpf(f"open BPF program {number}", _PROG_BY_ID, struct.pack("=III", number, 0, 0))[0])

    def close(self) -> None:
        """Let go of it; it lives on while attached."""
        os.close(self.fd)

    def info(self) -> ProgramInfo:
        """Its number, its maps and its name."""
        ids = ctypes.create_string_buffer(4 * 64)
        ask = bytearray(_PROG_INFO.size)
        struct.pack_into("=IQ", ask, 52, 64, ctypes.addressof(ids))
        fields = _PROG_INFO.unpack(_info(self.fd, len(ask), bytes(ask)))
        count = fields[9]
        return ProgramInfo(fields[1], struct.unpack_from(f"={min(count, 64)}I", ids), _text(fields[11]))

    def run(self, packet: bytes, *, ifindex: int = 0, gso_bytes: int = 0, gso_segments: int = 0) -> Outcome:
        """Try the program on one packet; what it redirects goes nowhere, what it counts is counted.

        Args:
            packet: at least 14 bytes, beginning with an Ethernet header.
            ifindex: device on which the packet shall seem to be; 0 = loopback.
            gso_bytes: payload of one segment of a super-packet; 0 = an ordinary packet.
            gso_segments: how many of them.

        Raises:
            KernelError: the kernel cannot run it.
        """
        context = bytearray(_CONTEXT_BYTES)
        for offset, value in ((_CONTEXT_IFINDEX, ifindex), (_CONTEXT_GSO_SEGS, gso_segments)):
            struct.pack_into("=I", context, offset, value)
        struct.pack_into("=I", context, _CONTEXT_GSO_SIZE, gso_bytes)
        context_in = ctypes.create_string_buffer(bytes(context), _CONTEXT_BYTES)
        given = ctypes.create_string_buffer(packet, len(packet))
        after = ctypes.create_string_buffer(len(packet) + 256)
        data = (len(packet), len(after), ctypes.addressof(given), ctypes.addressof(after))
        attr = _RUN.pack(self.fd, 0, *data, 1, 0, _CONTEXT_BYTES, 0, ctypes.addressof(context_in), 0)
        fields = _RUN.unpack(_bpf("run a BPF program on trial", _TEST_RUN, attr)[1])
        return Outcome(fields[1], after.raw[: fields[3]])


def possible_cpus() -> int:
    """How many CPUs this machine can ever have: that many values a per-CPU entry has.

    Raises:
        KernelError: sysfs does not tell. A guess could make the kernel write beyond our buffer.
    """
    path = "/sys/devices/system/cpu/possible"
    try:
        with open(path) as file:
            return int(file.read().strip().replace(",", "-").split("-")[-1]) + 1
    except (OSError, ValueError) as exc:
        raise KernelError(f"read {path}", getattr(exc, "errno", 0) or 0, "mount /sys for the daemon") from exc


def _info(fd: int, size: int, ask: bytes = b"") -> bytes:
    answer = ctypes.create_string_buffer(ask, size)
    _bpf("read about a BPF object", _INFO, _OBJECT.pack(fd, size, ctypes.addressof(answer)))
    return answer.raw


def _with_memory(what: str, command: int, attr: bytes) -> int:
    """Create something; before Linux 5.11 it is charged to RLIMIT_MEMLOCK, which is small and says EPERM when full."""
    try:
        return _bpf(what, command, attr)[0]
    except KernelError as exc:
        if exc.code != errno.EPERM or not _lift_memlock():
            raise
    return _bpf(what, command, attr)[0]


def _lift_memlock() -> bool:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) == unlimited:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (OSError, ValueError):
        return False
    return True


def _bpf(what: str, command: int, attr: bytes) -> tuple[int, bytes]:
    """One system call: its result, and the attributes as the kernel left them."""
    buffer = ctypes.create_string_buffer(attr, len(attr))
    return _bpf_in_place(what, command, buffer), buffer.raw


def _bpf_in_place(what: str, command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    """One system call: its result; the kernel may write into the attributes, in failure too."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise KernelError(what, errno.ENOSYS, f"bpf(2) is not known to us on {platform.machine()}")
    result: int = _libc.syscall(ctypes.c_long(number), ctypes.c_long(command), attr, ctypes.c_long(len(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise KernelError(what, code, _REMEDIES.get(code, ""))
    return result


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _address(data: bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Where the bytes lie; the caller keeps them alive over the call."""
    if data is None:
        return 0
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(data)


def _says_something(line: str) -> bool:
    return bool(line) and not line.startswith(("processed ", "verification time", "stack depth"))


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
