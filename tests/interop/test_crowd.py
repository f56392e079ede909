"""Two hundred hosts that share an etcd and a network that just fits them (failures F24, F25, F27).

Hollow hosts: real clients and stores, no kernel. ``CHURN_S`` says for how long hosts come and go.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import secrets
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from flanneld.model.addr import format_ip
from flanneld.sources.etcd_client import EtcdClient, parse_endpoints
from tests.support.etcd import Cluster
from tests.support.hosts import Host, attrs_of, family_conf, net_conf
from tests.support.wait import until, until_read

pytestmark = pytest.mark.etcd

HOSTS = 200
CONF = net_conf(family_conf("10.5.0.0/16", 24, subnets=HOSTS))
CHURN_S = float(os.environ.get("CHURN_S", "15"))
PREFIX = "/crowd"


@pytest.fixture
def store() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


class Crowd:
    """All hosts that are up; an async context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stack = AsyncExitStack()
        self._born = 0
        self.check_s = 2.0
        self.up: list[Host] = []
        self.client = EtcdClient(parse_endpoints(cluster.endpoints))

    async def __aenter__(self) -> Crowd:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        await self.client.close()

    def make(self, like: Host | None = None) -> Host:
        """A new host, or the next run of one's daemon."""
        self._born += 1
        attrs = like.attrs if like else attrs_of(f"198.19.{self._born >> 8}.{self._born & 255}", f"{self._born:032x}")
        host = Host(self._cluster.endpoints, PREFIX, attrs, check_s=self.check_s)
        self._stack.push_async_exit(host)
        return host

    async def join(self, host: Host, previous: str | None = None) -> None:
        """Lease a subnet and stay."""
        await host.run(CONF, previous)
        self.up.append(host)

    async def leave(self, host: Host, *, release: bool) -> None:
        """As a daemon that ends; its lease ends too with ``release``."""
        self.up.remove(host)
        own = host.own
        await host.stop()
        await host.store.close()
        if release:
            await self.client.revoke(own.ttl_id)

    async def held(self) -> dict[str, str]:
        """What etcd says: address by subnet."""
        listing = await self.client.list(f"{PREFIX}/subnets/".encode())
        return {kv.key.decode().rpartition("/")[2]: json.loads(kv.value)["PublicIP"] for kv in listing.kvs}

    async def assert_right(self) -> None:
        """Everybody has a subnet of his own, and etcd agrees."""
        up = list(self.up)  # others may join while etcd is asked
        subnets = [host.subnet() for host in up]
        assert len(set(subnets)) == len(subnets), "two hosts have one subnet"
        assert [host.lost for host in up if host.lost] == []
        held = await self.held()
        for host in up:
            assert host.attrs.public_ip
            assert held[host.subnet().replace("/", "-")] == format_ip(host.attrs.public_ip)


@pytest.fixture
async def crowd(store: Cluster) -> AsyncIterator[Crowd]:
    async with Crowd(store) as made:
        yield made


def requests(cluster: Cluster) -> int:
    """How many requests etcd has been asked."""
    with urllib.request.urlopen(f"http://{cluster.members[0].address}:2381/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(r'^grpc_server_started_total\{.*grpc_type="unary"\} (\S+)$', text, re.MULTILINE)
    return int(sum(map(float, found)))


async def test_two_hundred_hosts_at_once_fill_a_network_and_the_next_one_waits_for_a_place(
    crowd: Crowd, store: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flanneld")
    before, began = requests(store), time.monotonic()
    async with asyncio.timeout(60):
        await asyncio.gather(*(crowd.join(crowd.make()) for _ in range(HOSTS)))
    took_s, asked = time.monotonic() - began, requests(store) - before
    print(f"\n{HOSTS} hosts joined in {took_s:.1f} s, {asked / HOSTS:.1f} requests a host")
    await until(lambda: all(len(host.table) == HOSTS for host in crowd.up), 30, "everybody knows everybody")
    await crowd.assert_right()
    assert asked / HOSTS < 40, "bounded by the number of hosts, not by its square"
    assert len([line for line in caplog.messages if "another host was faster" in line]) < 10 * HOSTS

    caplog.clear()
    late = crowd.make()
    waiting = asyncio.create_task(crowd.join(late))
    await until(lambda: "waiting for a lease" in caplog.text, 10, "the reason is told")
    said = [line for line in caplog.messages if "waiting for a lease" in line]
    assert "all 200 IPv4 subnets of 10.5.0.0/16 are taken" in said[0], said
    await asyncio.sleep(3.0)  # it goes on asking meanwhile
    assert len([line for line in caplog.messages if "waiting for a lease" in line]) == 1
    assert not waiting.done()
    freed, began = crowd.up[17].subnet(), time.monotonic()
    await crowd.leave(crowd.up[17], release=True)
    async with asyncio.timeout(10):
        await waiting
    print(f"\nthe next one had its lease {time.monotonic() - began:.1f} s after one was free")
    assert late.subnet() == freed
    await crowd.assert_right()


@pytest.mark.timeout(240)
async def test_a_wiped_store_gets_two_hundred_leases_back_before_a_newcomer_gets_any_of_them(
    crowd: Crowd, store: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures F16: for a moment every subnet looks free, and a host waits for one."""
    crowd.check_s = 30.0  # two hundred hosts in one process are slow to come back
    await asyncio.gather(*(crowd.join(crowd.make()) for _ in range(HOSTS)))
    await until(lambda: all(len(host.table) == HOSTS for host in crowd.up), 60, "everybody knows everybody")
    before = {host.attrs.identity: host.subnet() for host in crowd.up}
    late = crowd.make()
    waiting = asyncio.create_task(crowd.join(late))
    await until(lambda: "waiting for a lease" in caplog.text, 10, "the network is full")
    began = time.monotonic()
    await asyncio.to_thread(store.wipe)
    back_s = time.monotonic()
    await until_read(crowd.held, lambda held: len(held) == HOSTS, 90)
    print(f"\n{HOSTS} leases were back {time.monotonic() - back_s:.1f} s after the store ({back_s - began:.1f} s away)")
    await crowd.assert_right()
    assert {host.attrs.identity: host.subnet() for host in crowd.up} == before
    assert not waiting.done()
    waiting.cancel()
    assert {len(host.table) for host in crowd.up} == {HOSTS}, "no peer was forgotten meanwhile"


@pytest.mark.timeout(CHURN_S + 120)
async def test_hosts_that_come_go_and_restart_all_the_time_never_share_a_subnet(crowd: Crowd) -> None:
    seed = secrets.randbelow(1 << 32)
    choice = random.Random(seed)
    print(f"\nseed {seed}")
    await asyncio.gather(*(crowd.join(crowd.make()) for _ in range(HOSTS)))
    joining: set[asyncio.Task[None]] = set()
    done = dict.fromkeys(("left", "restarted", "joined"), 0)
    end = time.monotonic() + CHURN_S
    while time.monotonic() < end:
        host = choice.choice(crowd.up)
        if choice.random() < 0.5:
            subnet = host.subnet()
            await crowd.leave(host, release=False)
            again = crowd.make(like=host)
            await crowd.join(again, subnet)
            assert again.subnet() == subnet, f"seed {seed}: a restart changed it"
            done["restarted"] += 1
        else:
            await crowd.leave(host, release=True)
            done["left"] += 1
            task = asyncio.create_task(crowd.join(crowd.make()))
            joining.add(task)
            done["joined"] += 1
        await crowd.assert_right()
    async with asyncio.timeout(30):
        await asyncio.gather(*joining)
    print(f"\n{done} in {CHURN_S:.0f} s")
    await crowd.assert_right()
    assert len(await crowd.held()) == HOSTS
    await until(lambda: all(len(host.table) == HOSTS for host in crowd.up), 30, "everybody knows everybody")
