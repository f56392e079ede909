"""A watch that runs in the background of a test and remembers everything it saw."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from types import TracebackType

from flanneld.sources.etcd_client import Batch, EtcdClient, Event


class Watching:
    """Async context manager; ``events`` grows as changes arrive."""

    def __init__(self, client: EtcdClient, prefix: bytes, start_revision: int) -> None:
        self._client = client
        self._prefix = prefix
        self._start = start_revision
        self.events: list[Event] = []
        self.batches: list[Batch] = []

    async def __aenter__(self) -> Watching:
        self.task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    def keys(self) -> list[bytes]:
        """The keys of all changes so far, in order of arrival."""
        return [event.kv.key for event in self.events]

    async def _follow(self) -> None:
        async with aclosing(self._client.watch(self._prefix, prefix=True, start_revision=self._start)) as batches:
            async for batch in batches:
                self.batches.append(batch)
                self.events += batch.events
