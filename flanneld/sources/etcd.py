"""Etcd as the store of leases and network configuration: the ``Store`` of ``contracts.py``.

Reading the configuration and following the peers stand here; coming to a lease is ``claimer.py``,
keeping it ``keeper.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from flanneld.errors import ConfigError, LeaseLost, LeaseMoved, Unavailable
from flanneld.model.addr import IP
from flanneld.model.lease import Changed, Claim, Lease, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.plan.allocate import Below, Subnets
from flanneld.plan.claim import moved, subnets_of
from flanneld.retry import backoff
from flanneld.sources.claimer import Claimer
from flanneld.sources.etcd_client import Batch, Compacted, EtcdClient, Listing
from flanneld.sources.etcd_history import History
from flanneld.sources.etcd_leases import BREATH, Keys, LeaseReader
from flanneld.sources.grants import boottime
from flanneld.sources.keeper import CHECK_S, Keeper
from flanneld.sources.outage import Outage
from flanneld.sources.own_key import TTL_S, OwnKey

log = logging.getLogger("flanneld.etcd")

GRACE_S = 300.0
"""How long peers that a replaced store does not know are kept, so that their daemons can write
themselves into it: five of their ``CHECK_S`` (failure F16)."""


class EtcdStore:
    """Leases and configuration below one prefix of an etcd cluster.

    Args:
        client: connection to etcd; closed with the store.
        prefix: ``--etcd-prefix``.
        ttl_s: life of our lease in seconds.
        renew_margin_s: how long before its end it is renewed, in seconds.
        check_s: seconds between two reads of our key without a reason.
        grace_s: see ``GRACE_S``.
        below: source of random choices.
        clock: seconds that go on while the machine is suspended.
    """

    allocates = True

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        *,
        ttl_s: int = TTL_S,
        renew_margin_s: float = 3600.0,
        check_s: float = CHECK_S,
        grace_s: float = GRACE_S,
        below: Below = secrets.randbelow,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._client = client
        self._keys = Keys(prefix)
        self._reader = LeaseReader(self._keys)
        self._history = History(client)
        self._key = OwnKey(
            client, self._history, self._keys, self._reader, ttl_s=ttl_s, renew_margin_s=renew_margin_s, clock=clock
        )
        self._claimer = Claimer(self._key, below=below, settle_s=check_s * 1.2)
        self._keeper = Keeper(client, self._key, check_s=check_s)
        self._grace_s = grace_s
        self._config: bytes | None = None
        self._conf: NetConf | None = None
        """What our lease was acquired for."""
        self._moving_from: Subnets | None = None

    @property
    def own(self) -> OwnLease | None:
        """Our lease as last confirmed by etcd; stays what it was while etcd is away."""
        return self._key.confirmed

    @property
    def mark(self) -> str:
        """See ``contracts.Store``."""
        return str(self._history.revision)

    def expect(self, mark: str) -> None:
        """See ``contracts.Store``."""
        if mark.isascii() and mark.isdecimal() and len(mark) < 20:
            self._history.expect(int(mark))

    def tell_trouble(self, tell: Callable[[str | None], None]) -> None:
        """See ``contracts.Store``."""
        self._client.outage.tell = tell

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """See ``contracts.Store``."""
        self._conf = conf
        return await self._claimer.acquire(conf, claim)

    async def keep(self, changed: Changed) -> None:
        """See ``contracts.Store``; called again after a loss that is for good, it leases another subnet first."""
        if self._keeper.must_move and self._key.confirmed:
            self._moving_from, self._keeper.must_move = subnets_of(self._key.confirmed.lease), False
        if self._moving_from:
            await self._move(self._moving_from)
        await self._keeper.keep(changed)

    async def _move(self, before: Subnets) -> None:
        """Lease another subnet, or the same one if it is free again.

        Raises:
            LeaseMoved: another one.
            LeaseLost: there can be none.
        """
        if self._conf is None:
            raise LeaseLost("there is no lease to keep: acquire one first")
        try:
            own = await self._claimer.acquire(self._conf, Claim(self._key.wanted, before))
        except ConfigError as error:
            raise LeaseLost(
                f"our subnet {before} is another host's, and none can be leased in its place: {error}"
            ) from error
        self._moving_from = None
        if subnets_of(own.lease) != before:
            raise LeaseMoved(moved(str(before), own.lease.name()))

    async def publish(self, attrs: LeaseAttrs) -> None:
        """See ``contracts.Store``; ``LeaseLost`` when another host holds our subnet."""
        await self._keeper.publish(attrs)

    async def operator_addresses(self) -> tuple[IP | None, IP | None]:
        """See ``contracts.Store``: etcd has no place for them."""
        return None, None

    async def network_is_up(self) -> None:
        """See ``contracts.Store``: nobody waits for it."""

    def reload(self) -> None:
        """See ``contracts.Store``."""
        self._client.reload()

    async def close(self) -> None:
        """See ``contracts.Store``."""
        await self._client.close()

    async def read_config(self) -> bytes:
        """See ``contracts.Store``."""
        listing = await self._history.get(self._keys.config.encode())
        if not listing.kvs:
            raise ConfigError(
                f"etcd at {self._client.describe()} has no network configuration under {self._keys.config}; write one: "
                f'etcdctl put {self._keys.config} \'{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"}}}}\''
            )
        self._config = listing.kvs[0].value
        return self._config

    async def follow_config(self, changed: Callable[[bytes], None]) -> None:
        """See ``contracts.Store``; new is what ``read_config`` or the previous call did not give."""

        def see(value: bytes | None) -> None:
            if value is None:
                log.warning("network configuration was deleted, keeping the one we have key=%s", self._keys.config)
            elif value != self._config:
                self._config = value
                changed(value)

        key = self._keys.config.encode()
        while True:
            listing = await self._wait(self._history.get, key)
            see(listing.kvs[0].value if listing.kvs else None)
            async with self._watch(key, listing.revision, prefix=False) as batches:
                async for batch in batches:
                    for event in batch.events:
                        see(None if event.deleted else event.kv.value)

    async def follow(self, table: LeaseTable, changed: Changed) -> None:
        """See ``contracts.Store``."""
        prefix = self._keys.subnets.encode()
        replaced = 0  # what a start found out counts too: the table may hold what an earlier run remembered
        while True:
            is_new_store = await self._list(prefix, replaced, table, changed)
            replaced = self._history.replaced
            grace_s = self._grace_s if is_new_store else None
            async with self._watch(prefix, table.revision, prefix=True, at_most_s=grace_s) as batches:
                async for batch in batches:
                    if await self._apply(batch, table):
                        changed("leases changed")

    async def _list(self, prefix: bytes, replaced: int, table: LeaseTable, changed: Changed) -> bool:
        """Take over a whole listing; tells whether the store is another one than before.

        A function of its own, so that the raw listing, as large as the table, is gone before the long watch.
        """
        listing = await self._wait(self._history.list, prefix)
        leases, _ = await self._reader.snapshot(listing.kvs)
        is_new_store = replaced != self._history.replaced and table.usable
        if is_new_store:
            leases = self._with_absent(leases, table)
        if table.replace_all(leases, listing.revision):
            changed("leases listed")
        return is_new_store

    async def catch_up(self, table: LeaseTable) -> bool:
        """See ``contracts.Store``."""
        listing = await self._client.written_since(self._keys.subnets.encode(), table.revision)
        leases = [(self._keys.name(kv.key), lease) for kv in listing.kvs if (lease := self._reader.lease(kv))]
        news = [(name, lease) for name, lease in leases if not _is_older(lease.revision, table.get(name))]
        return sum(table.put(name, lease) for name, lease in news) > 0  # all of them, not only up to the first

    async def _apply(self, batch: Batch, table: LeaseTable) -> bool:
        """Take over what a watch told; decodes first, so that readers of the table never see half a batch."""
        decoded: list[tuple[str, Lease | None]] = []
        for count, event in enumerate(batch.events, 1):
            if _is_older(event.kv.mod_revision, table.get(self._keys.name(event.kv.key))):
                continue  # overtaken by ``catch_up``
            if event.deleted:  # carries the key only
                self._reader.forget(event.kv.key)
            name, lease = self._keys.name(event.kv.key), None if event.deleted else self._reader.lease(event.kv)
            decoded.append((name, lease))
            if lease:
                self._keeper.saw(name, lease.attrs)
            if count % BREATH == 0:
                await asyncio.sleep(0)
        differs = [table.put(name, lease) if lease else table.drop(name) for name, lease in decoded]
        table.revision = batch.revision
        # else a store restored to the state of our list would pass for the one that we followed since
        self._history.expect(batch.revision)
        return any(differs)

    def _with_absent(self, leases: dict[str, Lease], table: LeaseTable) -> dict[str, Lease]:
        """Add the peers that a replaced store has not heard of yet; their data paths work as before."""
        # their revisions are the old store's and say nothing about the order of events in this one
        absent = {name: lease._replace(revision=0) for name, lease in table.items() if name not in leases}
        log.warning(
            "etcd was replaced by another or older store, keeping peers it does not know for now "
            "known=%d absent=%d for_s=%.0f",
            len(leases),
            len(absent),
            self._grace_s,
        )
        return {**leases, **absent}

    @asynccontextmanager
    async def _watch(
        self, key: bytes, revision: int, *, prefix: bool, at_most_s: float | None = None
    ) -> AsyncIterator[AsyncIterator[Batch]]:
        """Stand around the reading of a watch; ends in peace when it is time to list again."""
        with contextlib.suppress(Compacted):
            async with (
                self._history.watching(at_most_s),
                contextlib.aclosing(self._client.watch(key, prefix=prefix, start_revision=revision + 1)) as batches,
            ):
                yield batches

    async def _wait(self, read: Callable[[bytes], Awaitable[Listing]], key: bytes) -> Listing:
        outage = Outage(log, "etcd cannot be read, trying for as long as it takes", "etcd can be read again")
        delays = backoff()
        while True:
            try:
                listing = await read(key)
            except (Unavailable, ConfigError) as error:  # a role may be taken and given back while we run
                outage.failed(error)
                await asyncio.sleep(next(delays))
            else:
                outage.over()
                return listing


def _is_older(revision: int, known: Lease | None) -> bool:
    return known is not None and revision < known.revision
