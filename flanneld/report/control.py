"""A socket beside the subnet file on which this daemon tells ``flannelctl`` about itself: HTTP, for root alone.

``curl --unix-socket /run/flannel/subnet.sock http://localhost/status`` works as well. It tells and takes no orders.
Convenience: where it cannot be, a line says so and the daemon goes on without.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from flanneld.report.atomic import make_directory
from flanneld.report.audit import Audit
from flanneld.report.pages import Page, PageServer

log = logging.getLogger(__name__)


def socket_path(subnet_file: str | Path) -> Path:
    """Where the daemon that holds a subnet file listens: each network on a host has its own file."""
    return Path(subnet_file).with_suffix(".sock")


class Control:
    """The server.

    Args:
        path: of the socket.
        status: what ``/status`` says, made of what JSON has.
        audit: what ``/audit`` says.
    """

    def __init__(self, path: Path, status: Callable[[], dict[str, object]], audit: Audit) -> None:
        self._path, self._status, self._audit = path, status, audit

    async def serve(self) -> None:
        """Answer until cancelled."""
        try:
            sock = _listen(self._path)
        except OSError as exc:
            log.warning("flannelctl cannot ask this daemon path=%s reason=%s", self._path, exc.strerror or exc)
            return
        try:
            await PageServer(self._answer).serve(sock)
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _answer(self, path: bytes) -> Page:
        match path:
            case b"/status":
                return Page(200, msgspec.json.encode(self._status()).decode() + "\n", "application/json")
            case b"/audit":
                lines = [msgspec.json.encode(entry._asdict()).decode() + "\n" for entry in self._audit.entries()]
                return Page(200, "".join(lines), "application/x-ndjson")
        return Page(404, "there is /status and /audit\n")


def _listen(path: Path) -> socket.socket:
    """A listening socket in place of whatever a dead daemon left; the state directory's lock keeps out live ones."""
    make_directory(path.parent)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)  # bind makes the file: nobody else may ever have opened it
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


async def ask(path: Path, page: str, timeout_s: float = 3.0) -> tuple[int, bytes]:
    """Fetch a page from a daemon's socket; status and body.

    Raises:
        OSError: nobody listens there, or may not be asked.
        TimeoutError: no answer.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(os.fspath(path))
        try:
            writer.write(f"GET {page} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    return int(head.split()[1]), body
