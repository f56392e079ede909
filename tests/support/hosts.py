"""Hosts that share an etcd, each as far as its lease goes: a client, a store, its long tasks, its table."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from flanneld.contracts import Store
from flanneld.errors import LeaseLost
from flanneld.model.addr import Family, Prefix, parse_ip
from flanneld.model.lease import Claim, Lease, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.sources.etcd import EtcdStore
from flanneld.sources.etcd_client import KV, EtcdClient, parse_endpoints
from tests.support.relay import Relay


def family_conf(network: str, length: int, subnets: int | None = None) -> FamilyConf:
    """The defaults of contract 2.6 (the first subnet is skipped), or exactly so many subnets."""
    block = Prefix.parse(network)
    step = 1 << (block.family.bits - length)
    last = block.last + 1 - step if subnets is None else block.first + subnets * step
    return FamilyConf(block, length, block.first + step, last)


def net_conf(v4: FamilyConf | None, v6: FamilyConf | None = None) -> NetConf:
    return NetConf(v4, v6, nftables=False, backend_type="vxlan", backend=b"{}")


def attrs_of(ip: str, identity: str = "", ip6: str | None = None, **more: Any) -> LeaseAttrs:
    return LeaseAttrs(parse_ip(ip) if ip else None, parse_ip(ip6) if ip6 else None, identity=identity, **more)


class StoreHost:
    """A host over some store; an async context manager that ends its tasks and closes the store.

    Args:
        store: which mypy checks against the contract here.
        attrs: what it publishes.
    """

    def __init__(self, store: Store, attrs: LeaseAttrs) -> None:
        self.interface = store
        self.attrs = attrs
        self.table = LeaseTable()
        self.lost: LeaseLost | None = None
        self.changes: list[str] = []
        """Reasons that keeping and following gave."""
        self.sizes: list[int] = []
        """How many leases the table had at each change."""
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()
        await self.interface.close()

    async def acquire(self, conf: NetConf, previous: str | None = None, previous6: str | None = None) -> OwnLease:
        """Acquire only."""
        before = (Prefix.parse(previous) if previous else None, Prefix.parse(previous6) if previous6 else None)
        return await self.interface.acquire(conf, Claim(self.attrs, before))

    async def run(self, conf: NetConf, previous: str | None = None) -> OwnLease:
        """Acquire, then keep and follow in the background."""
        own = await self.acquire(conf, previous)
        self.start(self._keep())
        self.follow()
        return own

    def follow(self) -> None:
        """Follow the peers, in the background."""
        self.start(self.interface.follow(self.table, self._changed))

    def start(self, *coroutines: Any) -> None:
        """Run something until the host stops."""
        self._tasks += [asyncio.create_task(coroutine) for coroutine in coroutines]

    def _changed(self, reason: str) -> None:
        self.changes.append(reason)
        self.sizes.append(len(self.table))

    async def _keep(self) -> None:
        try:
            await self.interface.keep(self._changed)
        except LeaseLost as lost:
            self.lost = lost

    async def stop(self) -> None:
        """As a killed daemon: leave everything as it is."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()


class Host(StoreHost):
    """A host over etcd.

    Args:
        endpoints: where etcd is.
        prefix: ``--etcd-prefix``.
        attrs: what it publishes.
        settings: for ``EtcdStore``.
    """

    def __init__(self, endpoints: str, prefix: str, attrs: LeaseAttrs, **settings: Any) -> None:
        self.client = EtcdClient(parse_endpoints(endpoints), request_timeout_s=2.0)
        self.store = EtcdStore(self.client, prefix, **settings)
        super().__init__(self.store, attrs)
        self._prefix = prefix

    @property
    def own(self) -> Lease:
        """Our lease as the store object tells it."""
        assert self.store.own
        return self.store.own.lease

    async def key(self) -> KV | None:
        """Our key as etcd tells it."""
        assert self.store.own
        listing = await self.client.get(f"{self._prefix}/subnets/{self.store.own.key}".encode())
        return listing.kvs[0] if listing.kvs else None

    def subnet(self, family: Family = Family.V4) -> str:
        """Our subnet as text."""
        return str(self.own.subnet if family is Family.V4 else self.own.subnet6)


MakeHost = Callable[..., Host]
"""Takes attributes, prefix and settings, each optional."""


class Switch(Relay):
    """A relay that can be pointed elsewhere, or nowhere: a network that fails, an etcd that is replaced."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.home = (host, port)
        """Where it pointed first."""

    def point_to(self, host: str, port: int) -> None:
        """Cut all connections; new ones go there."""
        self._target = (host, port)
        self.cut()

    def point_nowhere(self) -> None:
        """Cut all connections; new ones are cut at once."""
        self.point_to("127.0.0.1", 1)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._accept(reader, writer)
        except OSError:
            writer.transport.abort()

    @property
    def endpoint(self) -> str:
        """Value for ``--etcd-endpoints``."""
        return f"http://127.0.0.1:{self.port}"
