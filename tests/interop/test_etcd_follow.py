"""Following the peers and the configuration in a real etcd (contract 3.2, 3.27-3.34, 11.1, 11.9-11.11; failure F26)."""

from __future__ import annotations

import asyncio
import logging

import pytest

from flanneld.errors import ConfigError
from flanneld.lab.etcd import binary
from flanneld.model.lease import LeaseTable
from flanneld.model.lease_codec import encode_attrs
from flanneld.sources.etcd_client import EtcdClient
from flanneld.sources.etcd_leases import Keys
from tests.support.etcd import Cluster
from tests.support.hosts import Host, MakeHost, Switch, attrs_of
from tests.support.wait import until

pytestmark = pytest.mark.etcd

PEER = attrs_of("192.0.2.9", backend_type="vxlan", data=b'{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}')


class Peers:
    """Writes leases from outside."""

    def __init__(self, client: EtcdClient, root: str) -> None:
        self._client = client
        self._root = root

    async def put(self, name: str, value: bytes | None = None) -> int:
        return await self._client.put(f"{self._root}/subnets/{name}".encode(), value or encode_attrs(PEER))

    async def delete(self, name: str) -> None:
        await self._client.delete(f"{self._root}/subnets/{name}".encode())


@pytest.fixture
def peers(client: EtcdClient, root: str) -> Peers:
    return Peers(client, root)


def names(table: LeaseTable) -> set[str]:
    return {name for name, _ in table.items()}


def follow(host: Host) -> None:
    host.start(host.store.follow(host.table, host.changes.append))


async def test_an_empty_store_is_a_complete_snapshot(host: MakeHost) -> None:
    a = host()
    follow(a)
    await until(lambda: a.table.complete)
    assert a.changes == ["leases listed"]


async def test_leases_come_change_and_go(peers: Peers, host: MakeHost) -> None:
    await peers.put("10.5.1.0-24")
    a = host()
    follow(a)
    await until(lambda: names(a.table) == {"10.5.1.0-24"})
    await peers.put("10.5.2.0-24&fd00:5:0:2::-64")
    await until(lambda: len(a.table) == 2)
    moved = PEER._replace(public_ip=attrs_of("192.0.2.10").public_ip)
    revision = await peers.put("10.5.1.0-24", encode_attrs(moved))
    await until(lambda: (lease := a.table.get("10.5.1.0-24")) and lease.attrs == moved)
    assert a.table.revision == revision
    await peers.delete("10.5.1.0-24")  # carries no value
    await until(lambda: names(a.table) == {"10.5.2.0-24&fd00:5:0:2::-64"})


async def test_a_renewal_is_no_change_to_peers(peers: Peers, host: MakeHost) -> None:
    await peers.put("10.5.1.0-24")
    a = host()
    follow(a)
    await until(lambda: len(a.table) == 1)
    again = await peers.put("10.5.1.0-24")
    await until(lambda: a.table.revision == again)
    assert a.changes == ["leases listed"]


async def test_a_bad_key_or_value_costs_only_itself_and_one_line(
    client: EtcdClient, peers: Peers, host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract 11.1: one of these makes every Go flanneld remove all its peers."""
    await peers.put("10.5.1.0-24")
    await peers.put("nonsense\n", b"{}")
    a = host()
    follow(a)
    await until(lambda: len(a.table) == 1)
    await peers.put("10.5.2.0-24", b'{"PublicIP":null,"BackendType":7}')
    await peers.put("10.5.3.0-32")
    revision = await peers.put("10.5.4.0-24")
    await until(lambda: a.table.revision == revision)
    assert names(a.table) == {"10.5.1.0-24", "10.5.4.0-24"}
    switch.hold_answers()
    await peers.put("10.5.5.0-24")
    await compact(client)
    switch.cut()  # everything is listed again
    await until(lambda: len(a.table) == 3, timeout_s=10)
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [line.split("key=")[1].split()[0] for line in lines] == ["'nonsense\\n'", "'10.5.2.0-24'", "'10.5.3.0-32'"]


async def test_a_bad_value_put_right_makes_the_peer_usable(peers: Peers, host: MakeHost) -> None:
    await peers.put("10.5.1.0-24", b"broken")
    a = host()
    follow(a)
    await until(lambda: a.table.complete)
    assert len(a.table) == 0
    await peers.put("10.5.1.0-24")
    await until(lambda: len(a.table) == 1)


async def compact(client: EtcdClient) -> None:
    """Throw all history away."""
    process = await asyncio.create_subprocess_exec(
        *_etcdctl(client, "compact", str((await client.get(b"none")).revision)), stdout=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0


def _etcdctl(client: EtcdClient, *arguments: str) -> list[str]:
    return [binary("etcdctl"), f"--endpoints={client.describe()}", *arguments]


async def test_what_happened_in_compacted_history_is_found_by_comparing(
    client: EtcdClient, peers: Peers, host: MakeHost, switch: Switch
) -> None:
    """Contract 11.10: Go flanneld misses changed attributes; failure F26: it looped."""
    for name in ("10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24"):
        await peers.put(name)
    a = host()
    follow(a)
    await until(lambda: len(a.table) == 3)
    switch.hold_answers()
    moved = PEER._replace(public_ip=attrs_of("192.0.2.10").public_ip)
    await peers.delete("10.5.1.0-24")
    await peers.put("10.5.2.0-24", encode_attrs(moved))
    await peers.put("10.5.4.0-24")
    await compact(client)
    switch.cut()
    await until(lambda: names(a.table) == {"10.5.2.0-24", "10.5.3.0-24", "10.5.4.0-24"}, timeout_s=10)
    changed = a.table.get("10.5.2.0-24")
    assert changed is not None
    assert changed.attrs == moved
    await peers.put("10.5.5.0-24")
    await until(lambda: len(a.table) == 4)


async def test_events_missed_while_disconnected_arrive_without_a_new_list(
    peers: Peers, host: MakeHost, switch: Switch
) -> None:
    await peers.put("10.5.1.0-24")
    a = host()
    follow(a)
    await until(lambda: len(a.table) == 1)
    switch.point_nowhere()
    await peers.delete("10.5.1.0-24")
    await peers.put("10.5.2.0-24")
    switch.point_to(*switch.home)
    await until(lambda: names(a.table) == {"10.5.2.0-24"}, timeout_s=10)
    assert a.changes[0] == "leases listed"
    assert "leases listed" not in a.changes[1:]


async def test_etcd_away_at_the_start_is_waited_for_with_one_line(
    peers: Peers, host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await peers.put("10.5.1.0-24")
    switch.point_nowhere()
    a = host()
    follow(a)
    await until(lambda: "etcd cannot be read" in caplog.text)
    assert not a.table.complete
    switch.point_to(*switch.home)
    await until(lambda: len(a.table) == 1, timeout_s=10)
    assert caplog.text.count("etcd cannot be read") == 1
    assert "etcd can be read again" in caplog.text


async def test_keys_beside_the_subnets_are_none_of_ours(client: EtcdClient, root: str, host: MakeHost) -> None:
    await client.put(f"{root}/subnets-old/10.5.7.0-24".encode(), encode_attrs(PEER))
    await client.put(f"{root}/config".encode(), b"{}")
    a = host()
    follow(a)
    await until(lambda: a.table.complete)
    assert len(a.table) == 0


async def test_many_leases_are_decoded_without_stopping_the_loop(client: EtcdClient, root: str, host: MakeHost) -> None:
    puts = [client.put(f"{root}/subnets/10.{n >> 8}.{n & 255}.0-24".encode(), encode_attrs(PEER)) for n in range(1500)]
    await asyncio.gather(*puts)
    a = host()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while not a.table.complete:
            turns += 1
            await asyncio.sleep(0)

    a.start(other())
    follow(a)
    await until(lambda: a.table.complete)
    assert len(a.table) == 1500
    assert turns >= 5


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}///", "/{}", "{}/x/.."])
async def test_every_spelling_of_the_prefix_means_the_same_keys(
    peers: Peers, root: str, host: MakeHost, spelling: str
) -> None:
    await peers.put("10.5.1.0-24")
    a = host(prefix=spelling.format(root))
    follow(a)
    await until(lambda: len(a.table) == 1)  # contract 3.2


def test_an_empty_prefix_is_joined_as_go_does() -> None:
    assert (Keys("").config, Keys("/").config, Keys("a/b/").subnets) == ("config", "/config", "a/b/subnets/")


async def test_a_missing_configuration_comes_with_the_command_that_writes_one(
    root: str, host: MakeHost, etcd: Cluster
) -> None:
    a = host()
    with pytest.raises(ConfigError, match="no network configuration") as caught:
        await a.store.read_config()
    command, _, value = str(caught.value).partition("etcdctl ")[2].partition(" '")
    etcd.ctl(*command.split(), value.removesuffix("'"))
    assert await a.store.read_config() == b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'


async def test_each_new_configuration_is_told_once(
    client: EtcdClient, root: str, host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"{root}/config".encode()
    await client.put(key, b"1")
    a = host()
    assert await a.store.read_config() == b"1"
    seen: list[bytes] = []
    a.start(a.store.follow_config(seen.append))
    await client.put(key, b"2")
    await until(lambda: seen == [b"2"])
    await client.put(key, b"2")
    await client.delete(key)
    await until(lambda: "keeping the one we have" in caplog.text)
    switch.hold_answers()
    await client.put(key, b"3")
    await compact(client)
    switch.cut()
    await until(lambda: seen == [b"2", b"3"], timeout_s=10)


async def test_a_configuration_changed_before_it_is_followed_is_not_missed(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    key = f"{root}/config".encode()
    await client.put(key, b"1")
    a = host()
    await a.store.read_config()
    await client.put(key, b"2")
    seen: list[bytes] = []
    a.start(a.store.follow_config(seen.append))
    await until(lambda: seen == [b"2"])
