"""The client against one real etcd: reads, writes, races, lost answers, lists, watches."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import urllib.request

import pytest

from flanneld.errors import Unavailable
from flanneld.lab.etcd import binary
from flanneld.sources.etcd_client import VALUE_BYTES, Compacted, Endpoint, EtcdClient, LeaseGone, parse_endpoints
from tests.support.etcd import Cluster
from tests.support.relay import Relay
from tests.support.wait import until
from tests.support.watching import Watching

pytestmark = pytest.mark.etcd


async def test_a_key_that_is_written_is_read_back_and_a_missing_one_is_no_error(
    client: EtcdClient, prefix: bytes
) -> None:
    assert (await client.get(prefix + b"a")).kvs == []
    revision = await client.put(prefix + b"a", b"1")
    [kv] = (await client.get(prefix + b"a")).kvs
    assert kv == (prefix + b"a", b"1", revision, 0, 1, revision)
    assert await client.delete(prefix + b"a") == revision + 1
    assert (await client.get(prefix + b"a")).kvs == []


async def test_of_twenty_hosts_that_create_one_key_one_wins_and_all_others_see_it(
    client: EtcdClient, prefix: bytes
) -> None:
    """Contract 3.22: create by transaction."""
    values = [b"host %d" % number for number in range(20)]
    results = await asyncio.gather(*(client.put_if(prefix, value, 0, mod_revision=0) for value in values))
    [won] = [result for result in results if result.succeeded]
    winner = values[results.index(won)]
    lost = [result for result in results if not result.succeeded]
    assert [(kv.value, kv.mod_revision) for result in lost for kv in result.kvs] == [(winner, won.revision)] * 19


async def test_a_key_is_replaced_only_at_the_revision_that_was_read(client: EtcdClient, prefix: bytes) -> None:
    """Contract 11.14: unconditional renewals let two hosts share a subnet."""
    first = await client.put_if(prefix, b"1", 0, mod_revision=0)
    second = await client.put_if(prefix, b"2", 0, mod_revision=first.revision)
    late = await client.put_if(prefix, b"3", 0, mod_revision=first.revision)
    assert (first.succeeded, second.succeeded, late.succeeded) == (True, True, False)
    assert [(kv.value, kv.mod_revision) for kv in late.kvs] == [(b"2", second.revision)]


async def test_a_key_that_was_deleted_is_not_resurrected_by_a_renewal(client: EtcdClient, prefix: bytes) -> None:
    first = await client.put_if(prefix, b"1", 0, mod_revision=0)
    await client.delete(prefix)
    assert await client.put_if(prefix, b"2", 0, mod_revision=first.revision) == (False, first.revision + 1, [])


async def test_a_key_is_deleted_only_at_the_revision_that_was_read(client: EtcdClient, prefix: bytes) -> None:
    first = await client.put(prefix, b"1")
    second = await client.put(prefix, b"2")
    late = await client.delete_if(prefix, mod_revision=first)
    assert (late.succeeded, [kv.value for kv in late.kvs]) == (False, [b"2"])
    assert (await client.delete_if(prefix, mod_revision=second)).succeeded
    assert (await client.delete_if(prefix, mod_revision=second)) == (False, second + 1, [])


async def test_a_lease_takes_its_keys_along_and_revoking_it_twice_is_no_error(
    client: EtcdClient, prefix: bytes
) -> None:
    lease = await client.grant(60)
    assert 55 <= await client.time_to_live(lease) <= 60
    await client.put_if(prefix, b"1", lease, mod_revision=0)
    assert [kv.lease for kv in (await client.get(prefix)).kvs] == [lease]
    await client.revoke(lease)
    await client.revoke(lease)
    assert (await client.get(prefix)).kvs == []
    assert await client.time_to_live(lease) == -1


async def test_writing_under_a_lease_that_is_gone_says_so(client: EtcdClient, prefix: bytes) -> None:
    lease = await client.grant(60)
    await client.revoke(lease)
    with pytest.raises(LeaseGone, match="grant a new one"):
        await client.put(prefix, b"1", lease)
    with pytest.raises(LeaseGone):
        await client.put_if(prefix, b"1", lease, mod_revision=0)


@pytest.fixture
async def relay(etcd: Cluster) -> Relay:
    return Relay(etcd.members[0].address, 2379)


async def test_a_write_whose_answer_was_lost_succeeds_once(client: EtcdClient, relay: Relay, prefix: bytes) -> None:
    """Dependencies 2.4: a transaction that died in flight may have been applied."""
    lease = await client.grant(60)
    before = await client.put(prefix, b"1")
    async with relay:
        behind = EtcdClient([Endpoint("http", "127.0.0.1", relay.port)])
        await behind.get(prefix)
        relay.hold_answers()
        write = asyncio.create_task(behind.put_if(prefix, b"2", lease, mod_revision=before))
        while (kv := (await client.get(prefix)).kvs[0]).value != b"2":
            pass
        relay.cut()
        assert await write == (True, kv.mod_revision, [])
        await behind.close()
    assert [kv.version for kv in (await client.get(prefix)).kvs] == [2]


async def test_a_deletion_whose_answer_was_lost_succeeds(client: EtcdClient, relay: Relay, prefix: bytes) -> None:
    before = await client.put(prefix, b"1")
    async with relay:
        behind = EtcdClient([Endpoint("http", "127.0.0.1", relay.port)])
        await behind.get(prefix)
        relay.hold_answers()
        deletion = asyncio.create_task(behind.delete_if(prefix, mod_revision=before))
        while (await client.get(prefix)).kvs:
            pass
        relay.cut()
        assert (await deletion).succeeded
        await behind.close()


async def test_a_broken_connection_is_not_taken_for_a_cancellation(relay: Relay, prefix: bytes) -> None:
    """grpclib cancels the waiting task and forgets to uncancel; timeouts around it would misbehave."""
    async with relay:
        client = EtcdClient([Endpoint("http", "127.0.0.1", relay.port)], request_timeout_s=1.0)
        await client.get(prefix)

        async def ask_then_wait_in_vain() -> None:
            async with asyncio.timeout(1.5):
                relay.hold_answers()
                with pytest.raises(Unavailable):
                    await client.get(prefix)
                await asyncio.Event().wait()

        with pytest.raises(TimeoutError):
            await ask_then_wait_in_vain()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await client.close()


async def test_a_silent_server_is_given_up_within_the_deadline(relay: Relay, prefix: bytes) -> None:
    async with relay:
        client = EtcdClient([Endpoint("http", "127.0.0.1", relay.port)], request_timeout_s=1.0)
        relay.hold_answers()
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match=rf"^etcd at http://127.0.0.1:{relay.port}: no answer within 0\.[0-9] s$"):
            await client.get(prefix)
        assert asyncio.get_running_loop().time() - began < 1.5
        await client.close()


async def test_nobody_there_and_no_such_name_are_said_in_words() -> None:
    client = EtcdClient(parse_endpoints("http://127.0.0.1:1,http://nowhere.invalid:2379"))
    with pytest.raises(Unavailable) as caught:
        await client.get(b"a")
    assert "http://127.0.0.1:1: connection refused" in str(caught.value)
    assert "http://nowhere.invalid:2379: the name does not resolve" in str(caught.value)
    await client.close()


async def test_the_same_trouble_is_said_in_the_same_words_whichever_server_was_asked_first() -> None:
    # otherwise each try would be a new line in the log
    client = EtcdClient(parse_endpoints("http://127.0.0.1:1,http://127.0.0.1:2"))
    said = set()
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            await client.get(b"a")
        said.add(str(caught.value))
    assert said == {"etcd at http://127.0.0.1:1: connection refused; http://127.0.0.1:2: connection refused"}
    await client.close()


async def test_a_server_that_is_no_etcd_is_said_in_words() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = EtcdClient([Endpoint("http", "127.0.0.1", server.sockets[0].getsockname()[1])])
    with pytest.raises(Unavailable, match=r"is it an etcd, and does it expect https://\?"):
        await client.get(b"a")
    await client.close()
    server.close()
    await server.wait_closed()


def fill(etcd: Cluster, prefix: bytes, count: int) -> None:
    """Write keys by the thousand."""
    for start in range(0, count, 10000):
        puts = "".join(
            f"put {prefix.decode()}{number:06d} {'x' * 40}\n" for number in range(start, min(start + 10000, count))
        )
        argv = [binary("etcdctl"), f"--endpoints={etcd.endpoints}", "txn"]
        subprocess.run(argv, input=f"\n{puts}\n\n", text=True, check=True, capture_output=True)


async def test_a_list_of_many_pages_is_complete_and_of_one_revision_while_others_write(
    etcd: Cluster, client: EtcdClient, prefix: bytes
) -> None:
    count = 50_000
    fill(etcd, prefix, count)
    stop = asyncio.Event()

    async def write() -> int:
        writes = 0
        while not stop.is_set():
            # alternately before and after whatever page is being read
            await client.put(prefix + b"%06d" % (count - 1 - writes if writes % 2 else writes), b"new")
            writes += 1
        return writes

    writer = asyncio.create_task(write())
    listing = await client.list(prefix)
    stop.set()
    assert await writer > 2
    assert [kv.key for kv in listing.kvs] == [prefix + b"%06d" % number for number in range(count)]
    assert max(kv.mod_revision for kv in listing.kvs) <= listing.revision
    # a write that the list shows late would have a revision above that of the list
    written = [event for event in await history(client, prefix, listing.revision) if not event[1].startswith(b"x")]
    assert {kv.key for kv in listing.kvs if kv.value == b"new"} == {key for key, _ in written}


async def history(client: EtcdClient, prefix: bytes, until_revision: int) -> list[tuple[bytes, bytes]]:
    """Keys and values written up to a revision, as the watch tells them."""
    first = min(kv.create_revision for kv in (await client.list(prefix)).kvs)
    async with Watching(client, prefix, first) as watching:
        await until(lambda: watching.batches and watching.batches[-1].revision >= until_revision, 20)
    return [(event.kv.key, event.kv.value) for event in watching.events if event.kv.mod_revision <= until_revision]


async def test_a_list_of_a_prefix_leaves_out_its_neighbours(client: EtcdClient, prefix: bytes) -> None:
    inside = [prefix + b"\xff", prefix + b"\xff\x00", prefix + b"\xff\xff"]
    for key in (*inside, prefix, prefix + b"\xfe", prefix[:-1] + b"0"):
        await client.put(key, b"")
    assert [kv.key for kv in (await client.list(prefix + b"\xff")).kvs] == inside


async def test_of_values_that_are_far_too_long_for_a_lease_only_the_beginning_is_kept(
    client: EtcdClient, prefix: bytes
) -> None:
    """Whoever may write can write megabytes; a key that is read by itself is the operator's and stays whole."""
    long = bytes(1 << 20)
    for number in range(20):
        await client.put(prefix + b"%02d" % number, long)
    listing = await client.list(prefix)
    assert [kv.key for kv in listing.kvs] == [prefix + b"%02d" % number for number in range(20)]
    assert {len(kv.value) for kv in listing.kvs} == {VALUE_BYTES}
    assert (await client.get(prefix + b"00")).kvs[0].value == long
    async with Watching(client, prefix, listing.kvs[0].mod_revision) as watching:
        await until(lambda: len(watching.events) == 20)
    assert {len(event.kv.value) for event in watching.events} == {VALUE_BYTES}


async def test_a_watch_tells_what_came_before_and_what_comes_after_its_start(client: EtcdClient, prefix: bytes) -> None:
    first = await client.put(prefix + b"a", b"1")
    async with Watching(client, prefix, first) as watching:
        await until(lambda: len(watching.events) == 1)
        await client.put(prefix + b"b", b"2")
        last = await client.delete(prefix + b"a")
        await until(lambda: len(watching.events) == 3)
    seen = [(event.deleted, event.kv.key, event.kv.value, event.kv.mod_revision) for event in watching.events]
    assert seen == [
        (False, prefix + b"a", b"1", first),
        (False, prefix + b"b", b"2", first + 1),
        (True, prefix + b"a", b"", last),
    ]
    assert watching.batches[-1].revision == last


async def test_an_expired_lease_is_seen_as_a_deletion(client: EtcdClient, prefix: bytes) -> None:
    lease = await client.grant(1)
    first = await client.put(prefix, b"1", lease)
    async with Watching(client, prefix, first) as watching:
        await until(lambda: [event.deleted for event in watching.events] == [False, True], 10)


async def test_a_watch_of_one_key_is_blind_to_keys_that_begin_like_it(client: EtcdClient, prefix: bytes) -> None:
    """Contract 3.34: Go flannel's own-lease watch also matches ``10.5.1.0-24&…``."""
    first = await client.put(prefix + b"10.5.1.0-24&fd00---64", b"other")
    await client.put(prefix + b"10.5.1.0-24", b"ours")
    watch = client.watch(prefix + b"10.5.1.0-24", prefix=False, start_revision=first)
    assert [event.kv.value for event in (await anext(watch)).events] == [b"ours"]
    await watch.aclose()


async def test_a_watch_from_compacted_history_says_so(etcd: Cluster, client: EtcdClient, prefix: bytes) -> None:
    """Failures F26; contract 3.31."""
    first = await client.put(prefix, b"1")
    etcd.ctl("compact", str(await client.put(prefix, b"2")))
    async with asyncio.timeout(5):
        with pytest.raises(Compacted, match="list again"):
            await anext(client.watch(prefix, prefix=True, start_revision=first))


async def test_a_watch_that_is_left_ends_on_the_server_too(etcd: Cluster, client: EtcdClient, prefix: bytes) -> None:
    def watchers() -> float:
        with urllib.request.urlopen(f"http://{etcd.members[0].address}:2381/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("etcd_debugging_mvcc_watcher_total ")))

    await until(lambda: watchers() == 0, what="watches of earlier tests end")
    async with Watching(client, prefix, 1 + await client.put(prefix, b"1")):
        await until(lambda: watchers() == 1)
    await until(lambda: watchers() == 0)
    assert (await client.get(prefix)).kvs, "the connection serves on"


async def test_a_watch_survives_etcd_being_away_and_says_so_in_two_lines(
    prefix: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flanneld")
    with Cluster() as cluster:
        client = EtcdClient(parse_endpoints(cluster.endpoints), request_timeout_s=1.0)
        async with Watching(client, prefix, 1 + await client.put(prefix, b"1")) as watching:
            cluster.members[0].kill()
            with pytest.raises(Unavailable, match=f"etcd at {cluster.endpoints}: connection refused"):
                await client.get(prefix)
            await until(lambda: caplog.messages)
            cluster.members[0].start()
            await until(cluster.members[0].is_healthy, 10)
            await client.put(prefix + b"a", b"2")
            await until(lambda: watching.keys() == [prefix + b"a"], 10)
        await client.close()
    assert [message.split(" failures=")[0].split(" after_s=")[0] for message in caplog.messages] == [
        "etcd cannot be watched, trying for as long as it takes",
        "etcd is back",
    ]


async def test_an_etcd_that_accepts_and_drops_us_in_a_circle_is_met_with_growing_pauses(
    client: EtcdClient, relay: Relay, prefix: bytes
) -> None:
    """Failures F26: reconnect loops at full speed."""
    clock = asyncio.get_running_loop().time
    pauses: list[float] = []
    async with relay:
        behind = EtcdClient([Endpoint("http", "127.0.0.1", relay.port)])
        async with Watching(behind, prefix, 1 + await client.put(prefix, b"0")) as watching:
            for number in range(6):
                began = clock()
                await client.put(prefix, b"%d" % number)
                await until(lambda number=number: len(watching.events) == number + 1)  # type: ignore[misc]
                pauses.append(clock() - began)
                relay.cut()
        await behind.close()
    assert pauses[1] < 0.5 < pauses[5]


async def test_a_closed_client_asks_nobody(etcd: Cluster) -> None:
    client = EtcdClient(parse_endpoints(etcd.endpoints))
    await client.get(b"a")
    await client.close()
    await client.close()
    with pytest.raises(Unavailable, match="closed"):
        await client.get(b"a")
