"""Leases in etcd, for ``flannelctl leases``: one list, and for each lease how long it still lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from flanneld.ctl.lease_view import View
from flanneld.errors import ConfigError
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.options import EtcdOptions
from flanneld.plan.allocate import Room, Subnets, room
from flanneld.sources.connect import connect
from flanneld.sources.etcd_client import KV, Compacted
from flanneld.sources.etcd_leases import Keys

if TYPE_CHECKING:
    from flanneld.ctl.leases import Changes

TTL_REQUESTS_AT_ONCE = 16
"""So that a list of 5000 leases does not make etcd drop others' requests."""


class EtcdLeases:
    """A ``leases.Source``, and ``lease_release.Keyed``."""

    def __init__(self, options: EtcdOptions) -> None:
        self._keys = Keys(options.etcd_prefix)
        self._prefix = self._keys.subnets.encode()
        self._client = connect(options)

    async def views(self, wanted: Callable[[View], bool]) -> list[View]:
        """See ``leases.Source``; with their time to live."""
        views = [view for kv in (await self._client.list(self._prefix)).kvs if wanted(view := self._view(kv))]
        lives = await self._times_to_live({view.ttl_id for view in views if view.ttl_id})
        return [view._replace(ttl_s=lives.get(view.ttl_id)) for view in views]

    async def follow(self, changes: Changes) -> None:
        """See ``leases.Source``."""
        client, prefix = self._client, self._prefix
        while True:
            listing = await client.list(prefix)
            changes.keep_only([self._name(kv) for kv in listing.kvs])
            for kv in listing.kvs:
                changes.put(self._name(kv), self._view(kv))
            try:
                async with aclosing(client.watch(prefix, prefix=True, start_revision=listing.revision + 1)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            if event.deleted:
                                changes.drop(self._name(event.kv))
                            else:
                                changes.put(self._name(event.kv), self._view(event.kv))
            except Compacted:
                continue  # too long without etcd: its history is gone, so compare with a new list

    async def room(self, views: Sequence[View]) -> Room | None:
        """See ``leases.Source``."""
        found = (await self._client.get(self._keys.config.encode())).kvs
        try:
            conf = parse_netconf(found[0].value if found else b"", allocates=True)
        except ConfigError:
            return None  # flanneld says what is wrong with it
        return room(conf, [Subnets(*view.subnets) for view in views])

    async def remove(self, view: View) -> bool:
        """See ``lease_release.Keyed``."""
        return (await self._client.delete_if(self._keys.lease(view.name), mod_revision=view.revision)).succeeded

    async def present(self, views: Sequence[View]) -> list[View]:
        """See ``lease_release.Keyed``."""
        return [view for view in views if (await self._client.get(self._keys.lease(view.name))).kvs]

    async def close(self) -> None:
        """See ``leases.Source``."""
        await self._client.close()

    async def _times_to_live(self, ids: Iterable[int]) -> dict[int, int]:
        turn = asyncio.Semaphore(TTL_REQUESTS_AT_ONCE)

        async def ask(lease: int) -> tuple[int, int]:
            async with turn:
                return lease, await self._client.time_to_live(lease)

        # gather, because its first error is the one sentence that the operator gets, not a group of them
        return dict(await asyncio.gather(*(ask(lease) for lease in ids)))

    def _name(self, kv: KV) -> str:
        return kv.key.removeprefix(self._prefix).decode("utf-8", "backslashreplace")

    def _view(self, kv: KV) -> View:
        return View.of(self._name(kv), kv.value, kv.lease, kv.mod_revision)
