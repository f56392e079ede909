"""The smallest HTTP server that serves a few pages: one request a connection, bounded in time, size and number.

Hand-written, because an HTTP framework costs more memory than all the rest of the daemon's reporting.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import NamedTuple

_REQUEST_S = 5.0
"""A client that takes longer to ask or to take the answer is dropped."""
_CLOSE_S = 0.5
"""How long requests under way may take when we stop. Contract 10.1 allows 3 s, but an answer takes a millisecond, so
what is still open then is a client that is not asking; a stop should not wait for it."""
_HEADER_BYTES = 8192
_CONNECTIONS = 64
"""For one more the oldest has to go, so that nobody can use up our file descriptors. The oldest, because a probe asks
within a millisecond: a pod that holds connections open must not make the kubelet think that we are dead."""
_UNREAD_BYTES = 1 << 20
"""So much of what a client sends after its request is taken in; one that goes on is cut off."""

_TEXT = {200: "OK", 400: "Bad Request", 404: "Not Found", 431: "Request Header Fields Too Large"}
_TEXT |= {503: "Service Unavailable"}


class Page(NamedTuple):
    """An answer."""

    status: int
    body: str
    kind: str = "text/plain"


class PageServer:
    """Serves what ``answer`` gives.

    Args:
        answer: the page for a path without its query.
    """

    def __init__(self, answer: Callable[[bytes], Page]) -> None:
        self._answer = answer
        self._open: dict[asyncio.Task[None], None] = {}
        """In the order in which they came."""

    async def serve(self, sock: socket.socket) -> None:
        """Answer on a listening socket until cancelled, then finish the answers under way.

        Raises:
            OSError: it cannot be listened on.
        """
        if sock.family == socket.AF_UNIX:
            server = await asyncio.start_unix_server(self._connected, sock=sock, limit=_HEADER_BYTES)
        else:
            server = await asyncio.start_server(self._connected, sock=sock, limit=_HEADER_BYTES)
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
        if task is None:
            return
        if len(self._open) >= _CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        self._open[task] = None
        try:
            async with asyncio.timeout(_REQUEST_S):
                await self._converse(reader, writer)
        except (TimeoutError, OSError, EOFError):
            pass  # the client went away or dawdled; nobody is there to be told
        finally:
            self._open.pop(task, None)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        page, with_body = await self._read(reader)
        body = page.body.encode()
        head = (
            f"HTTP/1.1 {page.status} {_TEXT[page.status]}\r\nContent-Type: {page.kind}; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + (body if with_body else b""))
        await writer.drain()
        writer.write_eof()
        # Closing with unread input makes the kernel send a reset that can overtake the answer.
        left = _UNREAD_BYTES
        while left > 0 and (unread := await reader.read(_HEADER_BYTES)):
            left -= len(unread)

    async def _read(self, reader: asyncio.StreamReader) -> tuple[Page, bool]:
        """The page that was asked for, and whether its body goes along (not for HEAD)."""
        try:
            request = (await reader.readline()).split()
            left = _HEADER_BYTES
            while (line := await reader.readline()).strip():
                left -= len(line)
                if left < 0:
                    return Page(431, "too many headers\n"), True
        except ValueError:  # readline's word for a line above the limit
            return Page(431, "too long a header\n"), True
        if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
            return Page(400, "this is an HTTP/1 server\n"), True
        return self._answer(request[1].partition(b"?")[0]), request[0] != b"HEAD"
