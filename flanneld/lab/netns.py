"""Network namespaces: make, find, enter and remove them. Knows nothing of hosts or daemons.

A thread enters a namespace, works and ends: ``setns`` changes the calling thread only, so the process
itself never leaves the namespace it was started in.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flanneld.errors import ConfigError, KernelError
from flanneld.lab.spec import EXTRA

T = TypeVar("T")

NETNS_DIR = Path("/run/netns")
"""Where ``ip netns`` keeps names (iproute2, ``NETNS_RUN_DIR``)."""
CLONE_NEWNET = 0x40000000
"""Source: include/uapi/linux/sched.h."""


def add(names: Iterable[str]) -> None:
    """Make namespaces; one ``ip`` for all of them, 4 ms each."""
    _ip_batch(f"netns add {name}" for name in names)


def remove(names: Iterable[str]) -> None:
    """Remove those that exist. Their links, routes and rules go with them."""
    _ip_batch(f"netns del {name}" for name in names if (NETNS_DIR / name).exists())


def listing(prefix: str) -> list[str]:
    """Names that begin with ``prefix``, sorted."""
    try:
        return sorted(name for name in os.listdir(NETNS_DIR) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def pids(names: Iterable[str]) -> list[int]:
    """Processes that live in any of these namespaces, whoever started them."""
    wanted = set()
    for name in names:
        try:
            status = (NETNS_DIR / name).stat()
        except OSError:
            continue  # half made or half removed: nobody can live in it
        wanted.add((status.st_dev, status.st_ino))
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                status = os.stat(f"/proc/{entry}/ns/net")
            except OSError:
                continue  # gone since the listing
            if (status.st_dev, status.st_ino) in wanted:
                found.append(int(entry))
    return found


def run_in(name: str, work: Callable[[], T]) -> T:
    """Call ``work`` inside a namespace, in a thread of its own, and hand back what it returns or raises."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            _enter(name)
            outcome.append(work())
        except BaseException as error:  # carried over to the caller, who asked for it
            failure.append(error)

    thread = threading.Thread(target=inside, name=f"in {name}")
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        thread.join()  # never leave half-made links behind a clean-up that follows
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def links(name: str, build: Callable[[Any], T]) -> T:
    """Call ``build`` with a pyroute2 ``IPRoute`` that works inside a namespace.

    The socket is opened in a thread that entered the namespace, not by pyroute2's ``netns=``: that forks a
    child per socket and (0.9.7) leaves the child's end of a socket pair to the garbage collector.
    """
    try:
        from pyroute2.minimal import IPRoute, NetlinkError
    except ImportError as error:
        raise ConfigError(f"the lab needs pyroute2: {EXTRA}") from error

    def opened() -> T:
        with IPRoute() as ip:
            return build(ip)

    try:
        return run_in(name, opened)
    except NetlinkError as error:
        raise KernelError(f"build links in {name}", error.code) from error


def write_sysctls(name: str, values: Mapping[str, str | int]) -> None:
    """Write ``net`` sysctls of a namespace; keys are paths below ``/proc/sys/net``.

    A key that this kernel lacks is left out: without IPv6 or br_netfilter there is nothing to set.
    """

    def write() -> None:
        for key, value in values.items():
            path = Path("/proc/sys/net") / key
            if path.exists():
                path.write_text(str(value))

    run_in(name, write)


def _enter(name: str) -> None:
    descriptor = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise KernelError(f"enter namespace {name}", ctypes.get_errno())
    finally:
        os.close(descriptor)


def _ip_batch(lines: Iterable[str]) -> None:
    script = "\n".join(lines)
    if script:
        done = subprocess.run(["ip", "-batch", "-"], input=script, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise KernelError(script.partition("\n")[0], 0, done.stderr.strip().partition("\n")[0])
