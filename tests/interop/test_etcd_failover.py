"""The client against a real cluster of three members that die, hang and come back (failures F26, F29)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from flanneld.errors import Unavailable
from flanneld.sources.etcd_client import EtcdClient, parse_endpoints
from tests.support.etcd import Cluster
from tests.support.wait import until
from tests.support.watching import Watching

pytestmark = pytest.mark.etcd


@pytest.fixture
def trio() -> Iterator[Cluster]:
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture
async def client(trio: Cluster) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(parse_endpoints(trio.endpoints))
    yield client
    await client.close()


@pytest.fixture
async def writer(trio: Cluster) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(parse_endpoints(trio.endpoints))
    yield client
    await client.close()


async def write_for_ever(writer: EtcdClient, acknowledged: list[tuple[bytes, int]]) -> None:
    """Create key after key, each exactly once, and note its revision."""
    number = 0
    while True:
        key = b"/w/%06d" % number
        lease = await granted(writer)
        while True:
            try:
                result = await writer.put_if(key, b"value", lease, mod_revision=0)
            except Unavailable:
                continue  # the lease makes the repeat safe
            break
        assert result.succeeded, f"{key!r} was written by nobody else: {result}"
        acknowledged.append((key, result.revision))
        number += 1


async def granted(writer: EtcdClient) -> int:
    while True:
        try:
            return await writer.grant(600)
        except Unavailable:
            continue


async def test_a_watch_loses_and_repeats_nothing_while_members_are_killed_under_a_writer(
    trio: Cluster, client: EtcdClient, writer: EtcdClient
) -> None:
    acknowledged: list[tuple[bytes, int]] = []
    start = (await client.get(b"/w/")).revision + 1
    async with Watching(client, b"/w/", start) as watching:
        writing = asyncio.create_task(write_for_ever(writer, acknowledged))
        for _ in range(4):
            mark = len(acknowledged)
            await until(lambda mark=mark: len(acknowledged) > mark + 50, 20)  # type: ignore[misc]
            victim = trio.member(client.endpoint.host)
            victim.kill()
            mark = len(acknowledged)
            await until(lambda mark=mark: len(acknowledged) > mark + 50 or writing.done(), 20)  # type: ignore[misc]
            victim.start()
            await until(victim.is_healthy, 20)
        writing.cancel()
        await asyncio.wait([writing])
        stored = [(kv.key, kv.mod_revision) for kv in (await client.list(b"/w/")).kvs]
        await until(lambda: len(watching.events) >= len(stored), 10)
    assert [(event.kv.key, event.kv.mod_revision) for event in watching.events] == stored
    assert acknowledged == stored[: len(acknowledged)]
    assert len(stored) > 400


async def test_a_request_to_a_hanging_member_is_answered_by_another_and_takes_the_watch_along(
    trio: Cluster, client: EtcdClient, writer: EtcdClient
) -> None:
    """Failures F29: per-request deadlines; a dead connection found by one is found for all."""
    clock = asyncio.get_running_loop().time
    async with Watching(client, b"/h/", 1 + await client.put(b"/h/0", b"")) as watching:
        await writer.put(b"/h/1", b"")
        await until(lambda: watching.keys() == [b"/h/1"])
        hanging = trio.member(client.endpoint.host)
        hanging.stop()
        try:
            began = clock()
            await client.get(b"/h/0")
            assert clock() - began < 5
            await client.put(b"/h/2", b"")
            await until(lambda: watching.keys() == [b"/h/1", b"/h/2"], 5)
        finally:
            hanging.cont()


async def test_an_idle_watch_on_a_hanging_member_moves_to_another_within_eleven_seconds(
    trio: Cluster, client: EtcdClient
) -> None:
    """Dependencies 2.4: with grpclib's default settings this takes for ever."""
    async with Watching(client, b"/i/", 1 + await client.put(b"/i/0", b"")) as watching:
        await client.put(b"/i/1", b"")
        await until(lambda: watching.keys() == [b"/i/1"])
        hanging = trio.member(client.endpoint.host)
        others = [e for e in parse_endpoints(trio.endpoints) if e.host != hanging.address]
        elsewhere = EtcdClient(others)
        hanging.stop()
        try:
            await elsewhere.put(b"/i/2", b"")
            await until(lambda: watching.keys() == [b"/i/1", b"/i/2"], 11)
        finally:
            hanging.cont()
            await elsewhere.close()


async def test_without_quorum_requests_fail_in_time_and_the_watch_goes_on_afterwards(
    trio: Cluster, client: EtcdClient
) -> None:
    clock = asyncio.get_running_loop().time
    async with Watching(client, b"/q/", 1 + await client.put(b"/q/0", b"")) as watching:
        survivor = trio.member(client.endpoint.host)
        lost = [member for member in trio.members if member is not survivor]
        for member in lost:
            member.kill()
        began = clock()
        with pytest.raises(Unavailable):
            await client.put(b"/q/1", b"")
        assert clock() - began < 5.5
        for member in lost:
            member.start()
        await until(lambda: all(member.is_healthy() for member in trio.members), 20)
        await client.put(b"/q/2", b"")
        await until(lambda: b"/q/2" in watching.keys(), 10)  # noqa: SIM118
        assert watching.keys() in ([b"/q/2"], [b"/q/1", b"/q/2"]), "the first write may have been carried out"


async def test_daemons_spread_over_the_members(trio: Cluster) -> None:
    first = {EtcdClient(parse_endpoints(trio.endpoints)).endpoint for _ in range(100)}
    assert len(first) == 3
