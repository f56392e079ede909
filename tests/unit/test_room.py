"""A network that fills up is told of in time, once (failures F27)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import islice

import pytest

from flanneld.duties.room import RoomWatch
from flanneld.model.addr import Prefix
from flanneld.model.lease import Lease, LeaseAttrs, LeaseTable
from flanneld.model.lease_codec import parse_key
from flanneld.plan.allocate import Room
from tests.support.hosts import family_conf, net_conf
from tests.support.wait import until

CONF = net_conf(family_conf("10.5.0.0/16", 24, subnets=10), family_conf("fd00:5::/48", 64))


class Network:
    """A table of leases and who looks at it."""

    def __init__(self) -> None:
        self.table = LeaseTable()
        self.watch = RoomWatch(self.table, lambda: CONF, look_s=0.0)

    async def hold(self, count: int) -> None:
        """So many hosts; returns when that was looked at."""
        keys = [f"10.5.{number}.0-24&fd00:5:0:{number:x}::-64" for number in range(1, count + 1)]
        self.table.replace_all({key: Lease(*parse_key(key.encode()), LeaseAttrs(None)) for key in keys}, 1)
        self.watch.leases_changed()
        await until(lambda: self.watch.now == Room(10 - count, 10), what="a look")


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    made = Network()
    task = asyncio.create_task(made.watch.run())
    yield made
    task.cancel()


async def test_at_eighty_percent_it_is_told_once_and_when_it_is_full_again(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    await network.hold(7)
    assert caplog.messages == []
    await network.hold(8)
    [line] = caplog.messages
    assert "running out of subnets" in line
    assert "flannelctl leases gc" in line
    assert line.endswith("free=2 of=10"), "of IPv4, which has fewer"
    for count in (9, 8, 9):
        await network.hold(count)
    assert len(caplog.messages) == 1
    await network.hold(10)
    assert "the network is full" in caplog.messages[-1]
    for count in (9, 10, 9, 10):
        await network.hold(count)
    assert len(caplog.messages) == 2


async def test_a_network_that_filled_up_again_is_told_of_again(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (8, 6, 8):
        await network.hold(count)
    assert len(caplog.messages) == 2


async def test_a_network_of_one_subnet_was_made_for_one_host(caplog: pytest.LogCaptureFixture) -> None:
    conf = net_conf(family_conf("10.5.0.0/16", 24, subnets=1))
    table = LeaseTable()
    key = "10.5.1.0-24"
    table.replace_all({key: Lease(*parse_key(key.encode()), LeaseAttrs(None))}, 1)
    watch = RoomWatch(table, lambda: conf, look_s=0.0)
    task = asyncio.create_task(watch.run())
    watch.leases_changed()
    await until(lambda: watch.now is not None)
    task.cancel()
    assert watch.now == Room(0, 1)
    assert caplog.messages == []


async def test_what_is_free_is_known_once_the_leases_are(network: Network) -> None:
    assert network.watch.now is None
    await network.hold(3)
    assert network.watch.now == Room(7, 10)


async def test_fifty_thousand_leases_are_counted_without_stopping_the_loop() -> None:
    """A miss has to be answered meanwhile."""
    table = LeaseTable()
    watch = RoomWatch(table, lambda: net_conf(family_conf("10.0.0.0/8", 24)))
    blocks = Prefix.parse("10.0.0.0/8").subnets(24)
    keys = [str(block).replace("/", "-") for block in islice(blocks, 1, 50_001)]
    table.replace_all({key: Lease(*parse_key(key.encode()), LeaseAttrs(None)) for key in keys}, 1)
    watch.leases_changed()
    task = asyncio.create_task(watch.run())
    turns = 0
    while watch.now is None:
        await asyncio.sleep(0)
        turns += 1
    task.cancel()
    assert watch.now.free == watch.now.total - 50_000
    assert turns > 10
