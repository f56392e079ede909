"""A TCP relay in front of a real server that can hold back answers and cut connections at a chosen moment."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Relay:
    """Listens on a free loopback port and forwards to ``host:port``; an async context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._answers_flow = asyncio.Event()
        self._answers_flow.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._server.wait_closed()

    def hold_answers(self) -> None:
        """From now on questions go through and answers do not."""
        self._answers_flow.clear()

    def cut(self) -> None:
        """Break all connections, losing what was held; new ones work normally."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._answers_flow.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        self._writers |= {writer, back}
        for pump in (self._pump(reader, back, None), self._pump(there, writer, self._answers_flow)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, gate: asyncio.Event | None) -> None:
        try:
            while chunk := await source.read(65536):
                if gate is not None:
                    await gate.wait()
                sink.write(chunk)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.transport.abort()
