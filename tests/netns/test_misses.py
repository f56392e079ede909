"""Demand paging on a real kernel: what the kernel asks for is answered, and nothing is lost meanwhile.

The bed is drawn in ``tests/support/miss_bed.py``: our components on one host, a peer made with iproute2.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from typing import TypeVar

import pytest

from flanneld.kernel.listen import SO_RCVBUFFORCE
from flanneld.model.addr import Prefix, parse_ip
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.model.objects import RouteKind
from tests.scenario.world import peer
from tests.support.miss_bed import CONTAINER, Bed, peers, play, received, receiver
from tests.support.wait import until

T = TypeVar("T")

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vxlan")]


def only(things: Iterable[T]) -> T:
    [thing] = things
    return thing


def more(arrived: list[int], sock: socket.socket) -> list[int]:
    """What has arrived by now."""
    arrived += received(sock)
    return arrived


def sent(bed: Bed, target: str, numbers: range) -> None:
    """Numbered datagrams from our host, as fast as they go."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        for number in numbers:
            sock.sendto(str(number).encode(), (target, 9))


def test_the_first_packet_to_a_peer_that_is_not_in_the_tables_arrives() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 4))
        assert "10.244.2.0" not in await bed.sh("ip route; ip neigh")
        assert " 0% packet loss" in await bed.ping(CONTAINER, 3)
        tables = await bed.sh("ip route; ip neigh; bridge fdb show dev flannel.1")
        assert "10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink" in tables
        assert "10.244.3.0" not in tables

    play(scenario)


def test_a_thousand_packets_that_wait_for_one_answer_all_leave_in_order() -> None:
    """The queue is the device's ``unres_qlen_bytes``; the kernel's default would keep 256 of them."""

    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 2))
        sock = receiver(bed.other)
        sent(bed, CONTAINER, range(1000))  # the loop does not run meanwhile: nobody answers
        arrived: list[int] = []
        await until(lambda: len(more(arrived, sock)) == 1000, what="all datagrams arrive")
        assert arrived == list(range(1000))
        sock.close()

    play(scenario)


def test_an_address_that_nobody_leases_is_unreachable_within_100_ms_and_then_by_route() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 4))
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            begun = time.monotonic()
            with pytest.raises(OSError, match="Errno 113"):  # EHOSTUNREACH
                await asyncio.get_running_loop().sock_connect(sock, ("10.244.200.1", 80))
            assert time.monotonic() - begun < 0.1
        routes = await bed.sh("ip route")
        assert "unreachable 10.244.128.0/17 proto 86 metric 65535" in routes
        assert "10.244.200.1" not in await bed.sh("ip neigh show dev flannel.1 nud permanent")
        # the next one in that block does not even ask
        assert "received" not in await bed.ping("10.244.201.9")  # it cannot even send
        assert "10.244.201.9" not in await bed.sh("ip neigh show dev flannel.1")

    play(scenario)


def test_a_lease_that_comes_takes_its_place_in_a_void_at_once() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(3, 4))
        assert "100% packet loss" in await bed.ping()
        assert "unreachable 10.244.2.0/24" in await bed.sh("ip route")
        bed.host.lease(peers(2, 4))
        deadline = time.monotonic() + 5
        while "unreachable 10.244.2.0/24" in await bed.sh("ip route"):
            assert time.monotonic() < deadline
        assert " 0% packet loss" in await bed.ping()

    play(scenario)


def test_a_scan_of_the_whole_network_leaves_a_handful_of_routes_and_room_for_new_neighbours() -> None:
    """The kernel's neighbour table has 1024 places for what is not permanent, shared by all namespaces
    (gc_thresh3): whatever an answer leaves there must make room at once (failures F06)."""

    async def scenario(bed: Bed) -> None:
        others = [peer(number, ip="198.18.0.2") for number in range(3, 12)]
        await bed.begin(others)
        longest = 0.0
        task = asyncio.create_task(bed.scan("10.244.0.0/16"))
        while not task.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        assert await task < 10
        assert longest < 0.5, "the loop stood still"
        voids = [r for r in bed.path.desired.routes if r.kind is RouteKind.UNREACHABLE]
        assert {str(r.dst) for r in voids} >= {"10.244.128.0/17", "10.244.1.0/24"}
        assert len(voids) <= 16 * len(others)
        assert bed.host.problem is None
        bed.host.lease([peer(2), *others])
        while "unreachable 10.244.2.0/24" in await bed.sh("ip route"):
            pass
        assert " 0% packet loss" in await bed.ping(CONTAINER, 1)

    play(scenario)


def test_a_deleted_forwarding_entry_is_repaired_by_the_miss_alone() -> None:
    """An L2 miss loses its packet (failures 0.2), so this is the second line: the first is the notification."""

    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 2), hints=False)
        assert " 0% packet loss" in await bed.ping()
        await bed.sh("bridge fdb del 02:00:00:00:00:02 dev flannel.1")
        assert "02:00:00:00:00:02" not in await bed.sh("bridge fdb show dev flannel.1")
        await bed.ping(CONTAINER, 1)  # lost or not, it tells us
        assert " 0% packet loss" in await bed.ping(CONTAINER, 5)

    play(scenario)


@pytest.mark.parametrize("entry", ["neigh del 10.244.2.0 dev flannel.1", "route del 10.244.2.0/24"])
def test_a_deleted_neighbour_or_route_costs_no_packet_even_without_notifications(entry: str) -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 2), hints=False)
        assert " 0% packet loss" in await bed.ping()
        await bed.sh(f"ip {entry}")
        assert " 0% packet loss" in await bed.ping(CONTAINER, 5)
        assert bed.host.problem is None

    play(scenario)


def test_misses_are_answered_on_a_device_that_was_made_anew() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 3))
        sent(bed, "10.244.3.1", range(1))
        before = (await bed.sh("ip -o link show flannel.1")).partition(":")[0]
        await bed.sh("ip link del flannel.1")
        deadline = time.monotonic() + 5
        while (now := (await bed.sh("ip -o link show up dev flannel.1")).partition(":")[0]) in ("", before):
            assert time.monotonic() < deadline
        assert now != before
        assert " 0% packet loss" in await bed.ping(CONTAINER, 3)

    play(scenario)


def test_questions_asked_while_nobody_listened_are_answered_after_an_overrun() -> None:
    async def scenario(bed: Bed) -> None:
        bed.misses._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2048)
        await bed.begin(peers(2, 200), hints=False)
        sock = receiver(bed.other)
        for number in range(3, 200):  # fills the buffer; the loop does not run meanwhile
            sent(bed, f"10.244.{number}.9", range(1))
        sent(bed, CONTAINER, range(3))
        arrived: list[int] = []
        await until(lambda: len(more(arrived, sock)) == 3, 0.9, "answered before the kernel repeats")
        assert bed.overruns > 0
        sock.close()

    play(scenario)


def test_damage_whose_notifications_were_lost_is_repaired_after_the_overrun() -> None:
    async def scenario(bed: Bed) -> None:
        bed.hints._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2048)
        await bed.begin(peers(2, 100))
        before = await bed.host.text()
        assert before.count("fdb") == 99
        # in this thread: the loop does not run, so nobody takes the notifications
        bed.ns.run("sh", "-c", "ip route flush dev flannel.1; bridge fdb flush dev flannel.1")
        bed.ns.run("ip", "neigh", "flush", "dev", "flannel.1", "nud", "permanent")
        deadline = time.monotonic() + 5
        while await bed.host.text() != before:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert bed.overruns > 0

    play(scenario, page_ahead=1000)


def test_nothing_is_refused_before_the_leases_are_known() -> None:
    """The list of leases is there, but the loop has not taken it yet: the kernel keeps the packet and asks again."""

    async def scenario(bed: Bed) -> None:
        bed.host.lease([])
        await bed.host.settle()
        again = Bed(bed.ns, bed.other, 0, 300.0)
        try:
            again.host.lease(peers(2, 2))  # complete, and the first cycle has yet to come
            again.misses.start()
            ping = asyncio.create_task(bed.ping(CONTAINER, 1, "-W 3"))
            await until(lambda: bed.ns.run("ip", "neigh", "show", CONTAINER), what="the kernel asks")
            await asyncio.sleep(0.05)  # time in which the wrong answer would come
            await again.host.settle()
            assert " 0% packet loss" in await ping
        finally:
            again.stop()

    play(scenario)


def test_idle_peers_above_the_bound_are_paged_out_under_traffic_without_loss() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 9))
        for number in range(3, 10):
            sent(bed, f"10.244.{number}.1", range(1))
        sock = receiver(bed.other)
        resident = only(bed.path.pages.values()).resident
        await until(lambda: len(resident) == 7)
        stop = asyncio.Event()
        total = 0
        arrived: list[int] = []

        async def traffic() -> None:
            nonlocal total
            while not stop.is_set():
                sent(bed, CONTAINER, range(total, total + 20))
                total += 20
                more(arrived, sock)
                await asyncio.sleep(0.001)

        sender = asyncio.create_task(traffic())
        rounds = 0
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            bed.pager.reap("flannel.1")  # with a limit of 0 s even the busy peer goes, again and again
            rounds += 1
            await asyncio.sleep(0.02)
        stop.set()
        await sender
        await until(lambda: len(more(arrived, sock)) >= total, what=f"all {total} arrive")
        assert sorted(arrived) == list(range(total))
        assert rounds > 50
        assert not {f"10.244.{n}.0/24" for n in range(3, 10)} & {str(s) for s in resident}
        sock.close()

    play(scenario, idle_limit_s=0.0)


def test_a_busy_peer_is_never_paged_out() -> None:
    async def scenario(bed: Bed) -> None:
        await bed.begin(peers(2, 5))
        for number in range(3, 6):
            sent(bed, f"10.244.{number}.1", range(1))
        deadline = time.monotonic() + 5
        resident = only(bed.path.pages.values()).resident
        while len(resident) > 1 or "10.244.2.0/24" not in map(str, resident):
            await bed.ping()
            bed.pager.reap("flannel.1")
            assert time.monotonic() < deadline, list(map(str, resident))
        tables = await bed.sh("ip route; ip neigh show nud permanent; bridge fdb show dev flannel.1")
        assert "10.244.2.0" in tables
        assert "10.244.3.0" not in tables
        assert "02:00:00:00:00:03" not in tables

    play(scenario, idle_limit_s=0.4)


def test_paging_out_works_above_the_number_of_routes_from_which_nexthop_objects_are_used() -> None:
    async def scenario(bed: Bed) -> None:
        leases = [peer(2)]
        for number in range(800):
            subnet, host = (
                f"10.244.{16 + number // 16}.{number % 16 * 16}",
                f"198.18.{1 + number // 250}.{1 + number % 250}",
            )
            data = b'{"VNI":1,"VtepMAC":"02:00:00:01:%02x:%02x"}' % divmod(number, 256)
            leases.append(Lease(Prefix.parse(f"{subnet}/28"), None, LeaseAttrs(parse_ip(host), None, "vxlan", data)))
        bed.host.lease(leases)
        pages = only(bed.path.pages.values())
        await bed.host.settle()
        pages.page_ahead = 10
        bed.start(hints=False)
        assert len((await bed.sh("ip route show dev flannel.1 proto boot")).splitlines()) > 700
        bed.pager.reap("flannel.1")
        assert len((await bed.sh("ip route show dev flannel.1 proto boot")).splitlines()) < 20

    play(scenario, page_ahead=10_000, idle_limit_s=0.0)
