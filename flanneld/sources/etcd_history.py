"""Whether the etcd behind us is still the one we know.

A cluster rebuilt empty or from an old backup counts its revisions from lower down (failure F16). A
watch that waits for a later revision than the new store will reach for months hears nothing and
fails nowhere, so somebody has to notice. Where others have written so much since that the revision
tells nothing any more, the cluster's id or its count of elections still does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flanneld.sources.etcd_client import Compacted, EtcdClient, Listing
from flanneld.sources.etcd_values import Age


class History:
    """Reads from etcd, comparing each answer's revision with what was known before the question."""

    def __init__(self, client: EtcdClient) -> None:
        self.replaced = 0
        """How often the store turned out to be another one."""
        self._client = client
        self._age = Age()
        self._watches: set[asyncio.Timeout] = set()

    @property
    def revision(self) -> int:
        """The latest revision seen."""
        return self._age.revision

    def expect(self, revision: int) -> None:
        """A revision that an earlier run or a watch saw: a store that has not come so far is another one."""
        self._age = self._age._replace(revision=max(self._age.revision, revision))

    async def get(self, key: bytes) -> Listing:
        """``EtcdClient.get``."""
        known = self._age
        return self._note(known, await self._client.get(key))

    async def list(self, prefix: bytes) -> Listing:
        """``EtcdClient.list``."""
        known = self._age
        return self._note(known, await self._client.list(prefix))

    def _note(self, known: Age, listing: Listing) -> Listing:
        # Reads are linearizable: the store cannot be younger than it was known to be when we asked.
        # (Than became known meanwhile it can: then the question was overtaken, maybe by the news itself.)
        now, age = listing.age, self._age
        if (
            now.revision < known.revision <= age.revision
            or (now.term and now.term < known.term <= age.term)
            or (now.cluster and now.cluster != known.cluster == age.cluster != 0)
        ):
            self.replaced += 1
            self._age = now
            watches, self._watches = self._watches, set()
            for watch in watches:
                watch.reschedule(0)
        elif now.cluster in (0, age.cluster) or not age.cluster:
            self._age = Age(max(now.revision, age.revision), now.cluster or age.cluster, max(now.term, age.term))
        return listing

    @asynccontextmanager
    async def watching(self, at_most_s: float | None = None) -> AsyncIterator[None]:
        """Stand around a watch; when the store turns out to be another one, it ends.

        Args:
            at_most_s: end it after so many seconds in any case; None = never.

        Raises:
            Compacted: list again, the history that the watch followed is gone.
        """
        watch = None
        try:
            async with asyncio.timeout(at_most_s) as watch:
                self._watches.add(watch)
                try:
                    yield
                finally:
                    self._watches.discard(watch)
        except TimeoutError as error:
            if watch and watch.expired():
                raise Compacted("it is time to list again") from error
            raise
