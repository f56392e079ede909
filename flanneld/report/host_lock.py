"""One daemon for each network and each subnet file on a host, whatever state directories they were given.

A name in the kernel's abstract socket namespace is held while the process lives, belongs to the network namespace
as devices and routes do, and is the same for two containers that share nothing else (unix(7)). Whoever connects to
it learns who holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flanneld.errors import ConfigError
from flanneld.report.atomic import make_directory

log = logging.getLogger(__name__)

_PEER = struct.Struct("=iii")  # struct ucred: pid, uid, gid


class _Holder(NamedTuple):
    pid: int
    """0 = in another pid namespace."""
    uid: int


@contextlib.contextmanager
def hold_host(network_id: str, subnet_file: Path) -> Iterator[None]:
    """Be the only one for a network and for a subnet file inside the block; call from the event loop.

    Raises:
        ConfigError: another daemon is; names its pid.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(
            _hold(f"network {network_id}", f"serves the network {network_id} on this host: stop it, or this one")
        )
        if file := _file_name(subnet_file):
            held.enter_context(
                _hold(f"file {file}", f"holds the subnet file {subnet_file}: give one of them its own --subnet-file")
            )
        yield


@contextlib.contextmanager
def _hold(name: str, refusal: str) -> Iterator[None]:
    address = b"\0flanneld/" + hashlib.sha256(name.encode()).hexdigest()[:32].encode()
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.bind(address)
            sock.listen(16)
        except OSError as exc:
            holder = _holder(address) if exc.errno == errno.EADDRINUSE else None
            # such names are free for all: somebody else's socket must not keep us from working
            if holder and holder.uid == os.geteuid():
                raise ConfigError(f"another flanneld (pid {holder.pid or 'unknown'}) {refusal}") from exc
            log.warning("cannot make sure that no other flanneld %s reason=%s", refusal.partition(":")[0], exc.strerror)
            yield
            return
        loop.add_reader(sock, _turn_away, sock)  # else those who ask would fill the queue
        try:
            yield
        finally:
            loop.remove_reader(sock)


def _turn_away(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.accept()[0].close()


def _holder(address: bytes) -> _Holder | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(address)
            pid, uid, _gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        except OSError:
            return None  # it has ended meanwhile, or is no flanneld
        return _Holder(pid, uid)


def _file_name(path: Path) -> str:
    """What tells a file from all others on this host, seen from any container; empty when it has no directory."""
    with contextlib.suppress(OSError):
        make_directory(path.absolute().parent)
        status = path.absolute().parent.stat()
        return f"{status.st_dev}:{status.st_ino}/{path.name}"
    return ""
