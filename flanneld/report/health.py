"""Tells whoever asks over HTTP whether the daemon lives and whether the network works (contract 10.1).

``/healthz`` answers as long as the event loop turns; ``/readyz`` says what the reconcile loop last concluded
and, unlike Go flannel's, turns false again (failures F41). It decides nothing itself.

Hand-written, because an HTTP framework costs more memory than all the rest of the daemon's reporting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from typing import NamedTuple

from flanneld.errors import ConfigError

_log = logging.getLogger(__name__)

_REQUEST_S = 5.0
"""A client that takes longer to ask or to take the answer is dropped."""
_CLOSE_S = 0.5
"""How long requests under way may take when we stop. Contract 10.1 allows 3 s, but an answer takes a millisecond, so
what is still open then is a client that is not asking; a stop should not wait for it."""
_HEADER_BYTES = 8192
_CONNECTIONS = 64
"""More at a time are refused, so that nobody can use up our file descriptors."""

_TEXT = {200: "OK", 400: "Bad Request", 404: "Not Found", 431: "Request Header Fields Too Large"}
_TEXT |= {503: "Service Unavailable"}


class _Answer(NamedTuple):
    status: int
    body: str
    with_body: bool = True
    """False for HEAD."""


class Health:
    """The health server and the state it shows."""

    def __init__(self) -> None:
        self._reasons: tuple[str, ...] = ("starting",)
        self._open: set[asyncio.Task[None]] = set()
        self.port = 0
        """The port listened on; 0 until it is."""

    @property
    def ready(self) -> bool:
        """What ``/readyz`` says."""
        return not self._reasons

    def set_ready(self, reasons: Sequence[str]) -> None:
        """Say what keeps the daemon from being ready, one sentence each; nothing = ready."""
        self._reasons = tuple(reasons)

    async def serve(self, ip: str, port: int) -> None:
        """Answer until cancelled, then finish the answers under way.

        Args:
            ip: address of this host to listen on; 0.0.0.0 and :: mean all.
            port: TCP port.

        Raises:
            ConfigError: that address and port cannot be listened on.
        """
        try:
            server = await asyncio.start_server(self._connected, sock=_listen(ip, port), limit=_HEADER_BYTES)
        except OSError as error:
            raise ConfigError(_refused(ip, port, error)) from error
        self.port = server.sockets[0].getsockname()[1]
        _log.info("health server listens ip=%s port=%d", ip, self.port)
        try:
            await asyncio.get_running_loop().create_future()  # no deadline: cancelling is how this ends
        finally:
            server.close()
            await self._finish()

    async def _finish(self) -> None:
        if self._open:
            _, late = await asyncio.wait(self._open, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one answer; runs in the task that asyncio makes for it."""
        task = asyncio.current_task()
        if task is None or len(self._open) >= _CONNECTIONS:
            writer.close()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(_REQUEST_S):
                await self._converse(reader, writer)
        except (TimeoutError, OSError, EOFError):
            pass  # the client went away or dawdled; nobody is there to be told
        finally:
            self._open.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = await self._read(reader)
        body = answer.body.encode()
        head = (
            f"HTTP/1.1 {answer.status} {_TEXT[answer.status]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + (body if answer.with_body else b""))
        await writer.drain()
        writer.write_eof()
        # Closing with unread input makes the kernel send a reset that can overtake the answer.
        while await reader.read(_HEADER_BYTES):
            pass

    async def _read(self, reader: asyncio.StreamReader) -> _Answer:
        try:
            request = (await reader.readline()).split()
            left = _HEADER_BYTES
            while (line := await reader.readline()).strip():
                left -= len(line)
                if left < 0:
                    return _Answer(431, "too many headers\n")
        except ValueError:  # readline's word for a line above the limit
            return _Answer(431, "too long a header\n")
        if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
            return _Answer(400, "this is an HTTP/1 server\n")
        status, body = self._answer(request[1].partition(b"?")[0])
        return _Answer(status, body, with_body=request[0] != b"HEAD")

    def _answer(self, path: bytes) -> tuple[int, str]:
        """Status and body; the first line of each body is flannel's, byte for byte."""
        if path == b"/healthz":
            return 200, "flanneld is running"
        if path != b"/readyz":
            return 404, "there is /healthz and /readyz\n"
        if self.ready:
            return 200, "flanneld is ready"
        return 503, "\n".join(("flanneld is not ready yet", *self._reasons))


def _listen(ip: str, port: int) -> socket.socket:
    """A listening socket; ``::`` takes IPv4 too, as Go's net.Listen has it and asyncio has not."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return socket.create_server((ip, port), family=family, dualstack_ipv6=ip == "::")


def _refused(ip: str, port: int, error: OSError) -> str:
    where = f"the health server cannot listen on {ip} port {port}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where}, another program does (ss -ltnp 'sport = :{port}' shows it): choose another --healthz-port"
        case errno.EADDRNOTAVAIL:
            return f"{where}, this host does not have that address: choose another --healthz-ip"
        case errno.EACCES:
            return f"{where}, it may not use ports below 1024: choose another --healthz-port"
        case _:
            return f"{where} ({error.strerror or error}): choose another --healthz-ip or --healthz-port"
