"""A plain HTTP/1.1 client that tells how a body ended; for tests of servers, not of clients."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11


@dataclass
class Reply:
    """What came back, as far as it came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    """Seconds since the request, and what arrived then."""
    is_complete: bool = False
    """Whether the body ended as HTTP says."""
    took_s: float = 0.0
    error: str = ""
    """How the connection broke, if it did with an error."""

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """The whole lines of the body, each as JSON."""
        return [json.loads(line) for line in bytes(self.body).split(b"\n")[:-1]]


async def exchange(
    url: str,
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    *,
    ca_file: str | None = None,
    timeout_s: float = 20.0,
    reply: Reply | None = None,
) -> Reply:
    """Send one request on a connection of its own and read until the answer or the connection ends.

    Args:
        url: scheme, host and port.
        reply: filled as the answer arrives, for a caller that looks at a stream while it goes on.
    """
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
    reply = reply or Reply()
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
        begun = time.monotonic()
        try:
            http = h11.Connection(h11.CLIENT)
            own = {"Host": parts.netloc, **({"Content-Length": str(len(body))} if body or method != "GET" else {})}
            writer.write(
                http.send(h11.Request(method=method, target=target, headers=[*{**own, **(headers or {})}.items()]))
                or b""
            )
            writer.write((http.send(h11.Data(data=body)) or b"") if body else b"")
            writer.write(http.send(h11.EndOfMessage()) or b"")
            await _read(reader, http, reply, begun)
        except (OSError, h11.RemoteProtocolError) as error:
            reply.error = f"{type(error).__name__}: {error}"
        finally:
            reply.took_s = time.monotonic() - begun
            writer.transport.abort()
    return reply


async def _read(reader: asyncio.StreamReader, http: h11.Connection, reply: Reply, begun: float) -> None:
    while True:
        match event := http.next_event():
            case h11.NEED_DATA:
                http.receive_data(await reader.read(65536))
            case h11.Response():
                reply.status = event.status_code
                reply.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            case h11.Data():
                reply.body += event.data
                reply.arrivals.append((time.monotonic() - begun, bytes(event.data)))
            case h11.EndOfMessage():
                reply.is_complete = True
                return
            case _:
                return
