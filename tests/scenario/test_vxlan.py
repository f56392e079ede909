"""vxlan on one host: leases come, change and go; the kernel's tables follow, to the letter.

Each state is leases plus the expected kernel text; states are walked in order, backwards and at random,
so that nothing depends on the way one came (style section 9).
"""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from flanneld.contracts import Kernel
from flanneld.model.addr import Prefix, parse_ip, parse_mac
from flanneld.model.lease import Lease
from flanneld.model.objects import PROTO_BOOT, PROTO_OURS, Address, Fdb, Link, Neighbour, Route, RouteKind, subject
from flanneld.plan.diff import Op, Verb
from tests.scenario.conftest import Stage
from tests.scenario.world import OWN_MAC, Host, base, peer, tunnelled
from tests.support.fake_kernel import FakeKernel

STATES: dict[str, tuple[list[Lease], str]] = {
    "no peers": ([], base()),
    "one peer": ([peer(2)], base(*tunnelled(2))),
    "three peers": ([peer(2), peer(3), peer(4)], base(*tunnelled(2), *tunnelled(3), *tunnelled(4))),
    "a peer with a new MAC": (
        [peer(2, mac="02:00:00:00:99:02"), peer(3)],
        base(*tunnelled(2, mac="02:00:00:00:99:02"), *tunnelled(3)),
    ),
    "a peer with a new address": ([peer(2, ip="198.18.0.77")], base(*tunnelled(2, ip="198.18.0.77"))),
    "a peer that moved to another subnet, both leases there": (
        [peer(2), peer(5, mac="02:00:00:00:00:02", ip="198.18.0.2")],
        base(*sorted({*tunnelled(2), *tunnelled(5, mac="02:00:00:00:00:02", ip="198.18.0.2")})),
    ),
    "a peer of another backend": ([peer(2), peer(3, backend="host-gw")], base(*tunnelled(2))),
    "a peer with our own address": ([peer(2, ip="198.18.0.1"), peer(3)], base(*tunnelled(3))),
    "a peer with our own MAC": ([peer(2, mac="02:00:00:00:00:01"), peer(3)], base(*tunnelled(3))),
    "two peers with one MAC, the younger counts": (
        [peer(2, revision=5), peer(3, mac="02:00:00:00:00:02", revision=9)],
        base(*tunnelled(3, mac="02:00:00:00:00:02")),
    ),
}


async def check(host: Host, name: str) -> None:
    leases, expected = STATES[name]
    host.lease(leases)
    await host.settle()
    assert await host.text() == expected, name


@pytest.mark.parametrize("look", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("order", ["forwards", "backwards", "random"])
def test_tables_equal_the_leases_whatever_the_way(stage: Stage, order: str, look: bool) -> None:
    names = list(STATES)
    seed = random.randrange(1 << 16)
    if order == "backwards":
        names.reverse()
    elif order == "random":
        names = random.Random(seed).choices(names, k=40)
    print(f"seed {seed}: {names}")

    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        for name in names:
            if look:
                host.wake("test")
            await check(host, name)

    stage.play(scenario)


def test_a_short_cycle_leaves_nothing_for_a_full_one(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        for name in [*STATES, *reversed(STATES)]:
            await check(host, name)
            before = await host.text()
            await host.look()
            assert await host.text() == before == STATES[name][1]

    stage.play(scenario)


def test_a_quiet_cycle_writes_nothing() -> None:
    kernel = FakeKernel({"eth0": True})

    async def scenario(kernel: FakeKernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "three peers")
        kernel.log.clear()
        await host.settle()
        assert kernel.log == []

    asyncio.run(scenario(kernel, 2))


def test_any_operation_may_fail_once_and_the_state_is_right_all_the_same() -> None:
    async def scenario() -> None:
        probe = FakeKernel({"eth0": True})
        await check(Host(probe, 2), "three peers")
        for number in range(len(probe.log)):
            kernel = FakeKernel({"eth0": True})
            kernel.break_number = number
            await check(Host(kernel, 2), "three peers")

    asyncio.run(scenario())


def test_killed_after_any_operation_and_restarted_with_other_leases_nothing_stale_remains() -> None:
    class KilledError(Exception):
        pass

    class Mortal(FakeKernel):
        lives = 1 << 30

        def _apply(self, op: Op) -> None:
            if self.lives == 0:
                raise KilledError
            self.lives -= 1
            super()._apply(op)

    async def die(kernel: Mortal, lives: int) -> bool:
        first = Host(kernel, 2)
        await check(first, "one peer")
        kernel.lives = lives
        try:
            await check(first, "a peer that moved to another subnet, both leases there")
            await check(first, "three peers")
        except KilledError:
            return True
        return False

    async def scenario() -> None:
        lives = 0
        while True:
            kernel = Mortal({"eth0": True})
            killed = await die(kernel, lives)
            kernel.lives = 1 << 30
            await check(Host(kernel, 2), "a peer with a new MAC")
            if not killed:
                assert lives >= 10
                return
            lives += 1

    asyncio.run(scenario())


def test_restart_with_other_leases_leaves_nothing_stale(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        first = Host(kernel, ifindex)
        await check(first, "three peers")
        second = Host(kernel, ifindex)
        await check(second, "one peer")

    stage.play(scenario)


def test_restart_with_the_same_leases_touches_nothing() -> None:
    async def scenario() -> None:
        kernel = FakeKernel({"eth0": True})
        await check(Host(kernel, 2), "three peers")
        kernel.log.clear()
        await check(Host(kernel, 2), "three peers")
        assert kernel.log == []

    asyncio.run(scenario())


def test_nothing_is_deleted_before_the_leases_are_known(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        await check(Host(kernel, ifindex), "three peers")
        again = Host(kernel, ifindex)
        await again.settle()  # its table is still empty and incomplete
        assert await again.text() == STATES["three peers"][1]

    stage.play(scenario)


def test_what_others_made_stays(stage: Stage) -> None:
    # neither on a device nor of our protocol: not even read
    blackhole_elsewhere = Route(Prefix.parse("10.244.201.0/24"), "", kind=RouteKind.BLACKHOLE)
    foreign = [
        Route(Prefix.parse("192.0.2.0/24"), "eth0", parse_ip("198.18.0.250")),
        Route(Prefix.parse("192.0.2.128/25"), "eth0", parse_ip("198.18.0.250"), proto=PROTO_OURS),  # a twin daemon's
        Route(
            Prefix.parse("10.244.200.0/26"), "eth0", parse_ip("198.18.0.250")
        ),  # in our network, but not a lease's size
        blackhole_elsewhere,
    ]

    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "no peers")
        assert await kernel.apply([Op(Verb.PUT, route) for route in foreign]) == []
        for leases in ([peer(2)], []):
            host.lease(leases)
            await host.settle()
        observed = await kernel.read(host.path.own._replace(networks=(Prefix.parse("0.0.0.0/0"),)), ())
        assert {route for route in foreign if route not in observed.routes} <= {blackhole_elsewhere}

    stage.play(scenario)
    if stage.ns is not None:
        assert "blackhole 10.244.201.0/24" in stage.sh("ip route")


def test_direct_routes_of_go_flanneld_without_a_lease_are_removed_and_with_one_replaced(stage: Stage) -> None:
    stale = Route(Prefix.parse("10.244.9.0/24"), "eth0", parse_ip("198.18.0.9"), proto=PROTO_BOOT)
    kept = Route(Prefix.parse("10.244.2.0/24"), "eth0", parse_ip("198.18.0.2"), proto=PROTO_BOOT)

    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "no peers")
        await kernel.apply([Op(Verb.PUT, stale), Op(Verb.PUT, kept)])
        host.wake("test")
        await check(host, "one peer")

    stage.play(scenario)


def test_a_device_of_another_vni_is_made_anew(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        want = host.path.desired.links["flannel.1"]
        assert want.vxlan is not None
        other = want._replace(up=False, vxlan=want.vxlan._replace(vni=77))
        assert await kernel.apply([Op(Verb.CREATE, other)]) == []
        await check(host, "one peer")

    stage.play(scenario)


def test_a_change_in_place_keeps_the_peers() -> None:
    """MTU and local address change on the live device; only a new MAC costs the neighbours."""

    async def scenario() -> None:
        kernel = FakeKernel({"eth0": True})
        host = Host(kernel, 2)
        await check(host, "one peer")
        kernel.log.clear()
        host.path.configure(host.path.ext._replace(mtu=1400, ip=parse_ip("198.18.0.99")))
        await host.look()
        assert [subject(op.obj)[:2] for op in kernel.log] == [("link", "flannel.1")]

    asyncio.run(scenario())


DAMAGE = {
    "device down": "ip link set flannel.1 down",
    "device deleted": "ip link del flannel.1",
    "device with a new MAC": "ip link set flannel.1 address 02:00:00:00:77:77",
    "addresses flushed": "ip addr flush dev flannel.1",
    "our address with a wider prefix beside": "ip addr add 10.244.1.0/24 dev flannel.1",
    "our address with a wider prefix instead": "ip addr flush dev flannel.1; ip addr add 10.244.1.0/24 dev flannel.1",
    "a foreign address": "ip addr add 192.0.2.5/24 dev flannel.1",
    "a foreign default route": "ip route add default dev flannel.1",
    "routes flushed": "ip route flush table main",
    "permanent neighbours flushed": "ip neigh flush dev flannel.1 nud permanent",
    "neighbour with a wrong MAC": "ip neigh replace 10.244.2.0 lladdr 02:00:00:00:66:66 nud permanent dev flannel.1",
    "neighbour not permanent": "ip neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 nud stale dev flannel.1",
    "forwarding entries flushed": "bridge fdb flush dev flannel.1",
    "forwarding entry with a wrong address": "bridge fdb replace 02:00:00:00:00:02 dst 198.18.0.99 dev flannel.1",
    "forwarding entry with a port of its own": (
        "bridge fdb replace 02:00:00:00:00:02 dst 198.18.0.2 dev flannel.1 port 4789"
    ),
    "forwarding entry to everybody": (
        "bridge fdb append 00:00:00:00:00:00 dst 198.18.0.98 dev flannel.1;"
        "bridge fdb append 00:00:00:00:00:00 dst 198.18.0.99 dev flannel.1"
    ),
    "a stranger's forwarding entry": "bridge fdb append 02:00:00:00:55:55 dst 198.18.0.99 dev flannel.1",
    "a route to the wrong host": "ip route replace 10.244.2.0/24 via 10.244.3.0 dev flannel.1 onlink",
    "a second route of the same metric": "ip route append 10.244.2.0/24 via 10.244.3.0 dev flannel.1 onlink",
    "a noarp neighbour with a wrong MAC": (
        "ip neigh replace 10.244.2.9 lladdr 02:00:00:00:66:66 nud noarp dev flannel.1"
    ),
    "a route that no lease covers": "ip route add 10.244.77.0/24 via 10.244.3.0 dev flannel.1 onlink",
    "alias changed": "ip link set flannel.1 alias mine",
    "MTU changed": "ip link set flannel.1 mtu 1300",
    "settings changed": "echo 0 > /proc/sys/net/ipv4/neigh/flannel.1/app_solicit",
    "another device of our name": "ip link del flannel.1; ip link add flannel.1 type bridge",
}


@pytest.mark.kernel
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_damage_is_undone_in_one_cycle(real_stage: Stage, damage: str) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "three peers")
        real_stage.sh(DAMAGE[damage])
        assert await host.text() != STATES["three peers"][1] or await host.unsettled()
        assert await host.look() == 1
        assert await host.text() == STATES["three peers"][1]

    real_stage.play(scenario)


def test_the_fake_loses_what_the_kernel_loses(stage: Stage) -> None:
    """Device down, new MAC, device deleted: the fake must forget exactly what the kernel forgets."""
    commands = {
        "down": lambda k: k.set_down("flannel.1"),
        "mac": lambda k: k.apply_now(
            [Op(Verb.PUT, k.state.links["flannel.1"]._replace(mac=parse_mac("02:00:00:00:77:77")))]
        ),
        "deleted": lambda k: k.delete_link("flannel.1"),
    }
    after: dict[str, str] = {
        "down": "address,fdb,link",
        "mac": "address,fdb,link,route",
        "deleted": "",
    }
    shell = {"down": DAMAGE["device down"], "mac": DAMAGE["device with a new MAC"], "deleted": DAMAGE["device deleted"]}

    async def scenario(kernel: Kernel, ifindex: int) -> None:
        for name in commands:
            host = Host(kernel, ifindex)
            await check(host, "one peer")
            if isinstance(kernel, FakeKernel):
                commands[name](kernel)
            else:
                stage.sh(shell[name])
            kinds = {line.split()[0] for line in (await host.text()).splitlines()}
            assert ",".join(sorted(kinds)) == after[name], name

    stage.play(scenario)


def test_adding_goes_from_the_ground_up_and_deleting_back() -> None:
    async def scenario() -> None:
        kernel = FakeKernel({"eth0": True})
        host = Host(kernel, 2)
        await check(host, "one peer")
        kinds = [type(op.obj) for op in kernel.log if "10.244.2" in str(op) or isinstance(op.obj, Link | Address | Fdb)]
        assert kinds == [Link, Address, Link, Fdb, Neighbour, Route]
        kernel.log.clear()
        await check(host, "no peers")
        assert [(op.verb, type(op.obj)) for op in kernel.log] == [
            (Verb.DELETE, Route),
            (Verb.DELETE, Neighbour),
            (Verb.DELETE, Fdb),
        ]

    asyncio.run(scenario())


def test_a_peers_mac_is_the_hosts_in_the_text(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "no peers")
        assert (await kernel.read(host.path.own, ())).links["flannel.1"].mac == OWN_MAC

    stage.play(scenario)


def test_mtu_and_local_address_change_together_on_the_live_device(stage: Stage) -> None:
    """The driver refuses an MTU beside its own settings; the device must not be made anew for that."""

    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        await check(host, "one peer")
        index = stage.sh("cat /sys/class/net/flannel.1/ifindex") if stage.ns else ""
        host.path.configure(
            host.path.ext._replace(mtu=1400, ip=parse_ip("198.18.0.1"), public_ip=parse_ip("198.18.0.1"))
        )
        host.path.reconfigure(host.path.conf, host.path.settings._replace(learning=True), host.path.ext)
        assert await host.look() == 1
        assert host.problem is None
        assert "mtu 1350" in await host.text()
        assert (stage.sh("cat /sys/class/net/flannel.1/ifindex") if stage.ns else "") == index

    stage.play(scenario)


def test_a_host_in_quarantine_reaches_no_peer_and_comes_back_as_it_was(stage: Stage) -> None:
    async def scenario(kernel: Kernel, ifindex: int) -> None:
        host = Host(kernel, ifindex)
        host.lease([peer(2), peer(3)])
        await host.settle()
        before = await host.text()

        host.path.isolate(True)
        await host.look()
        assert await host.text() == base().replace("10.244.0.0/16 dev flannel.1", "unreachable 10.244.0.0/16")
        host.lease([peer(2), peer(3), peer(4)])
        await host.settle()
        assert "10.244.4.0" not in await host.text()  # news of peers change nothing
        host.lease([peer(2), peer(3)])
        await host.settle()

        host.path.isolate(False)
        await host.look()
        assert await host.text() == before

    stage.play(scenario)


# ---- what is told of repairs ---------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return sorted(
        line for record in caplog.records if (line := record.getMessage().partition(", after")[0])[:8] == "restored"
    )


def test_what_an_answer_to_a_miss_has_put_back_before_the_full_look_is_told_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        host = Host(FakeKernel({"eth0": True}), 2)
        host.lease([peer(2)])
        await host.settle()
        await host.look()
        route = next(r for r in host.path.desired.routes if r.gateway)
        host.reconciler.damaged(route, None)  # gone, and by now there again
        with caplog.at_level(logging.INFO):
            await host.look()
        assert told(caplog) == [f"restored {route}: it was gone"]

    asyncio.run(scenario())


@pytest.mark.parametrize("broken", [0, 1])
def test_each_entry_is_told_once_when_a_short_cycle_fails_half_way(
    caplog: pytest.LogCaptureFixture, broken: int
) -> None:
    async def scenario() -> None:
        kernel = FakeKernel({"eth0": True})
        host = Host(kernel, 2)
        host.lease([peer(2)])
        await host.settle()
        await host.look()
        entries: list[Fdb | Neighbour] = [*host.path.desired.fdb.values(), *host.path.desired.neighbours.values()]
        for entry in entries:
            kernel.state.discard(entry)
            host.reconciler.damaged(entry, None)
        kernel.break_number = len(kernel.log) + broken
        with caplog.at_level(logging.INFO):
            await host.settle()
        assert told(caplog) == sorted(f"restored {entry}: it was gone" for entry in entries)

    asyncio.run(scenario())
