"""What can go wrong on purpose. Tests set these while the server runs; ``Faults()`` is a healthy server."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Literal

from flanneld.lab.kubeapi import status
from flanneld.lab.kubeapi.message import Answer

TOO_MANY_REQUESTS = Answer(
    429,
    [b"Too many requests, please try again later.\n"],
    {"Content-Type": "text/plain; charset=utf-8", "Retry-After": "1"},
)
"""An overloaded server: not a Status (15-too-many-requests-429)."""
INTERNAL_ERROR = Answer.of(status.failure(500, "InternalError", "Internal error occurred: etcdserver").body, 500)
UNAVAILABLE = Answer.of(
    status.failure(503, "ServiceUnavailable", "the server is currently unable to handle the request").body, 503
)
STORE_TIMEOUT = Answer(
    504,
    [
        b'{"metadata":{},"status":"Failure","message":"Timeout: request did not complete within the allotted timeout",'
        b'"reason":"Timeout","details":{},"code":504}'
    ],
    {"Content-Type": "text/plain; charset=utf-8"},
)
"""The store behind the server does not answer: no ``kind``, and the type is text (14-etcd-stalled-get)."""

StreamEnd = Literal["finish", "cut", "reset", "half_line"]
"""How a watch ends: with the final chunk; without it; by RST; in the middle of an event line."""


@dataclass
class _Refusal:
    answer: Answer
    verbs: Collection[str]
    times: int | None


@dataclass
class Faults:
    """Switches, each with its effect on answers from now on; times in seconds."""

    delay_s: float = 0.0
    """Wait before each answer."""
    drip_s: float = 0.0
    """Wait after each byte of an answer's status line and headers."""
    piece_bytes: int = 0
    """Write bodies in pieces of this size, each a write of its own; 0 = as they come."""
    cut_body_after: int | None = None
    """Close the connection after so many bytes of a body."""
    on_connect: Literal["serve", "silent", "reset"] = "serve"
    """What new connections get, after the TLS handshake."""
    store_stalled: bool = False
    """What needs the store ends in 504 after the request's ``timeout``; caches still answer."""
    mute_watches: bool = False
    """Watches stay open and say nothing, not even bookmarks: a half-dead connection."""
    end_watches_after_s: float = 0.0
    """End each watch cleanly when it is so old; 0 = as the client asked."""
    _refusals: list[_Refusal] = field(default_factory=list)

    def refuse(self, answer: Answer, times: int | None = None, verbs: Collection[str] = ()) -> None:
        """Give this answer instead of the real one.

        Args:
            answer: such as ``TOO_MANY_REQUESTS``.
            times: how often; None = until ``clear``.
            verbs: to which verbs, such as ``{"list", "watch"}``; empty = all.
        """
        self._refusals.append(_Refusal(answer, verbs, times))

    def refusal(self, verb: str) -> Answer | None:
        """The answer that a request with this verb gets instead of the real one; uses it up."""
        for refusal in self._refusals:
            if not refusal.verbs or verb in refusal.verbs:
                if refusal.times is not None:
                    refusal.times -= 1
                    if refusal.times <= 0:
                        self._refusals.remove(refusal)
                return refusal.answer
        return None

    def clear(self) -> None:
        """Be healthy again."""
        healthy = Faults()
        for switch in fields(self):
            setattr(self, switch.name, getattr(healthy, switch.name))
