"""One plain etcd for the whole run; tests keep apart by a key prefix of their own."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from flanneld.model.lease import LeaseAttrs
from flanneld.sources.etcd_client import EtcdClient, parse_endpoints
from tests.support.etcd import Cluster
from tests.support.hosts import Host, MakeHost, Switch, attrs_of


@pytest.fixture(scope="session")
def etcd() -> Iterator[Cluster]:
    with Cluster(extra=["--max-txn-ops=10000"]) as cluster:
        yield cluster


@pytest.fixture
async def client(etcd: Cluster) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(parse_endpoints(etcd.endpoints))
    yield client
    await client.close()


@pytest.fixture
def prefix() -> bytes:
    """A key prefix that nobody else uses."""
    return f"/{secrets.token_hex(6)}/".encode()


@pytest.fixture
def root(prefix: bytes) -> str:
    """The same as a value for ``--etcd-prefix``."""
    return prefix.decode().rstrip("/")


@pytest.fixture
async def switch(etcd: Cluster) -> AsyncIterator[Switch]:
    """What stands between etcd and the hosts of ``host``."""
    switch = Switch(etcd.members[0].address, 2379)
    async with switch:
        yield switch


@pytest.fixture
async def host(switch: Switch, root: str) -> AsyncIterator[MakeHost]:
    """Makes hosts, by default 192.0.2.1 alias id-a; they end with the test."""
    async with AsyncExitStack() as stack:

        def make(attrs: LeaseAttrs | None = None, prefix: str = root, **settings: Any) -> Host:
            made = Host(switch.endpoint, prefix, attrs or attrs_of("192.0.2.1", "id-a"), **settings)
            stack.push_async_exit(made)
            return made

        yield make
