"""One HTTP/1.1 connection, with control over every byte that goes out.

h11 says what the bytes are and whether a client keeps to the protocol; when they go, in what pieces, and
where they stop is decided here, by the faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator

import h11

from flanneld.lab.kubeapi.faults import Faults
from flanneld.lab.kubeapi.message import Answer, Request
from flanneld.lab.kubeapi.routes import encode_error
from flanneld.lab.kubeapi.watches import Watch

MAX_KNOWN_LENGTH = 2048
"""Longer bodies are chunked, as Go's server does."""
BLOCK_BYTES = 64 * 1024
READ_BYTES = 64 * 1024


class _Cut(Exception):
    """The connection is over; nothing more is said."""


class Connection:
    """Serves requests one after another until either side has had enough.

    Args:
        reader, writer: of asyncio.
        answer: makes the answers.
        faults: what goes wrong on purpose.
        running: while it is clear nothing is read or written, as in a stopped process.
        watches: the streams that go on now; ours are added and removed.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Callable[[Request], Awaitable[Answer | Watch]],
        faults: Faults,
        running: asyncio.Event,
        watches: set[Watch],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._answer, self._faults, self._running, self._watches = answer, faults, running, watches
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)

    async def serve(self) -> None:
        """Serve to the end; never raises."""
        try:
            if self._faults.on_connect != "serve":
                await self._refuse_to_serve()
            while (request := await self._next_request()) is not None:
                answer = await self._answer(request)
                if self._faults.delay_s:
                    await asyncio.sleep(self._faults.delay_s)
                await (self._stream(answer) if isinstance(answer, Watch) else self._send(answer))
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
        except (OSError, _Cut):
            pass
        finally:
            self.abort()

    def abort(self, reset: bool = False) -> None:
        """Close without a farewell, not even TLS's; with ``reset``, by RST."""
        raw: socket.socket | None = self._writer.get_extra_info("socket")
        if reset and raw is not None:
            with contextlib.suppress(OSError):
                # l_onoff = 1, l_linger = 0: close sends RST (socket(7))
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def _refuse_to_serve(self) -> None:
        if self._faults.on_connect == "reset":
            self.abort(reset=True)
            raise _Cut
        while await self._reader.read(READ_BYTES):
            pass
        raise _Cut

    async def _next_request(self) -> Request | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                await self._send(Answer.json([encode_error(str(error))], 400))
                return None
            match event:
                case h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        await self._write(
                            self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                        )
                    self._http.receive_data(await self._read())
                case h11.Request():
                    head = event
                case h11.Data():
                    body += event.data
                case h11.EndOfMessage() if head is not None:
                    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
                    method, target = head.method.decode(), head.target.decode("latin-1")
                    return Request(method, target, headers, bytes(body), self._certificate_name())
                case _:
                    return None

    def _certificate_name(self) -> str | None:
        certificate = self._writer.get_extra_info("peercert")
        for parts in (certificate or {}).get("subject", ()):
            for key, value in parts:
                if key == "commonName":
                    return str(value)
        return None

    async def _send(self, answer: Answer) -> None:
        length = sum(map(len, answer.body))
        framing = ("Content-Length", str(length)) if length <= MAX_KNOWN_LENGTH else ("Transfer-Encoding", "chunked")
        await self._send_head(answer.code, [*answer.headers.items(), framing])
        sent = 0
        for block in _blocks(answer.body):
            limit = self._faults.cut_body_after
            if limit is not None and sent + len(block) >= limit:
                await self._write_body(block[: limit - sent])
                raise _Cut
            await self._write_body(block)
            sent += len(block)
        await self._write(self._http.send(h11.EndOfMessage()) or b"")

    async def _send_head(self, code: int, headers: Iterable[tuple[str, str]]) -> None:
        common = [("Cache-Control", "no-cache, private")]
        head = self._http.send(h11.Response(status_code=code, headers=[*common, *headers])) or b""
        if not self._faults.drip_s:
            await self._write(head)
            return
        for index in range(len(head)):
            await self._write(head[index : index + 1])
            await asyncio.sleep(self._faults.drip_s)

    async def _stream(self, watch: Watch) -> None:
        await self._send_head(200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
        self._watches.add(watch)
        gone = asyncio.create_task(self._notice_end(watch))
        try:
            async for lines in watch.lines():
                await self._write_body(lines)
            await self._end_stream(watch)
        finally:
            self._watches.discard(watch)
            watch.has_ended.set()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await gone

    async def _end_stream(self, watch: Watch) -> None:
        match watch.end:
            case "finish":
                await self._write(self._http.send(h11.EndOfMessage()) or b"")
                return
            case "half_line":
                line = watch.last_line()
                await self._write_body(line[: len(line) // 2])
            case "reset":
                self.abort(reset=True)
        raise _Cut

    async def _notice_end(self, watch: Watch) -> None:
        """A client that leaves ends its watch at once, not at the next event."""
        try:
            while data := await self._reader.read(READ_BYTES):
                self._http.receive_data(data)  # its next request, sent early
        finally:
            watch.finish(watch.end or "cut")

    async def _read(self) -> bytes:
        data = await self._reader.read(READ_BYTES)
        await self._running.wait()
        return data

    async def _write_body(self, data: bytes) -> None:
        if not data:
            return
        size = self._faults.piece_bytes or len(data)
        for start in range(0, len(data), size):
            await self._write(self._http.send(h11.Data(data=data[start : start + size])) or b"")

    async def _write(self, data: bytes) -> None:
        await self._running.wait()
        self._writer.write(data)
        await self._writer.drain()


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Small pieces put together, so that a list of thousands is a few hundred writes."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
