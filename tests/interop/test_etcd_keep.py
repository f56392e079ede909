"""Keeping a lease in a real etcd: renewal, deletion, theft, other writers, outages (failures F16, F18, F23)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.errors import LeaseLost
from flanneld.model.lease import LeaseAttrs
from flanneld.model.lease_codec import encode_attrs
from flanneld.sources.etcd_client import KV, EtcdClient
from tests.support.etcd import Cluster
from tests.support.hosts import Host, MakeHost, Switch, attrs_of, family_conf, net_conf
from tests.support.wait import until

pytestmark = pytest.mark.etcd

CONF = net_conf(family_conf("10.5.0.0/16", 24))
ME = attrs_of("192.0.2.1", "id-a")
GO = attrs_of("192.0.2.1")
OTHER = attrs_of("192.0.2.2", "id-b")


class CountingClock:
    """Tells the time and how often it was asked, which the keeper does in each of its turns."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return time.monotonic()

    async def turns(self) -> None:
        """Let the keeper look at its key some times."""
        enough = self.asked + 40
        await until(lambda: self.asked > enough, what="some turns of the keeper")


class Key:
    """The key of a host, seen and written from outside."""

    def __init__(self, client: EtcdClient, root: str, host: Host) -> None:
        assert host.store.own
        self.path = f"{root}/subnets/{host.store.own.key}".encode()
        self._client = client

    async def read(self) -> KV | None:
        kvs = (await self._client.get(self.path)).kvs
        return kvs[0] if kvs else None

    async def wait(self, condition: Callable[[KV | None], bool], what: str, timeout_s: float = 5.0) -> KV:
        async with asyncio.timeout(timeout_s):
            while not condition(kv := await self.read()):  # a question to etcd each time, so no busy loop
                pass
        assert kv, what
        return kv

    async def put(self, attrs: LeaseAttrs, lease: int = 0) -> int:
        return await self._client.put(self.path, encode_attrs(attrs), lease)


async def test_a_lease_is_renewed_in_time_by_a_new_grant_and_the_old_one_goes(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    a = host(ttl_s=3, renew_margin_s=1.4)
    own = await a.run(CONF)
    await until(lambda: a.own.ttl_id != own.lease.ttl_id, what="renewal")
    kv = await a.key()
    assert kv is not None
    assert (kv.lease, kv.create_revision) == (a.own.ttl_id, own.lease.revision)  # the key was never away
    assert kv.value == encode_attrs(ME)
    assert await client.time_to_live(own.lease.ttl_id) == -1  # contract 11.47
    assert a.store.own
    assert own.expires
    assert a.store.own.expires
    assert a.store.own.expires > own.expires + 1


async def test_a_machine_that_slept_past_its_renewal_renews_when_it_wakes(host: MakeHost) -> None:
    """Failure F23: the wall clock does not count and the loop's clock stands still meanwhile."""
    slept_s = 0.0
    a = host(check_s=0.1, clock=lambda: time.monotonic() + slept_s)
    own = await a.run(CONF)
    slept_s = 86400.0 - 1800.0
    await until(lambda: a.own.ttl_id != own.lease.ttl_id, what="renewal")


async def test_a_lease_is_not_rewritten_without_need(client: EtcdClient, host: MakeHost, root: str) -> None:
    clock = CountingClock()
    a = host(check_s=0.01, clock=clock)
    await a.run(CONF)
    revision = a.own.revision
    await clock.turns()
    kv = await Key(client, root, a).read()
    assert kv is not None
    assert kv.mod_revision == revision


@pytest.mark.parametrize("how", ["delete", "revoke"])
async def test_a_deleted_or_revoked_lease_is_created_again_with_the_same_subnet(
    client: EtcdClient, root: str, host: MakeHost, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Contract 11.6: Go flanneld exits."""
    a = host()
    own = await a.run(CONF)
    key = Key(client, root, a)
    if how == "delete":
        await client.delete(key.path)
    else:
        await client.revoke(own.lease.ttl_id)
    kv = await key.wait(lambda kv: kv is not None, "the key again")
    assert kv.value == encode_attrs(ME)
    await until(lambda: a.own.revision == kv.mod_revision)
    assert a.own.ttl_id != own.lease.ttl_id
    assert a.subnet() == str(own.lease.subnet)
    await until(lambda: caplog.text.count("had vanished") == 1)


async def test_a_key_that_vanished_while_etcd_was_unreachable_is_created_again(
    client: EtcdClient, root: str, host: MakeHost, switch: Switch
) -> None:
    a = host()
    await a.run(CONF)
    key = Key(client, root, a)
    switch.point_nowhere()
    await client.delete(key.path)
    switch.point_to(*switch.home)
    await key.wait(lambda kv: kv is not None, "the key again", timeout_s=15.0)


async def test_a_stolen_subnet_is_given_up_and_the_next_lease_is_another_one(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    a = host()
    own = await a.run(CONF)
    key = Key(client, root, a)
    taken_at = await key.put(OTHER)
    await until(lambda: a.lost)
    for part in ("id-b", "192.0.2.2", "id-a", str(own.lease.subnet)):
        assert part in str(a.lost)
    again = await a.acquire(CONF, previous=str(own.lease.subnet))
    assert again.key != own.key
    kv = await key.read()
    assert kv is not None
    assert kv.mod_revision == taken_at  # never written over


async def test_a_clone_with_our_identity_does_not_make_us_fight(client: EtcdClient, root: str, host: MakeHost) -> None:
    a = host()
    own = await a.run(CONF)
    await Key(client, root, a).put(attrs_of("192.0.2.9", "id-a"))
    await until(lambda: a.lost)
    assert (await a.acquire(CONF, previous=str(own.lease.subnet))).key != own.key


async def test_a_subnet_that_an_overlapping_key_took_is_lost(client: EtcdClient, root: str, host: MakeHost) -> None:
    a = host()
    await a.run(CONF)
    key = Key(client, root, a)
    await client.put(key.path + b"&fd00:5:0:1::-64", encode_attrs(OTHER))
    await client.delete(key.path)
    await until(lambda: a.lost)
    assert await key.read() is None


@pytest.mark.parametrize("name", ["10.0.0.0-8", "10.5.0.0-16"])
async def test_a_key_that_holds_the_whole_network_takes_nobodys_subnet(
    client: EtcdClient, root: str, host: MakeHost, name: str
) -> None:
    """It is nobody's lease to whoever allocates, so it is none to whoever has lost its key for a moment."""
    a = host()
    own = await a.run(CONF)
    await client.put(f"{root}/subnets/{name}".encode(), encode_attrs(OTHER))
    await client.delete(Key(client, root, a).path)
    await until(lambda: a.own.revision > own.lease.revision, what="the key is there again")
    assert a.lost is None
    assert a.subnet() == str(own.lease.subnet)


async def test_publishing_over_a_stolen_key_is_refused(client: EtcdClient, root: str, host: MakeHost) -> None:
    a = host()
    await a.acquire(CONF)
    key = Key(client, root, a)
    taken_at = await key.put(OTHER)
    with pytest.raises(LeaseLost, match="id-b"):
        await a.store.publish(attrs_of("192.0.2.1", "id-a", backend_type="vxlan"))
    kv = await key.read()
    assert kv is not None
    assert kv.mod_revision == taken_at


async def test_published_attributes_reach_peers_and_the_etcd_lease_stays(host: MakeHost) -> None:
    a, b = host(), host(OTHER)
    own = await a.run(CONF)
    await b.run(CONF)
    news = attrs_of("192.0.2.55", "id-a", backend_type="vxlan", data=b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}')
    await a.store.publish(news)
    await until(lambda: (seen := b.table.get(own.key)) and seen.attrs == news)
    kv = await a.key()
    assert kv is not None
    assert kv.lease == own.lease.ttl_id == a.own.ttl_id


async def test_publishing_waits_for_etcd_with_one_line(
    client: EtcdClient, root: str, host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    a = host()
    await a.acquire(CONF)
    switch.point_nowhere()
    publishing = asyncio.create_task(a.store.publish(attrs_of("192.0.2.55", "id-a")))
    await until(lambda: "waiting to publish our lease" in caplog.text)
    switch.point_to(*switch.home)
    await asyncio.wait_for(publishing, 10)
    kv = await Key(client, root, a).read()
    assert kv is not None
    assert b"192.0.2.55" in kv.value
    assert caplog.text.count("waiting to publish our lease failures=1 ") == 1


async def test_a_connection_that_breaks_at_any_moment_of_a_write_does_no_harm(
    client: EtcdClient, root: str, host: MakeHost, switch: Switch, caplog: pytest.LogCaptureFixture
) -> None:
    """Among the moments is the one at which the write is done and its answer is lost."""
    caplog.set_level(logging.INFO)
    a = host()
    await a.acquire(CONF)
    key = Key(client, root, a)
    for turns in range(0, 40, 2):
        news = attrs_of(f"192.0.2.{100 + turns}", "id-a")
        publishing = asyncio.create_task(a.store.publish(news))
        for _ in range(turns):
            await asyncio.sleep(0)
        switch.hold_answers()
        for _ in range(turns % 7):
            await asyncio.sleep(0)
        switch.point_nowhere()  # longer than the client itself tries
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(publishing), 0.2)
        switch.point_to(*switch.home)
        await asyncio.wait_for(publishing, 10)
        kv = await key.read()
        assert kv is not None
        assert kv.value == encode_attrs(news)
        assert (kv.mod_revision, kv.lease) == (a.own.revision, a.own.ttl_id)
    assert "overwritten" not in caplog.text
    assert "vanished" not in caplog.text


async def test_a_reservation_made_by_an_operator_while_we_run_is_kept(
    client: EtcdClient, root: str, host: MakeHost
) -> None:
    """Contract 3.40: Go flanneld undoes it within milliseconds."""
    a = host()
    own = await a.run(CONF)
    key = Key(client, root, a)
    await key.put(ME)  # the same value, without lease
    await until(lambda: a.store.own and a.store.own.expires is None)
    await a.store.publish(attrs_of("192.0.2.55", "id-a"))
    kv = await key.read()
    assert kv is not None
    assert kv.lease == 0
    assert await client.time_to_live(own.lease.ttl_id) == -1


async def test_what_go_flanneld_with_our_address_writes_is_put_back_a_few_times_only(
    client: EtcdClient, root: str, host: MakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    clock = CountingClock()
    a = host(check_s=0.01, clock=clock)
    await a.run(CONF)
    key = Key(client, root, a)
    lease = await client.grant(600)
    for _ in range(3):
        written = await key.put(GO, lease)
        kv = await key.wait(lambda kv, after=written: kv is not None and kv.mod_revision > after, "our value")  # type: ignore[misc]
        assert kv.value == encode_attrs(ME)
        await until(lambda revision=kv.mod_revision: a.own.revision == revision)  # type: ignore[misc]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    written = await key.put(GO, lease)
    await until(lambda: "again and again" in caplog.text)
    await clock.turns()
    assert caplog.text.count("again and again") == 1
    now = await key.read()
    assert now is not None
    assert now.mod_revision == written
    assert a.lost is None


async def test_a_value_that_nobody_can_read_is_put_right(client: EtcdClient, root: str, host: MakeHost) -> None:
    """Every running Go flanneld has dropped its peers by then; the PUT heals them (contract 11.1, 13.4)."""
    a = host()
    await a.run(CONF)
    key = Key(client, root, a)
    broken = await client.put(key.path, b"broken", a.own.ttl_id)
    kv = await key.wait(lambda kv: kv is not None and kv.mod_revision > broken, "our value")
    assert kv.value == encode_attrs(ME)


async def test_a_rebuilt_etcd_gets_all_leases_back_and_no_peer_is_forgotten_meanwhile(
    root: str, host: MakeHost, switch: Switch, client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Failure F16: etcd loses its data while all daemons run."""
    for _ in range(60):  # the new store begins at revision 1, far below
        await client.put(root.encode(), b"x")
    a, b = host(check_s=0.2, grace_s=60.0), host(OTHER, check_s=0.5, grace_s=60.0)
    gone = host(attrs_of("192.0.2.3", "id-c"))
    owns = [await h.run(CONF) for h in (a, b)]
    gone_key = (await gone.acquire(CONF)).key
    await until(lambda: len(a.table) == len(b.table) == 3)
    with Cluster() as rebuilt:
        a.sizes.clear()
        switch.point_to(rebuilt.members[0].address, 2379)
        await until(lambda: caplog.text.count("had vanished") == 2, timeout_s=15)
        await until(lambda: caplog.text.count("keeping peers") == 2, timeout_s=15)
        assert a.table.get(gone_key) is not None
        assert [h.store.own.key for h in (a, b) if h.store.own] == [own.key for own in owns]
        published = attrs_of("192.0.2.2", "id-b", backend_type="vxlan")
        await b.store.publish(published)  # and the watches live in the new store
        await until(lambda: (seen := a.table.get(owns[1].key)) and seen.attrs == published)
        assert set(a.sizes) == {3}
        await a.stop()
        await b.stop()


async def test_a_store_that_begins_again_is_noticed_by_its_revision_and_not_by_the_clock(
    root: str, host: MakeHost, switch: Switch, client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(60):
        await client.put(root.encode(), b"x")
    a = host(check_s=3600.0)
    await a.run(CONF)
    await until(lambda: len(a.table) == 1)
    with Cluster() as rebuilt:
        switch.point_to(rebuilt.members[0].address, 2379)
        await until(lambda: "had vanished" in caplog.text and "keeping peers" in caplog.text, timeout_s=15)
        await a.stop()


async def test_peers_that_never_come_back_to_a_rebuilt_etcd_are_dropped_after_the_grace(
    root: str, host: MakeHost, switch: Switch, client: EtcdClient
) -> None:
    for _ in range(60):
        await client.put(root.encode(), b"x")
    a, gone = host(check_s=0.2, grace_s=1.0), host(OTHER)
    gone_key = (await gone.acquire(CONF)).key
    await a.run(CONF)
    await until(lambda: len(a.table) == 2)
    with Cluster() as rebuilt:
        switch.point_to(rebuilt.members[0].address, 2379)
        await until(lambda: a.table.get(gone_key) is None, timeout_s=15)
        assert a.store.own
        assert a.table.get(a.store.own.key)
        await a.stop()


@pytest.mark.parametrize("how", ["another cluster", "restored from a backup"])
async def test_store_that_is_not_the_one_we_knew_is_noticed_though_it_has_come_further(
    how: str, tmp_path: Path
) -> None:
    """Failures F16: others wrote so much after the restore that revisions tell nothing any more."""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(Cluster())
        for _ in range(2):  # elections are counted; those of a restored cluster from the beginning
            old.members[0].kill()
            old.members[0].start()
            old.members[0].wait_healthy()
        old.save(tmp_path / "backup")
        switch = Switch(old.members[0].address, 2379)
        async with switch, Host(switch.endpoint, "/n", ME, check_s=0.2) as a:
            own = await a.run(CONF)
            old.ctl("put", "/n/subnets/10.6.200.0-24", encode_attrs(OTHER).decode())
            await until(lambda: len(a.table) == 2)
            switch.point_nowhere()
            if how == "restored from a backup":
                new = old
                new.restore(tmp_path / "backup")
            else:
                new = stack.enter_context(Cluster())
            for number in range(30):
                new.ctl("put", f"/n/subnets/10.6.{number}.0-24", encode_attrs(OTHER).decode())
            switch.point_to(new.members[0].address, 2379)
            await until(lambda: len(a.table) == 32, 10.0, "what is there, and the one that is not there yet")
            await until(lambda: own.key in new.ctl("get", "--prefix", "/n/subnets/"), 5.0, "our key")
            assert str(a.own.subnet) == str(own.lease.subnet)
