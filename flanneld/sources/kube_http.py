"""Requests to the API server: connections, credentials, refusals. Knows Kubernetes' Status, not its nodes.

Every answer but 2xx is ``Refused`` with one sentence for the operator. None of them is final: rights are granted,
tokens renewed and servers replaced while we wait, so that the callers try again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from flanneld import __version__
from flanneld.errors import Unavailable
from flanneld.model.node_codec import decode_node
from flanneld.model.plain import plain
from flanneld.sources.kube_access import Access
from flanneld.sources.kube_wire import Broken, Head, Wire

REQUEST_S = 30.0
"""Longest wait for the head of an answer, and again for the rest of a small one."""
CONNECT_S = 10.0
_BODY_BYTES = 8 << 20
"""Largest single object: etcd takes 1.5 MiB, its JSON is at most a few times that."""
_REFUSAL_BYTES = 1 << 16
_IDLE_S = 45.0
"""How long an unused connection is taken to be alive: shorter than what load balancers allow."""
_MAX_IDLE = 2
_MAX_RETRY_AFTER_S = 60.0

RIGHTS = "pods get; nodes get, list, watch; nodes/status patch"
"""What our account needs (contract 9.2)."""


class Refused(Unavailable):
    """The API server answered, and not with what was asked for.

    Args:
        sentence: for the operator.
        status: the HTTP status.
        reason: Kubernetes' word for it, such as ``Expired``; may be empty.
        retry_after_s: how long the server wants to be left alone.
    """

    def __init__(self, sentence: str, status: int, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


def pause(error: Unavailable, delays: Iterator[float]) -> float:
    """How long to wait after a failure, in seconds: our own next delay, or longer when the server says so."""
    asked = error.retry_after_s if isinstance(error, Refused) else 0.0
    return max(next(delays), min(asked, _MAX_RETRY_AFTER_S))


class KubeHttp:
    """The way to one API server; keeps a connection or two for reuse.

    Args:
        access: where it is, and our credentials.
        request_s: see ``REQUEST_S``.
        connect_s: longest time for a new connection, TLS included.
    """

    def __init__(self, access: Access, *, request_s: float = REQUEST_S, connect_s: float = CONNECT_S) -> None:
        self.access = access
        self.streams_lists = True
        """Whether the server can stream lists, as far as we know."""
        self._request_s = request_s
        self._connect_s = connect_s
        self._idle: list[tuple[Wire, float]] = []

    async def call(
        self, method: str, target: str, body: bytes = b"", content_type: str = "", *, limit: int = _BODY_BYTES
    ) -> bytearray:
        """Ask and take the whole answer. Repeats by itself once when a kept connection or an old token failed.

        Args:
            method: ``GET`` or ``PATCH``; must be safe to repeat.
            target: path and query.
            body: of the request.
            content_type: of ``body``.
            limit: largest answer taken, in bytes.

        Raises:
            Refused: any status but 2xx.
            Broken: no connection, or it failed.
            TooLarge: more than ``limit``.
        """
        wire, head = await self._ask(method, target, body, content_type)
        try:
            answer = await wire.body(limit, self._request_s)
            reusable = wire.finish()
        except BaseException:
            wire.close()
            raise
        self._keep(wire, reusable)
        if head.status // 100 != 2:
            raise self._refusal(head, bytes(answer[:_REFUSAL_BYTES]))
        return answer

    @asynccontextmanager
    async def stream(self, target: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Ask for an answer without end, on a connection of its own; pieces of its body come as they are.

        Raises:
            Refused: any status but 2xx.
            Broken: no connection; reading raises it when the answer is cut.
        """
        wire, head = await self._ask("GET", target)
        try:
            if head.status // 100 != 2:
                raise self._refusal(head, bytes(await wire.body(_REFUSAL_BYTES, self._request_s)))
            async with contextlib.aclosing(wire.pieces()) as pieces:
                yield pieces
        finally:
            wire.close()

    def close(self) -> None:
        """Drop idle connections."""
        while self._idle:
            self._idle.pop()[0].close()

    async def _ask(self, method: str, target: str, body: bytes = b"", content_type: str = "") -> tuple[Wire, Head]:
        """Send a request on a kept or new connection, with the present credentials."""
        authorization = self.access.authorization()
        wire, head = await self._ask_as(authorization, method, target, body, content_type)
        if head.status == 401 and self.access.refused(authorization):
            wire.close()
            return await self._ask_as(self.access.authorization(), method, target, body, content_type)
        return wire, head

    async def _ask_as(
        self, authorization: str, method: str, target: str, body: bytes, content_type: str
    ) -> tuple[Wire, Head]:
        server = self.access.server
        headers = [
            ("Host", server.authority),
            ("Accept", "application/json"),
            ("User-Agent", f"flanneld/{__version__}"),
        ]
        if authorization:
            headers.append(("Authorization", authorization))
        if content_type:
            headers.append(("Content-Type", content_type))
        while True:
            kept = self._take()
            wire = kept or await Wire.open(self.access, self._connect_s)
            try:
                return wire, await wire.ask(method, server.path + target, headers, body, self._request_s)
            except Broken:
                wire.close()
                if kept is None:  # a kept one may have been closed by the server just now
                    raise
            except BaseException:
                wire.close()
                raise

    def _take(self) -> Wire | None:
        while self._idle:
            wire, since = self._idle.pop()
            if wire.is_fresh and time.monotonic() - since < _IDLE_S:
                return wire
            wire.close()
        return None

    def _keep(self, wire: Wire, reusable: bool) -> None:
        if reusable and len(self._idle) < _MAX_IDLE:
            self._idle.append((wire, time.monotonic()))
        else:
            wire.close()

    def _refusal(self, head: Head, body: bytes) -> Refused:
        """One sentence for an answer that is not 2xx, with the remedy where there is one."""
        server, access = self.access.server, self.access
        reason, message = _status_of(body)
        if head.status == 401 and not access.has_credentials:
            sentence = f"{server} wants credentials and {access.source} has none: give --kubeconfig-file instead"
        elif head.status == 401:
            sentence = f"{server} does not take our credentials: renew those of {access.source}"
        elif head.status == 403:
            sentence = f"{server} forbids it ({message}): give the account of {access.source} the rights {RIGHTS}"
        elif head.status == 429:
            sentence = f"{server} is overloaded ({message})"
        else:
            sentence = f"{server} answers {head.status} ({message or 'nothing more'})"
        return Refused(sentence, head.status, reason, _retry_after_s(head))


def one_line(message: str) -> str:
    """A server's words, fit for a sentence; some messages have several lines."""
    return plain(" ".join(message[:400].split()))


def _status_of(body: bytes) -> tuple[str, str]:
    """Reason and message of a Status; also of its kind-less form and of plain text."""
    try:
        status = decode_node(body)
    except ValueError:
        return "", one_line(body.decode("utf-8", "replace"))[:200]
    return status.reason, one_line(status.message)


def _retry_after_s(head: Head) -> float:
    text = head.headers.get(b"retry-after", b"")
    return float(text) if text.isdigit() else 0.0
