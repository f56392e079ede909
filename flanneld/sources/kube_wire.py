"""One HTTP/1.1 connection to the API server: a request, its head, its body, each with a deadline.

h11 holds the protocol, this file the socket. Knows nothing of Kubernetes; every failure of the connection is
``Broken``. HTTP/1.1 because a watch then has a connection to itself, whose silence can be told from others' traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import h11

from flanneld.errors import Unavailable
from flanneld.model.plain import plain
from flanneld.sources.kube_access import Access

_READ_BYTES = 1 << 17
_HEAD_BYTES = 1 << 16

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000),
)
"""A host that vanished is found after 25 s; one that is there and says nothing, by the reader's own deadline."""


class Broken(Unavailable):
    """The connection cannot be made or failed; another one may work."""


class TooLarge(Unavailable):
    """An answer is larger than what we are willing to hold."""


class Head(NamedTuple):
    """Begin of an answer."""

    status: int
    headers: dict[bytes, bytes]
    """Names in lower case."""


class Wire:
    """An open connection; made by ``open``."""

    def __init__(self, where: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._where = where
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)

    @staticmethod
    async def open(access: Access, timeout_s: float) -> Wire:
        """Connect, TLS included.

        Raises:
            Broken: refused, not reached in time, or its certificate is not right.
        """
        server, context = access.server, access.context()
        where = str(server)
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(
                    server.host,
                    server.port,
                    ssl=context,
                    server_hostname=access.server_name if context else None,
                    limit=_READ_BYTES,
                )
        except TimeoutError as error:
            raise Broken(f"{where} cannot be reached within {timeout_s:.0f} s") from error
        except ssl.SSLCertVerificationError as error:
            raise Broken(
                f"the certificate of {where} is not trusted ({error.verify_message}): check the CA and the server's "
                f"name in {access.source}"
            ) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
            raise Broken(f"{where} cannot be reached: {_reason(error)}") from error
        sock = writer.get_extra_info("socket")
        for level, option, value in _KEEPALIVE:
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, value)
        return Wire(where, reader, writer)

    async def ask(
        self, method: str, target: str, headers: Sequence[tuple[str, str]], body: bytes, timeout_s: float
    ) -> Head:
        """Send a request and wait for the head of its answer.

        Raises:
            Broken: the connection failed, or the head is not complete in time.
        """
        request = h11.Request(method=method, target=target, headers=[*headers, ("Content-Length", str(len(body)))])
        message = (self._http.send(request), self._http.send(h11.Data(body)), self._http.send(h11.EndOfMessage()))
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(b"".join(part for part in message if part))
                await self._writer.drain()
                while True:
                    event = await self._event()
                    if isinstance(event, h11.Response):
                        return Head(event.status_code, dict(event.headers))
                    if not isinstance(event, h11.InformationalResponse):
                        raise Broken(f"{self._where} closed the connection instead of answering")
        except TimeoutError as error:
            raise Broken(f"{self._where} does not answer within {timeout_s:.0f} s") from error
        except (OSError, h11.RemoteProtocolError) as error:
            raise Broken(f"{self._where} broke the connection instead of answering: {_reason(error)}") from error

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, up to its proper end; deadlines are the caller's.

        Raises:
            Broken: cut before its end.
        """
        try:
            while True:
                event = await self._event()
                if isinstance(event, h11.Data):
                    yield event.data
                elif isinstance(event, h11.EndOfMessage):
                    return
                else:
                    raise Broken(f"{self._where} cut its answer short")
        except (OSError, h11.RemoteProtocolError) as error:
            raise Broken(f"{self._where} cut its answer short: {_reason(error)}") from error

    async def body(self, limit: int, timeout_s: float) -> bytearray:
        """The whole body.

        Raises:
            Broken: cut, or not complete in time.
            TooLarge: more than ``limit`` bytes.
        """
        whole = bytearray()
        try:
            async with asyncio.timeout(timeout_s), contextlib.aclosing(self.pieces()) as pieces:
                async for piece in pieces:
                    whole += piece
                    if len(whole) > limit:
                        raise TooLarge(f"{self._where} answers with more than {limit >> 20} MiB")
        except TimeoutError as error:
            raise Broken(f"{self._where} did not finish its answer within {timeout_s:.0f} s") from error
        return whole

    def finish(self) -> bool:
        """Get ready for the next request; tells whether there can be one on this connection."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return not self._reader.at_eof()
        return False

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has come since the last answer, not even an end."""
        return not self._reader.at_eof() and not self._writer.transport.is_closing()

    def close(self) -> None:
        """Drop the connection at once: an answer in the middle, nobody wants to wait for."""
        self._writer.transport.abort()

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        return event


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "TLS failed").replace("_", " ").lower()
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return plain(text[:200])  # h11 quotes what the server sent
