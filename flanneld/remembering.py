"""A store that this host can start without: what was learned from it is kept, and used while it is away.

Wraps any ``Store``. A host that was rebooted while the store is down starts from its memory: same configuration,
same subnet, all peers as last seen (failures F17). When the store answers, the lease is claimed by comparing
first, as always. Nothing that peers own is taken out of the kernel on the word of a memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from flanneld.contracts import Store
from flanneld.errors import ConfigError, LeaseLost, LeaseMoved, Unavailable
from flanneld.model import remembered
from flanneld.model.addr import IP, Family
from flanneld.model.lease import Changed, Claim, Lease, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.remembered import Header, Remembered
from flanneld.plan.claim import moved
from flanneld.report.lease_cache import LeaseCache
from flanneld.retry import backoff

log = logging.getLogger("flanneld.store")

PATIENCE_S = 0.7
"""How long a start waits for the store, in all, before it goes on from memory. A store that is merely slow does no
harm: it is asked on, and what it says replaces what was remembered."""

SAVE_AFTER_S = 1.0
"""Changes are collected for so long before they are written: a boot storm is one write a second, not thousands."""
SAVE_AGAIN_S = 30.0
"""After a write that failed, whose memory is older than it need be."""
SAVE_SHARE = 0.01
"""Longest share of the time that is spent writing, however large the network."""


class Remembering:
    """See above.

    Args:
        store: the real one; closed with this.
        cache: where the memory lies.
        accepts: raises ``ConfigError`` for a configuration that no daemon starts with.
        patience_s: see ``PATIENCE_S``.
        clock: seconds since the epoch.
        uptime: seconds since boot with sleep included, as in ``OwnLease.expires``.
    """

    def __init__(
        self,
        store: Store,
        cache: LeaseCache,
        *,
        accepts: Callable[[NetConf], object] = lambda _: None,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self.allocates = store.allocates
        self._store, self._cache, self._accepts = store, cache, accepts
        self._clock, self._uptime = clock, uptime
        self._began, self._patience_s = time.monotonic(), patience_s
        self._memory: Remembered | None = cache.recall()
        self._config = b""
        self._operator: tuple[IP | None, IP | None] = (None, None)
        self._conf: NetConf | None = None
        """The configuration that our claim belongs to."""
        self._tell_config: Callable[[bytes], None] | None = None
        self._unclaimed: tuple[OwnLease, LeaseAttrs] | None = None
        """A lease that is only remembered, and what it should say: to be claimed when the store answers."""
        self._lost = False
        """Whether another host has our subnet."""
        self._table: LeaseTable | None = None
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tell: Callable[[str | None], None] = lambda _: None
        self._troubles: dict[str, str | None] = {}
        if self._memory:
            store.expect(self._memory.header.store)

    # ---- what is passed on ------------------------------------------------------------------------

    @property
    def own(self) -> OwnLease | None:
        """See ``contracts.Store``."""
        return self._unclaimed[0] if self._unclaimed else self._store.own

    @property
    def mark(self) -> str:
        """See ``contracts.Store``."""
        return self._store.mark

    def expect(self, mark: str) -> None:
        """See ``contracts.Store``."""
        self._store.expect(mark)

    def reload(self) -> None:
        """See ``contracts.Store``."""
        self._store.reload()

    def tell_trouble(self, tell: Callable[[str | None], None]) -> None:
        """See ``contracts.Store``; what is only remembered is trouble too."""
        self._store.tell_trouble(partial(self._trouble, "store"))
        self._tell = tell

    def _trouble(self, part: str, text: str | None) -> None:
        self._troubles[part] = text
        self._tell("; ".join(filter(None, self._troubles.values())) or None)

    async def network_is_up(self) -> None:
        """See ``contracts.Store``."""
        await self._store.network_is_up()

    async def catch_up(self, table: LeaseTable) -> bool:
        """See ``contracts.Store``."""
        return await self._store.catch_up(table)

    # ---- start ------------------------------------------------------------------------------------

    async def read_config(self) -> bytes:
        """See ``contracts.Store``."""
        try:
            async with asyncio.timeout(self._patience()):
                self._config = await self._store.read_config()
        except (TimeoutError, Unavailable, ConfigError) as exc:
            if self._memory is None or self._conf is not None:
                raise
            self._say_why(exc)
            self._config = self._memory.header.config.encode()
        return self._config

    async def operator_addresses(self) -> tuple[IP | None, IP | None]:
        """See ``contracts.Store``."""
        try:
            async with asyncio.timeout(self._patience()):
                self._operator = await self._store.operator_addresses()
        except (TimeoutError, Unavailable) as exc:
            if self._memory is None:
                raise
            self._say_why(exc)
            self._operator = self._memory.operator()
        return self._operator

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """See ``contracts.Store``; returns the remembered lease when the store does not answer in time."""
        self._conf = conf
        held = self._remembered_lease(conf)
        if self._memory and self._memory.header.lost:
            claim = claim._replace(lost=claim.lost | {self._memory.header.own})
        if held is None:
            self._memory = None  # of no use, nor are the peers in it
            return await self._store.acquire(conf, claim)
        try:
            async with asyncio.timeout(self._patience()):
                return await self._store.acquire(conf, claim._replace(previous=(held.lease.subnet, held.lease.subnet6)))
        except TimeoutError as exc:
            self._say_why(exc)
        self._unclaimed = (held._replace(lease=held.lease._replace(attrs=claim.attrs)), claim.attrs)
        return self._unclaimed[0]

    def _patience(self) -> float | None:
        """Seconds that the store still has; None, which is for ever, where there is nothing to go on from."""
        if self._memory is None or self._unclaimed:
            return None
        return max(0.0, self._began + self._patience_s - time.monotonic())

    def _remembered_lease(self, conf: NetConf) -> OwnLease | None:
        """Our lease as remembered, if it may be used under this configuration without asking anybody."""
        if self._memory is None:
            return None
        header = self._memory.header
        try:
            lease = self._memory.own()
        except ValueError as exc:
            log.warning("the memory of leases cannot be used: %s", exc)
            return None
        if lease is None or not _fits(lease, conf, exact=self.allocates):
            return None
        if header.lost:
            log.warning(
                "another host had our subnet when we last looked, the store is asked before it is used subnet=%s",
                lease.name(),
            )
            return None
        if header.expires is not None and header.expires <= self._clock() and header.boot != _boot_id():
            # Containers that run on are cut off by a change, so a daemon that is only restarted keeps it. After a
            # reboot none run, and another host may have leased the subnet since.
            log.warning(
                "our lease ran out while this host was down, the store is asked before it is used subnet=%s ran_out=%s",
                lease.name(),
                _date(header.expires),
            )
            return None
        return OwnLease(header.own, lease, self._remembered_end(header))

    def _remembered_end(self, header: Header) -> float | None:
        """When our remembered lease runs out, on ``uptime``; a clock that went back makes it no longer than it was."""
        if header.expires is None:
            return None
        return self._uptime() + min(header.expires - self._clock(), header.expires - header.saved)

    def _say_why(self, exc: BaseException) -> None:
        if self._memory is None or not self._patience_s:
            return
        self._patience_s = 0.0  # whatever it is asked next
        log.warning(
            "the store of leases is of no use now, starting from memory reason=%s leases=%d as_of=%s",
            str(exc) or "no answer in time",
            self._memory.header.leases,
            _date(self._memory.header.saved),
        )

    # ---- work -------------------------------------------------------------------------------------

    async def keep(self, changed: Changed) -> None:
        """See ``contracts.Store``; claims first what was only remembered."""

        def noted(reason: str) -> None:
            self._lost = False
            self._news.set()
            changed(reason)

        try:
            if self._unclaimed:
                self._trouble("lease", "our own lease is remembered, not confirmed")
                await self._compare_config()
                await self._claim()
                noted("own lease claimed")
            await self._store.keep(noted)
        except LeaseLost as exc:
            # before anything else: killed now and started without the store, we must not come back with that subnet
            told, self._lost = self._lost, not isinstance(exc, LeaseMoved)
            if told != self._lost:
                await self._save_own()
            raise

    async def _compare_config(self) -> None:
        """See whether the network still is what we remember, before anything is claimed in it.

        Raises:
            LeaseMoved: it is another one by now, and our subnet or backend has no place in it.
        """
        delays = backoff()
        while True:
            try:
                raw = await self._store.read_config()
                break
            except Unavailable:
                await asyncio.sleep(next(delays))
            except ConfigError:
                return  # none, or unreadable: it is an operator's to write again
        if self._unclaimed is None or self._conf is None:
            return
        if self._tell_config and raw != self._config:  # the store believes that we know it
            self._tell_config(raw)
        try:
            conf = parse_netconf(raw, allocates=self.allocates)
            self._accepts(conf)
        except ConfigError:
            return  # told by whoever follows it; what is remembered works
        lease = self._unclaimed[0].lease
        if conf.backend_type != self._conf.backend_type or not _fits(lease, conf, exact=self.allocates):
            raise LeaseMoved(
                "the network configuration became another one while this host could not read it, "
                f"our subnet {lease.name()} or backend {self._conf.backend_type} has no place in it"
            )

    async def _claim(self) -> None:
        """Make the remembered lease a real one.

        Raises:
            LeaseLost: it is another host's by now; the next call finds another one.
            LeaseMoved: that was found.
        """
        if self._unclaimed is None or self._conf is None:
            return
        held, attrs = self._unclaimed
        try:
            previous = (held.lease.subnet, held.lease.subnet6)
            own = await self._store.acquire(self._conf, Claim(attrs, previous, in_use=not self._lost))
        except ConfigError as exc:
            raise LeaseLost(f"our remembered subnet {held.lease.name()} cannot be claimed: {exc}") from exc
        wanted, self._unclaimed = self._unclaimed[1], None
        if own.lease[:2] != held.lease[:2]:
            raise LeaseMoved(moved(held.lease.name(), own.lease.name()))
        log.info("the store answers, our remembered lease is confirmed subnet=%s", own.lease.name())
        self._trouble("lease", None)
        self._news.set()
        if wanted != attrs:
            await self._store.publish(wanted)

    async def publish(self, attrs: LeaseAttrs) -> None:
        """See ``contracts.Store``."""
        if self._unclaimed:
            self._unclaimed = (self._unclaimed[0], attrs)  # said when it is claimed
            return
        await self._store.publish(attrs)
        self._news.set()

    async def follow_config(self, changed: Callable[[bytes], None]) -> None:
        """See ``contracts.Store``."""

        def noted(raw: bytes) -> None:
            self._config = raw
            self._news.set()
            changed(raw)

        self._tell_config = noted
        await self._store.follow_config(noted)

    async def follow(self, table: LeaseTable, changed: Changed) -> None:
        """See ``contracts.Store``; remembered leases stand in until the first list has come."""
        self._table = table

        def noted(reason: str) -> None:
            if table.complete:
                self._trouble("peers", None)
            self._news.set()
            changed(reason)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._store.follow(table, noted))
            tasks.create_task(self._stand_in(table, changed))
            tasks.create_task(self._save(table))

    async def _stand_in(self, table: LeaseTable, changed: Changed) -> None:
        memory, self._memory = self._memory, None
        if memory is None:
            return
        await asyncio.sleep(self._patience_s)
        if table.complete:
            return
        try:
            leases = await asyncio.to_thread(memory.leases)  # half a second for fifty thousand
        except ValueError as exc:
            log.warning("the memory of leases cannot be used: %s", exc)
            return
        if table.complete:  # by now
            return
        table.restore(leases)
        self._trouble("peers", f"the store does not answer, peers are those of {_date(memory.header.saved)}")
        log.warning(
            "peers are those of memory until the store answers leases=%d as_of=%s",
            len(leases),
            _date(memory.header.saved),
        )
        changed("remembered leases")

    # ---- saving -----------------------------------------------------------------------------------

    async def _save(self, table: LeaseTable) -> None:
        """Write the memory soon after each change, for ever."""
        while True:
            await self._news.wait()
            await asyncio.sleep(SAVE_AFTER_S)
            began = time.monotonic()
            if header := self._snapshot(table):
                self._news.clear()
                if not await self._write(header, dict(table.by_key)):  # a full disk may have room again
                    self._news.set()
                    await asyncio.sleep(SAVE_AGAIN_S)
                await asyncio.sleep((time.monotonic() - began) / SAVE_SHARE)

    async def _save_own(self) -> None:
        """Write the memory now, for the sake of what it says about ourselves."""
        table, own = self._table, self.own
        if table is not None and own and (header := self._header(own)):
            leases = {**table.by_key, own.key: table.get(own.key) or own.lease}  # a list may still be under way
            await self._write(header, leases)

    async def _write(self, header: Header, leases: dict[str, Lease]) -> bool:
        async with self._writing:  # the later one stays
            return await asyncio.to_thread(self._cache.keep, header, leases)

    def _snapshot(self, table: LeaseTable) -> Header | None:
        """What to write now; None while that would be less than what is known already."""
        own = self.own
        return self._header(own) if own and table.complete and own.key in table.by_key else None

    def _header(self, own: OwnLease) -> Header | None:
        """All but the leases; None while what we hold is itself only remembered."""
        if self._unclaimed and not self._lost:
            return None
        expires = None if own.expires is None else own.expires - self._uptime() + self._clock()
        return Header(
            network=self._cache.network_id,
            identity=self._cache.identity,
            boot=_boot_id(),
            saved=self._clock(),
            store=self._store.mark,
            config=self._config.decode("utf-8", "replace"),
            own=own.key,
            expires=expires,
            lost=self._lost,
            operator=remembered.texts(self._operator),
            leases=0,
        )

    async def close(self) -> None:
        """See ``contracts.Store``; what is not written yet is."""
        if self._table and self._news.is_set() and (header := self._snapshot(self._table)):
            self._cache.keep(header, self._table.by_key)
        await self._store.close()


def _fits(lease: Lease, conf: NetConf, *, exact: bool) -> bool:
    """Whether a lease is one that this configuration could have given."""
    for family, subnet in zip(Family, (lease.subnet, lease.subnet6), strict=True):
        part = conf.family(family)
        if (part is None) != (subnet is None):
            return False
        if part and subnet and not (part.network.covers(subnet) and (not exact or subnet.length == part.subnet_len)):
            return False
    return True


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return ""


def _date(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds")
