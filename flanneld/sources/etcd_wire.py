"""gRPC to one etcd member: one connection, opened when needed, and every failure as one sentence.

All dealings with grpclib stand here; above it nobody sees a gRPC status number, an errno or a TLS alert. Which
member to ask, and whether to ask again, is decided in ``etcd_client.py``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message
from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from h2.exceptions import ProtocolError as H2ProtocolError

from flanneld.errors import Unavailable
from flanneld.model.plain import plain
from flanneld.sources.etcd_endpoint import TLS, Endpoint

_LONGEST_REASON = 600

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)
T = TypeVar("T")

# A peer that vanished without a word (power cut, SIGSTOP, dropped packets) is noticed by pings: at the latest
# 6 s + 3 s after it fell silent. These fields are semi-private in grpclib, hence its version cap in
# pyproject.toml and the SIGSTOP test. With any of them left out a dead peer is noticed after minutes or never.
# etcd drops clients that ping more often than every 5 s, or at all while no call is open, so only then; the second
# more is for pings that the network brings closer together.
_KEEPALIVE = Configuration(
    _keepalive_time=6,
    _keepalive_timeout=3,
    _keepalive_permit_without_calls=False,
    _http2_max_pings_without_data=0,  # 0 = no limit; 2 by default, then an idle watch is never pinged again
    _http2_min_sent_ping_interval_without_data=5,  # 300 by default; below the 6 so that no ping is skipped
)

# A dead peer never answers TLS's closing message either; without this, asyncio waits 30 s for it.
_TLS_GOODBYE_S = 1.0

# What grpclib lets through when a call fails. AssertionError is how its buffer says "cut off in mid-message".
_BROKEN = (GRPCError, StreamTerminatedError, ProtocolError, H2ProtocolError, OSError, DecodeError, AssertionError)


class Method(NamedTuple, Generic[Request, Reply]):
    """A remote procedure: its path on the wire and its message types."""

    path: str
    request: type[Request]
    reply: type[Reply]


class Broken(Unavailable):
    """One member did not do what was asked; another one may."""

    def __init__(self, endpoint: Endpoint, reason: str) -> None:
        self.endpoint = endpoint
        self.reason = plain(reason[:_LONGEST_REASON])  # a server's words may be in it
        super().__init__(f"etcd at {endpoint}: {self.reason}")


class Refused(Broken):
    """The member answered, with an error."""

    def __init__(self, endpoint: Endpoint, status: Status, message: str) -> None:
        super().__init__(endpoint, message + _REMEDIES.get(message, ""))
        self.status = status
        self.message = plain(message[:_LONGEST_REASON])

    @property
    def is_final(self) -> bool:
        """Whether every other member would say the same."""
        return self.status in _FINAL

    @property
    def wants_token(self) -> bool:
        """Whether authenticating (again) may help.

        Source: etcd api/v3rpc/rpctypes/error.go: ErrGRPCInvalidAuthToken, ErrGRPCUserEmpty, ErrGRPCAuthOldRevision.
        """
        return self.status is Status.UNAUTHENTICATED or self.message in (
            "etcdserver: user name is empty",
            "etcdserver: revision of auth store is old",
        )


_FINAL = frozenset(
    {
        Status.INVALID_ARGUMENT,
        Status.NOT_FOUND,
        Status.ALREADY_EXISTS,
        Status.PERMISSION_DENIED,
        Status.FAILED_PRECONDITION,
        Status.OUT_OF_RANGE,
    }
)

_REMEDIES = {
    "etcdserver: mvcc: database space exceeded": ": compact and defragment it, then run 'etcdctl alarm disarm'",
}


class Wire:
    """One member: connects on first use, and again after a loss."""

    def __init__(self, endpoint: Endpoint, tls: TLS) -> None:
        self.endpoint = endpoint
        self._tls = tls
        self._channel: _Channel | None = None
        self._closed = False

    async def call(
        self, method: Method[Request, Reply], request: Request, *, timeout_s: float, metadata: Mapping[str, str]
    ) -> Reply:
        """One question, one answer.

        Raises:
            Refused: the member answered with an error.
            Broken: anything else; the request may have been carried out all the same.
        """
        channel = self._open_channel()
        asked_at = asyncio.get_running_loop().time()
        try:
            return await _apart(_exchange(channel, method, request, timeout_s, metadata))
        except TimeoutError as exc:
            # Not a byte since we asked: the connection is dead, and whoever watches through it should know now.
            channel.abort_if_silent_since(asked_at)
            raise Broken(self.endpoint, f"no answer within {timeout_s:.1f} s") from exc
        except _BROKEN as exc:
            raise self._explain(exc, channel) from exc

    async def stream(
        self, method: Method[Request, Reply], request: Request, *, timeout_s: float, metadata: Mapping[str, str]
    ) -> AsyncGenerator[Reply, None]:
        """One question, answers until something breaks; only the first answer has a deadline.

        Silence after it is normal; a dead connection is found by pings. Leaving the generator closes the stream.

        Raises:
            Refused: the member ended the stream with an error.
            Broken: the stream ended in any other way; it never ends in peace.
        """
        channel = self._open_channel()
        try:
            async with channel.request(
                method.path, Cardinality.STREAM_STREAM, method.request, method.reply, metadata=metadata
            ) as stream:
                async with asyncio.timeout(timeout_s):
                    await _apart(stream.send_message(request))
                    reply = await _apart(stream.recv_message())
                while reply is not None:
                    yield reply
                    reply = await _apart(stream.recv_message())
                raise StreamTerminatedError("the server ended the stream")
        except TimeoutError as exc:
            raise Broken(self.endpoint, f"no answer within {timeout_s:.1f} s") from exc
        except _BROKEN as exc:
            raise self._explain(exc, channel) from exc

    async def close(self) -> None:
        """Close the connection and wait until it is gone."""
        self._closed = True
        if self._channel is not None:
            await self._channel.shut()

    def _open_channel(self) -> _Channel:
        if self._closed:
            raise Broken(self.endpoint, "this client has been closed")
        if self._channel is None:
            self._channel = _Channel(self.endpoint, self._tls)
        return self._channel

    def _explain(self, exc: BaseException, channel: _Channel) -> Broken:
        if isinstance(exc, GRPCError):
            return Refused(self.endpoint, exc.status, exc.message or exc.status.name)
        if not isinstance(exc, OSError):
            # grpclib says "Connection lost" for everything; what asyncio was told says more: with TLS 1.3 a refused
            # client certificate shows only here, after our side of the handshake has succeeded
            exc = channel.lost_because() or exc
        if isinstance(exc, ssl.SSLError):
            return Broken(self.endpoint, _explain_tls(exc, self.endpoint, self._tls))
        if isinstance(exc, socket.gaierror):
            return Broken(self.endpoint, f"the name does not resolve ({exc.strerror})")
        if isinstance(exc, OSError) and not isinstance(exc, (ConnectionResetError, BrokenPipeError)):
            return Broken(self.endpoint, os.strerror(exc.errno).lower() if exc.errno else str(exc) or "connection lost")
        if channel.has_spoken():
            return Broken(self.endpoint, "the connection broke")
        hint = "does it expect https://?" if self.endpoint.scheme == "http" else "does it expect http://?"
        return Broken(self.endpoint, f"it ended the connection without a word of HTTP/2: is it an etcd, and {hint}")


def _explain_tls(exc: ssl.SSLError, endpoint: Endpoint, tls: TLS) -> str:
    """A certificate problem in words, with the file to look at."""
    files = tls.files
    if isinstance(exc, ssl.SSLCertVerificationError):
        if "mismatch" in exc.verify_message:
            return f"its certificate is not made out to {endpoint.host}: check its names and --etcd-endpoints"
        if "expired" in exc.verify_message or "not yet valid" in exc.verify_message:
            return f"its {exc.verify_message}: renew it, or check this machine's clock"
        signers = (
            f"--etcd-cafile {files.ca}" if files.ca else "the system's CA certificates (no --etcd-cafile is given)"
        )
        return f"its certificate is not signed by {signers}: {exc.verify_message}"
    reason = exc.reason or str(exc)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS: check the certificates on its side, or write http:// in --etcd-endpoints"
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        ours = f"our client certificate --etcd-certfile {files.cert}" if files.cert else "us without client certificate"
        return f"it refuses {ours} ({_words(reason)}): it wants --etcd-certfile and --etcd-keyfile signed by its own CA"
    return f"TLS failed ({_words(reason)}): check --etcd-cafile, --etcd-certfile and --etcd-keyfile"


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


async def _exchange(
    channel: _Channel, method: Method[Request, Reply], request: Request, timeout_s: float, metadata: Mapping[str, str]
) -> Reply:
    async with channel.request(
        method.path, Cardinality.UNARY_UNARY, method.request, method.reply, timeout=timeout_s, metadata=metadata
    ) as stream:
        await stream.send_message(request, end=True)
        reply = await stream.recv_message()
        if reply is None:
            raise StreamTerminatedError("no message in the answer")
        return reply


async def _apart(exchange: Coroutine[Any, Any, T]) -> T:
    """Run a step in a task of its own, cancelled with us.

    grpclib wakes a waiting task by ``Task.cancel()``, replaces the CancelledError by its own exception and never
    calls ``uncancel()``. In our task that stale count would make an ``asyncio.timeout`` or ``TaskGroup`` around us
    take the next error for a cancellation (Python 3.11); and a real cancellation at that moment would be lost.
    """
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task else 0
    try:
        return await asyncio.create_task(exchange)
    except BaseException as exc:
        if task is not None and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError from exc
        if isinstance(exc, asyncio.CancelledError):
            raise StreamTerminatedError("cut off") from exc
        raise


class _Protocol(H2Protocol):
    """A connection that remembers when it last heard something and why it ended."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__(Handler(), channel._config, channel._h2_config)
        self._channel = channel
        self.transport: asyncio.Transport | None = None
        self.heard_at: float | None = None
        self.has_spoken = False
        self.lost_because: Exception | None = None
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self.transport = transport
        super().connection_made(transport)
        self._channel.alive.add(self)

    def data_received(self, data: bytes) -> None:
        if self.heard_at is None:
            # an HTTP/2 server opens with a SETTINGS frame: the fourth byte is its type, 4 (RFC 9113 sections 3.4, 4.1)
            self.has_spoken = data[3:4] == b"\x04"
        self.heard_at = asyncio.get_running_loop().time()
        super().data_received(data)

    def is_stranded(self) -> bool:
        """Whether our end's address has left this host: nothing comes or goes any more, and nobody says so."""
        here = self.transport.get_extra_info("sockname") if self.transport else None
        if not here:
            return False
        family = socket.AF_INET6 if ":" in here[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((here[0], 0, *here[2:]))
            except OSError as exc:
                return exc.errno == errno.EADDRNOTAVAIL
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost_because = exc if isinstance(exc, Exception) else None
        super().connection_lost(exc)
        self._channel.alive.discard(self)
        self.gone.set()


class _Channel(Channel):
    """grpclib's channel, with our TLS files read at each connect and an end that can be awaited."""

    def __init__(self, endpoint: Endpoint, tls: TLS) -> None:
        # a codec of our own choice spares grpclib's search for google.rpc
        super().__init__(endpoint.host, endpoint.port, codec=ProtoCodec(), config=_KEEPALIVE)
        self._scheme = endpoint.scheme
        self._tls = tls
        self._latest: _Protocol | None = None
        self.alive: set[_Protocol] = set()

    def _protocol_factory(self) -> H2Protocol:
        self._latest = _Protocol(self)
        return self._latest

    async def _create_connection(self) -> H2Protocol:
        loop = asyncio.get_running_loop()
        if self._scheme == "https":
            _, protocol = await loop.create_connection(
                self._protocol_factory,
                self._host,
                self._port,
                ssl=self._tls.context(),
                ssl_shutdown_timeout=_TLS_GOODBYE_S,
            )
        else:
            _, protocol = await loop.create_connection(self._protocol_factory, self._host, self._port)
        if protocol.connection.is_closing():
            raise self.lost_because() or ConnectionResetError()
        return protocol

    @property
    def _connected(self) -> bool:
        # grpclib's keepalive closes the transport first and marks the connection as lost only later; a call that
        # came in between would meet a half dismantled object
        if self._protocol is None or not super()._connected or self._protocol.connection.is_closing():
            return False
        # a host that gets another address says so to its peers through us: not after a request has run into its timeout
        stranded = [protocol for protocol in self.alive if protocol.is_stranded()]
        for protocol in stranded:
            if protocol.transport:
                protocol.transport.abort()
        return self._protocol not in stranded

    def lost_because(self) -> Exception | None:
        """What ended the latest connection, if asyncio knows."""
        return self._latest.lost_because if self._latest else None

    def has_spoken(self) -> bool:
        """Whether the latest connection has brought HTTP/2."""
        return self._latest is not None and self._latest.has_spoken

    def abort_if_silent_since(self, moment: float) -> None:
        """Drop connections that brought nothing since a moment of the loop's clock."""
        for protocol in tuple(self.alive):
            if protocol.transport and (protocol.heard_at is None or protocol.heard_at < moment):
                protocol.transport.abort()

    async def shut(self) -> None:
        """Close, and wait for the sockets to be closed: asyncio does that in later turns of its loop."""
        alive = tuple(self.alive)
        self.close()
        for protocol in alive:
            try:
                async with asyncio.timeout(_TLS_GOODBYE_S):
                    await protocol.gone.wait()
            except TimeoutError:
                if protocol.transport:
                    protocol.transport.abort()
                await protocol.gone.wait()
