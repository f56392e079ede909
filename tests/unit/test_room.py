"""A network that fills up is told of in time, once (failures F27)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from flanneld.duties.room import RoomWatch
from flanneld.model.lease import Lease, LeaseAttrs, LeaseTable
from flanneld.model.lease_codec import parse_key
from flanneld.plan.allocate import Room
from tests.support.hosts import family_conf, net_conf

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
        for _ in range(5):
            await asyncio.sleep(0)


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


async def test_what_is_free_is_known_once_the_leases_are(network: Network) -> None:
    assert network.watch.now() is None
    await network.hold(3)
    assert network.watch.now() == Room(7, 10)
