"""Gives up what root may do and this daemon does not need: capabilities of this process and of the tools it runs.

And core files: one would hold passwords and keys, in a place that nobody guards.

A flaw in a parser of foreign bytes must not be worth the whole machine. What stays is enough to configure the network
(design/threat-model.md says why each). Nothing here fails: a process that may not give something up goes on with it.

Capabilities belong to threads and are inherited by new ones: what is given up later, threads that are there keep.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import struct
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Final

log = logging.getLogger("flanneld")


class Cap(IntEnum):
    """Source: include/uapi/linux/capability.h."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    SETPCAP = 8
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    NET_RAW = 13
    SYS_MODULE = 16
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    BPF = 39


ALWAYS: Final = frozenset(
    {
        Cap.NET_ADMIN,  # links, routes, neighbours, settings below /proc/sys/net, firewall, TUN, large socket buffers
        Cap.NET_RAW,  # iptables' sockets, the table of iptables-legacy, ICMP of the udp backend
        Cap.NET_BIND_SERVICE,  # --healthz-port and the udp backend's port may lie below 1024
        Cap.DAC_READ_SEARCH,  # keys and certificates that belong to another user, such as etcd
    }
)
AT_START: Final = frozenset(
    {
        Cap.SETPCAP,  # to give up more later
        Cap.SYS_MODULE,  # iptables-legacy loads ip_tables itself where nothing has used it since boot
    }
)

_VERSION_3 = 0x20080522
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=6I")  # effective, permitted, inheritable: the lower 32 of each, then the upper
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24  # include/uapi/linux/prctl.h
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER = 47, 3
_libc = ctypes.CDLL(None, use_errno=True)


def keep_at_start(written: Iterable[str]) -> None:
    """Give up everything that no configuration needs.

    Args:
        written: directories in which files will be written; one that belongs to another user costs
            ``DAC_OVERRIDE``, which is kept for it.
    """
    foreign = [path for path in written if path and _belongs_to_another(Path(path))]
    if foreign:
        log.info("the capability DAC_OVERRIDE is kept, to write where another user owns path=%s", ",".join(foreign))
    _keep(ALWAYS | AT_START | _for_programs() | ({Cap.DAC_OVERRIDE} if foreign else frozenset()))
    # the upper limit stays: prlimit(1) can switch them on for a running daemon
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def keep_at_work(backend_type: str) -> None:
    """Give up what only the start needed, and what only other backends need.

    Args:
        backend_type: ``Backend.Type``.
    """
    _keep(ALWAYS | {Cap.DAC_OVERRIDE} | _needed_by(backend_type))


def held() -> int:
    """What this thread may have, a bit for each capability; 0 where the kernel does not tell."""
    return _read()[1]


def given_up(backend_type: str, at_first: int) -> list[str]:
    """What a backend needs, and this process had and has no more. Nothing gives it back but another process.

    Args:
        backend_type: ``Backend.Type``.
        at_first: what ``held`` told when the process began.
    """
    lost = at_first & ~held()
    return [f"CAP_{cap.name}" for cap in sorted(_needed_by(backend_type)) if lost >> cap & 1]


def keep_nothing() -> None:
    """Give up everything, in this thread alone; others keep what they have."""
    _write((0, 0, 0))


def _needed_by(backend_type: str) -> frozenset[Cap]:
    """Beside ``ALWAYS``: only ``udp`` has programs for the kernel to load."""
    return _for_programs() if backend_type == "udp" else frozenset()


def _for_programs() -> frozenset[Cap]:
    """What loading eBPF takes: BPF; before Linux 5.8, which has none, SYS_ADMIN and more locked memory."""
    if _last_capability() >= Cap.BPF:
        return frozenset({Cap.BPF})
    return frozenset({Cap.SYS_ADMIN, Cap.SYS_RESOURCE})


def _keep(wanted: frozenset[Cap]) -> None:
    """Lower all sets of this thread to what is wanted; nothing is ever added.

    For root, programs that it runs have what is in the bounding set; for others, what is in the ambient set.
    """
    mask = sum(1 << cap for cap in wanted)
    before = _read()
    gone = [number for number in range(_last_capability() + 1) if not mask >> number & 1]
    for number in gone:
        if _prctl(_PR_CAPBSET_READ, number) == 1:
            _prctl(_PR_CAPBSET_DROP, number)
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, number)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if any(part & ~mask for part in before):
        _write([part & mask for part in before])
    left = _read()[1]
    log.debug("capabilities given up=%x kept=%x", before[1] & ~left, left)


def _read() -> tuple[int, int, int]:
    """Effective, permitted and inheritable set of this thread; empty where the kernel does not tell."""
    data = ctypes.create_string_buffer(_SETS.size)
    if _libc.capget(_HEADER.pack(_VERSION_3, 0), data):
        return 0, 0, 0
    low, high = _SETS.unpack(data.raw)[:3], _SETS.unpack(data.raw)[3:]
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable


def _write(sets: Iterable[int]) -> None:
    parts = tuple(sets)
    data = _SETS.pack(*(part & 0xFFFFFFFF for part in parts), *(part >> 32 for part in parts))
    if _libc.capset(_HEADER.pack(_VERSION_3, 0), data):
        log.debug("capabilities cannot be given up reason=%s", os.strerror(ctypes.get_errno()))


def _prctl(option: int, *values: int) -> int:
    padded = (*values, 0, 0, 0, 0)[:4]  # the kernel refuses some options unless the unused ones are zero
    return int(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)))


def _last_capability() -> int:
    try:
        return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    except (OSError, ValueError):
        return 63


def _belongs_to_another(directory: Path) -> bool:
    """Whether root without capabilities may not write in a directory, or make it in the first parent that there is."""
    for path in (directory, *directory.absolute().parents):
        try:
            status = path.stat()
        except OSError:
            continue
        return status.st_uid != os.geteuid() and not status.st_mode & 0o002
    return False
