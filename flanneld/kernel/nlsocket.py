"""A socket for requests to the kernel over rtnetlink.

A request completes inside ``send``: when it returns, the answers lie in the socket's buffer. So
nothing here needs to wait, and two requests of one thread can never interleave.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence

from flanneld.errors import KernelError
from flanneld.kernel import nlmsg

SOL_NETLINK = 270
NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK, NETLINK_CAP_ACK = 11, 12, 10
BATCH_MESSAGES = 64
"""Messages in one send. More gains nothing (style section 1), and their answers fit any receive buffer."""
RECEIVE_BYTES = 1 << 16
"""Twice the largest piece of a dump (net/netlink/af_netlink.c netlink_dump)."""
_HEAD = struct.Struct("=IHH")
DUMP_RETRIES = 5


class Socket:
    """One NETLINK_ROUTE request socket.

    Raises:
        KernelError: the kernel refuses the socket (no netlink in this sandbox).
    """

    def __init__(self) -> None:
        try:
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
            self._sock.bind((0, 0))
        except OSError as exc:
            raise KernelError("open a route netlink socket", exc.errno or 0) from exc
        for option in (NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK, NETLINK_CAP_ACK):
            self._sock.setsockopt(SOL_NETLINK, option, 1)
        # Answers are there when send returns; the deadline only keeps a kernel bug from hanging the daemon.
        self._sock.settimeout(5)
        self.port_id: int = self._sock.getsockname()[0]
        self._seq = 0

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def batch(self, requests: Sequence[bytes]) -> list[tuple[int, str]]:
        """Send requests and return each one's (errno, kernel's message); errno 0 is success.

        A batch is not a transaction: each message succeeds or fails alone (style section 1).
        """
        results: list[tuple[int, str]] = []
        for start in range(0, len(requests), BATCH_MESSAGES):
            results += self._batch(requests[start : start + BATCH_MESSAGES])
        return results

    def _batch(self, requests: Sequence[bytes]) -> list[tuple[int, str]]:
        """One datagram. Only the last request asks for an answer: the kernel works in order and reports every
        error, so what it has not complained of by then has succeeded."""
        first = self._seq + 1
        self._send(requests, nlmsg.NLM_F_ACK)
        results = [(0, "")] * len(requests)
        answered = False
        while not answered:
            for kind, flags, seq, _pid, body in nlmsg.messages(self._receive()):
                at = seq - first
                if kind == nlmsg.NLMSG_ERROR and 0 <= at < len(requests):
                    results[at] = nlmsg.parse_error(body, flags)
                    answered = at == len(requests) - 1
        return results

    def dump(self, request: bytes) -> Iterator[list[tuple[int, memoryview]]]:
        """Yield the (type, body) messages of a dump, one datagram at a time.

        Raises:
            KernelError: the kernel refused, or was interrupted (code EINTR: ask again). Also at the end of a
                dump that began well: what came until then is not the whole.
        """
        self._send([request], 0)
        while True:
            found: list[tuple[int, memoryview]] = []
            done = False
            for kind, flags, seq, _pid, body in nlmsg.messages(self._receive()):
                if seq != self._seq:
                    continue
                if flags & nlmsg.NLM_F_DUMP_INTR:
                    self._drain()
                    raise KernelError("read kernel tables", errno.EINTR)
                if kind == nlmsg.NLMSG_DONE:
                    done = True
                    code, text = nlmsg.parse_done(body, flags)
                    if code:
                        raise KernelError("read kernel tables", code, text)
                elif kind == nlmsg.NLMSG_ERROR:
                    code, text = nlmsg.parse_error(body, flags)
                    raise KernelError("read kernel tables", code, text)
                else:
                    found.append((kind, body))
            yield found
            if done:
                return

    def dump_all(self, request: bytes) -> list[memoryview]:
        """The bodies of a whole dump; asks again when a change interrupts it.

        Raises:
            KernelError: the kernel refused, or keeps changing under the dump.
        """
        for _ in range(DUMP_RETRIES - 1):
            try:
                return [body for part in self.dump(request) for _kind, body in part]
            except KernelError as exc:
                if exc.code != errno.EINTR:
                    raise
        return [body for part in self.dump(request) for _kind, body in part]

    def ask(self, requests: Sequence[bytes]) -> list[memoryview | None]:
        """Send get requests and return each one's answer, None where the kernel had an error."""
        return [None if isinstance(answer, int) else answer for answer in self.answers(requests)]

    def answers(self, requests: Sequence[bytes]) -> list[memoryview | int]:
        """Send get requests and return each one's answer, or the errno that the kernel had instead."""
        first = self._seq + 1
        self._send(requests, 0)
        answers: dict[int, memoryview | int] = {}
        while len(answers) < len(requests):
            for kind, flags, seq, _pid, body in nlmsg.messages(self._receive()):
                if first <= seq < first + len(requests):  # else left over from a request that was given up
                    answers[seq] = nlmsg.parse_error(body, flags)[0] if kind == nlmsg.NLMSG_ERROR else body
        return [answers[first + i] for i in range(len(requests))]

    def _send(self, requests: Sequence[bytes], flags_of_last: int) -> None:
        parts: list[bytes] = []
        for request in requests:
            self._seq = self._seq % 0x7FFFFFFF + 1
            size, kind, flags = _HEAD.unpack_from(request)
            if len(parts) == 2 * len(requests) - 2:
                flags |= flags_of_last
            parts.append(nlmsg.HEADER.pack(size, kind, flags, self._seq, 0))
            parts.append(request[nlmsg.HEADER_BYTES :])
        try:
            self._sock.send(b"".join(parts))
        except OSError as exc:
            raise KernelError("send to the kernel", exc.errno or 0) from exc

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(RECEIVE_BYTES)
        except TimeoutError as exc:
            raise KernelError("wait for the kernel's answer", errno.ETIMEDOUT) from exc
        except OSError as exc:
            raise KernelError("read the kernel's answer", exc.errno or 0) from exc

    def _drain(self) -> None:
        self._sock.settimeout(0)
        try:
            while self._sock.recv(RECEIVE_BYTES):
                pass
        except OSError:
            pass
        self._sock.settimeout(5)
