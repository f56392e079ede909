"""One plain etcd for the whole run; tests keep apart by a key prefix of their own."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from flanneld.sources.etcd_client import EtcdClient, parse_endpoints
from tests.support.etcd import Cluster


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
