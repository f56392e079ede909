"""The lease protocol against a real etcd: random schedules of everything that may go wrong, judged by etcd's history.

Three hosts as far as their leases go (store, memory, quarantine), each behind a relay of its own; an operator who
deletes keys; a Go flanneld that writes over whatever has its address (contract 3.20). What each does at what moment
is chance, and chance has a seed: ``FENCING_SEED=N`` plays one again, as far as the clock allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from flanneld.contracts import DataPath
from flanneld.duties.quarantine import LeaseGuard
from flanneld.errors import LeaseMoved
from flanneld.model.lease import Claim, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.lease_codec import decode_attrs, encode_attrs, parse_key
from flanneld.remembering import Remembering
from flanneld.report.lease_cache import LeaseCache
from flanneld.sources.etcd import EtcdStore
from flanneld.sources.etcd_client import Compacted, EtcdClient, parse_endpoints
from tests.support.etcd import Cluster
from tests.support.hosts import Host, Switch, attrs_of, family_conf, net_conf
from tests.support.wait import until

pytestmark = pytest.mark.etcd

CONF = net_conf(family_conf("10.5.0.0/16", 24, 3))
CONFIG = b'{"Network":"10.5.0.0/16"}'
TTL_S = 2
FAULTS = 25
SEEDS = [int(os.environ["FENCING_SEED"])] if "FENCING_SEED" in os.environ else [secrets.randbelow(10**6) for _ in "123"]


def vtep(number: int) -> bytes:
    return b'{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}' % number


GO = attrs_of("192.0.2.1", "", backend_type="vxlan", data=vtep(9))
"""Another machine with the address of our first host."""


class Traffic:
    """The data path, as far as quarantine goes."""

    is_open = True

    def isolate(self, on: bool) -> None:
        self.is_open = not on


class Machine:
    """A host that can be killed and started again, with what its disk keeps."""

    def __init__(self, number: int, switch: Switch, root: str, disk: Path) -> None:
        self.attrs = attrs_of(f"192.0.2.{number}", f"{number}" * 32, backend_type="vxlan", data=vtep(number))
        self.name, self.switch, self._root = f"h{number}", switch, root
        self.disk = disk / f"h{number}.cache"
        self.problem: str | None = None
        self.path = Traffic()
        self.own: OwnLease | None = None
        self._previous: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.kill()
        self._task = asyncio.create_task(self._live())

    async def kill(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._task, self.own = None, None

    def clone(self, other: Machine) -> None:
        """Become a copy of another host's disk, with an address of its own; devices' MACs come from the identity."""
        self.attrs = other.attrs._replace(public_ip=self.attrs.public_ip)
        shutil.copy(other.disk, self.disk)

    async def _live(self) -> None:
        """As ``app.py``: a subnet that moved begins anew."""
        while True:
            client = EtcdClient(parse_endpoints(self.switch.endpoint), request_timeout_s=0.5)
            store = EtcdStore(client, self._root, ttl_s=TTL_S, renew_margin_s=1.0, check_s=0.2, grace_s=0.5)
            memory = Remembering(store, LeaseCache(self.disk, "/net", self.attrs.identity), patience_s=0.1)
            try:
                await self._serve(memory)
            except* LeaseMoved:
                pass
            finally:
                await memory.close()

    async def _serve(self, store: Remembering) -> None:
        with contextlib.suppress(Exception):
            await store.read_config()
        before = Claim(self.attrs, (parse_key(f"/{self._previous}".encode())[0] if self._previous else None, None))
        own = await store.acquire(CONF, before)
        self.own, self._previous = own, own.key
        self.path.isolate(False)
        table = LeaseTable()
        guard = LeaseGuard(store, cast(DataPath, self.path), table, lambda _: None, self._tell)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(store.follow(table, lambda _: guard.leases_changed()))
            tasks.create_task(guard.run())

    def _tell(self, problem: str | None) -> None:
        self.problem = problem

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def is_settled(self, held: dict[str, LeaseAttrs]) -> bool:
        """Whether it holds what it believes to hold, or is in quarantine and says why."""
        if not self.is_alive or self.own is None:
            return False
        if self.path.is_open:
            return held.get(self.own.key) == self.attrs
        return bool(self.problem)


class Change(NamedTuple):
    """A change of a key, from etcd's history."""

    revision: int
    key: str
    before: LeaseAttrs | None
    after: LeaseAttrs | None


class Scribe:
    """Writes down what happened to each key."""

    def __init__(self, client: EtcdClient, root: str) -> None:
        self._client, self._prefix = client, f"{root}/subnets/".encode()
        self.held: dict[str, LeaseAttrs] = {}
        self.changes: list[Change] = []

    async def run(self) -> None:
        revision = (await self._client.list(self._prefix)).revision
        with contextlib.suppress(Compacted):
            async for batch in self._client.watch(self._prefix, prefix=True, start_revision=revision + 1):
                for event in batch.events:
                    key = event.kv.key.removeprefix(self._prefix).decode()
                    after = None if event.deleted else decode_attrs(event.kv.value)
                    self.changes.append(Change(event.kv.mod_revision, key, self.held.pop(key, None), after))
                    if after:
                        self.held[key] = after

    def wrongs(self) -> list[Change]:
        """Writes of ours over another's live lease."""
        return [
            change
            for change in self.changes
            if change.before and change.after and change.after.identity  # ours: Go's have none
            if change.before.identity != change.after.identity
            if change.before.identity or change.before.public_ip != change.after.public_ip  # contract 13.6
        ]


class Outside:
    """Everybody else, and the network."""

    def __init__(self, client: EtcdClient, root: str, machines: Sequence[Machine], chance: random.Random) -> None:
        self._client, self._prefix, self._machines, self._chance = client, f"{root}/subnets/".encode(), machines, chance
        self.told: list[str] = []

    async def do_something(self) -> None:
        machine = self._chance.choice(self._machines)
        faults: list[Callable[[Machine], object]] = [self._kill, self._cut, self._hold, self._delete, self._go]
        fault = self._chance.choice(faults)
        self.told.append(f"{fault.__name__.strip('_')} {machine.name}")
        await fault(machine)  # type: ignore[misc]

    async def heal(self) -> None:
        for machine in self._machines:
            machine.switch.point_to(*machine.switch.home)
            if not machine.is_alive:
                await machine.start()

    async def _kill(self, machine: Machine) -> None:
        await machine.kill()
        if self._chance.random() < 0.8:
            await machine.start()

    async def _cut(self, machine: Machine) -> None:
        """For longer than a lease lives, or not; the next fault meets it as it is."""
        if self._chance.random() < 0.5:
            machine.switch.point_nowhere()
        else:
            machine.switch.point_to(*machine.switch.home)

    async def _hold(self, machine: Machine) -> None:
        machine.switch.hold_answers()
        await asyncio.sleep(self._chance.random() * 0.3)
        machine.switch.cut()

    async def _delete(self, _machine: Machine) -> None:
        kvs = (await self._client.list(self._prefix)).kvs
        if kvs:
            await self._client.delete(self._chance.choice(kvs).key)

    async def _go(self, _machine: Machine) -> None:
        for kv in (await self._client.list(self._prefix)).kvs:
            if decode_attrs(kv.value).public_ip == GO.public_ip:
                await self._client.put(kv.key, encode_attrs(GO), await self._client.grant(TTL_S))
                return


@pytest.fixture
async def machines(etcd: Cluster, root: str, tmp_path: Path) -> AsyncIterator[list[Machine]]:
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for number in (1, 2, 3):
            switch = Switch(etcd.members[0].address, 2379)
            await stack.enter_async_context(switch)
            machine = Machine(number, switch, root, tmp_path)
            stack.push_async_callback(machine.kill)
            made.append(machine)
        yield made


@pytest.mark.parametrize("seed", SEEDS, ids=[f"seed {number}" for number in range(len(SEEDS))])
async def test_whatever_happens_nobody_writes_over_anothers_lease_and_all_come_to_rest(
    client: EtcdClient, root: str, machines: list[Machine], seed: int
) -> None:
    print(f"FENCING_SEED={seed}")  # not in the test's name, which has to be the same in each process and each run
    chance = random.Random(seed)
    await client.put(f"{root}/config".encode(), CONFIG)
    scribe, outside = Scribe(client, root), Outside(client, root, machines, chance)
    writing = asyncio.create_task(scribe.run())
    try:
        for machine in machines:
            await machine.start()
        await until(lambda: all(m.is_settled(scribe.held) for m in machines), what="three leases")
        for _ in range(FAULTS):
            await outside.do_something()
            await asyncio.sleep(chance.random() * 0.4)
        await outside.heal()
        await until(lambda: all(m.is_settled(scribe.held) for m in machines), what=f"rest, after {outside.told}")
        await until(lambda: all(m.path.is_open for m in machines), what=f"end of quarantine, after {outside.told}")
        assert len({m.own.key for m in machines if m.own}) == 3
        assert scribe.wrongs() == [], f"seed {seed}"
        assert len(scribe.changes) > 10, "something happened at all"
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


@pytest.mark.parametrize("ran_out", [False, True], ids=["lease lives", "lease ran out"])
async def test_clones_that_both_started_from_one_memory_share_no_subnet_when_the_store_is_back(
    client: EtcdClient, root: str, machines: list[Machine], ran_out: bool
) -> None:
    """A golden image of a host that ran: machine id, identity and memory are the same, nobody can tell while etcd is
    away. Then one subnet has one owner, the other says what to do, and neither writes for ever."""
    first, second, _ = machines
    await client.put(f"{root}/config".encode(), CONFIG)
    scribe = Scribe(client, root)
    writing = asyncio.create_task(scribe.run())
    try:
        await first.start()
        await until(lambda: first.is_settled(scribe.held), what="a lease")
        await until(lambda: first.disk.exists(), what="the memory")
        await first.kill()
        second.clone(first)
        for machine in (first, second):
            machine.switch.point_nowhere()
            await machine.start()
        await until(lambda: first.own and second.own, what="both work from memory")
        assert first.own
        assert second.own
        assert first.own.key == second.own.key
        if ran_out:
            await client.delete(f"{root}/subnets/{first.own.key}".encode())
        for machine in (first, second):
            machine.switch.point_to(*machine.switch.home)
        await until(lambda: first.is_settled(scribe.held) and second.is_settled(scribe.held), what="one owner")
        assert [first.path.is_open, second.path.is_open].count(True) == 1
        [loser] = [machine for machine in (first, second) if not machine.path.is_open]
        assert "write another id" in str(loser.problem)
        written = len(scribe.changes)
        await until(lambda: len(scribe.changes) >= written + 3, what="renewals")
        assert len({change.after for change in scribe.changes[written:]}) == 1, "no fight"
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_two_clones_with_subnets_of_their_own_come_to_know_it_and_the_younger_gives_way(
    client: EtcdClient, root: str, host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    """Their MAC addresses are derived from one identity, so peers could not reach both."""
    first = host(attrs_of("192.0.2.1", "same", backend_type="vxlan", data=vtep(5)))
    await first.run(CONF)
    second = host(attrs_of("192.0.2.2", "same", backend_type="vxlan", data=vtep(5)))
    await second.run(CONF)
    await until(lambda: second.lost, what="the younger one's loss")
    assert "write another id" in str(second.lost)
    assert "192.0.2.1" in str(second.lost)
    assert first.lost is None
    assert caplog.text.count("identity used twice") == 1
    revision = first.own.revision
    kv = await first.key()
    assert kv is not None
    assert kv.mod_revision == revision  # one write is enough to be noticed


async def test_clones_that_peers_can_tell_apart_are_warned_of_and_go_on(
    host: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    first = host(attrs_of("192.0.2.1", "same", backend_type="host-gw"))
    await first.run(CONF)
    second = host(attrs_of("192.0.2.2", "same", backend_type="host-gw"))
    await second.run(CONF)
    await until(lambda: caplog.text.count("identity used twice") == 2)
    assert (first.lost, second.lost) == (None, None)


async def test_a_lease_that_another_host_got_while_ours_was_gone_is_moved_from(
    client: EtcdClient, root: str, host: Callable[..., Host]
) -> None:
    a = host()
    own = await a.run(CONF)
    await a.stop()
    await client.delete(f"{root}/subnets/{own.key}".encode())
    b = host(attrs_of("192.0.2.2", "id-b"))
    assert (await b.acquire(CONF, previous=str(own.lease.subnet))).key == own.key
    a.start(a._keep())
    await until(lambda: a.lost)
    assert "leasing another one" in str(a.lost)
    with pytest.raises(LeaseMoved, match="restart the containers"):
        await asyncio.wait_for(a.store.keep(lambda _: None), 10)
    assert a.store.own
    assert a.store.own.key != own.key


async def test_go_flanneld_elsewhere_with_our_address_is_not_fought(
    client: EtcdClient, root: str, host: Callable[..., Host]
) -> None:
    """Contract 3.20: it writes over whatever has its address; on another machine its tunnel end is another."""
    a = host(attrs_of("192.0.2.1", "id-a", backend_type="vxlan", data=vtep(1)))
    own = await a.run(CONF)
    taken_at = await client.put(f"{root}/subnets/{own.key}".encode(), encode_attrs(GO), await client.grant(60))
    await until(lambda: a.lost)
    assert "--public-ip" in str(a.lost)
    kv = await a.key()
    assert kv is not None
    assert kv.mod_revision == taken_at
