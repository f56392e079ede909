"""Many routes: through nexthop objects, and nothing of them left behind. Real kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from flanneld.contracts import Kernel
from flanneld.kernel import nexthops
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import IP, Prefix, format_ip
from flanneld.model.objects import PROTO_OURS, Route
from flanneld.plan.diff import Op, Verb
from flanneld.plan.ownership import Ownership
from tests.support.netns import Netns, join

pytestmark = pytest.mark.kernel

NETWORK = Prefix.parse("10.0.0.0/8")
OWN = Ownership(frozenset(), "", (NETWORK,), underlay="eth0")
COUNT = nexthops.THRESHOLD + 100


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fl-nh") as ns, Netns("fl-nh-peer") as other:
        join(ns, "eth0", other, "eth0")
        ns.run("ip", "addr", "add", "198.18.0.1/15", "dev", "eth0")
        yield ns


def routes(count: int, first_host: int = 2) -> list[Route]:
    base = int.from_bytes(bytes((198, 18, 0, first_host)), "big")
    return [
        Route(
            Prefix.of_int((10 << 24) + (n << 8), 24, NETWORK.family),
            "eth0",
            IP((base + n).to_bytes(4, "big")),
            proto=PROTO_OURS,
        )
        for n in range(count)
    ]


async def put(kernel: Kernel, wanted: list[Route]) -> None:
    observed = await kernel.read(OWN, ())
    old = {route.dst: route for route in observed.routes}
    assert await kernel.apply([Op(Verb.PUT, route, old.get(route.dst)) for route in wanted]) == []


def shown(ns: Netns) -> dict[str, str]:
    listed = json.loads(ns.run("ip", "-j", "route", "show", "proto", str(PROTO_OURS)))
    return {entry["dst"]: entry["gateway"] for entry in listed}


def test_readers_see_every_gateway_whether_through_an_object_or_not(ns: Netns) -> None:
    async def scenario() -> None:
        kernel = Rtnl()
        wanted = routes(COUNT)
        await put(kernel, wanted)
        assert shown(ns) == {str(r.dst): format_ip(r.gateway) for r in wanted if r.gateway}
        observed = await kernel.read(OWN, ())
        assert [r for r in wanted if r not in observed.routes] == []
        kernel.close()

    ns.exec_async(scenario)
    assert len(ns.run("ip", "nexthop").splitlines()) == 100


def test_deleting_leaves_neither_route_nor_object(ns: Netns) -> None:
    async def scenario() -> None:
        kernel = Rtnl()
        wanted = routes(COUNT)
        await put(kernel, wanted)
        assert await kernel.apply([Op(Verb.DELETE, route) for route in wanted]) == []
        kernel.close()

    ns.exec_async(scenario)
    assert shown(ns) == {}
    assert ns.run("ip", "nexthop") == ""


def test_a_new_process_knows_the_objects_and_can_delete_through_them(ns: Netns) -> None:
    async def scenario() -> None:
        first, second = Rtnl(), Rtnl()
        wanted = routes(COUNT)
        await put(first, wanted)
        await second.read(OWN, ())
        assert await second.apply([Op(Verb.DELETE, route) for route in wanted]) == []
        first.close()
        second.close()

    ns.exec_async(scenario)
    assert shown(ns) == {}
    assert ns.run("ip", "nexthop") == ""


def test_a_changed_gateway_replaces_the_route_and_the_old_object_goes(ns: Netns) -> None:
    async def scenario() -> None:
        kernel = Rtnl()
        await put(kernel, routes(COUNT))
        moved = routes(COUNT, first_host=100)
        await put(kernel, moved)
        assert shown(ns) == {str(r.dst): format_ip(r.gateway) for r in moved if r.gateway}
        await kernel.read(OWN, ())
        kernel.close()

    ns.exec_async(scenario)
    used = ns.run("ip", "route").count("nhid")
    assert len(ns.run("ip", "nexthop").splitlines()) == used


def test_two_routes_through_one_gateway_share_an_object_and_one_may_go(ns: Netns) -> None:
    async def scenario() -> None:
        kernel = Rtnl()
        wanted = routes(COUNT)
        twin = wanted[-1]._replace(dst=Prefix.parse("10.200.0.0/24"))
        await put(kernel, [*wanted, twin])
        assert await kernel.apply([Op(Verb.DELETE, wanted[-1])]) == []
        kernel.close()

    ns.exec_async(scenario)
    assert "10.200.0.0/24" in shown(ns)
    assert len(shown(ns)) == COUNT


def test_an_object_left_by_a_crash_is_removed_by_the_next_look(ns: Netns) -> None:
    stray = ("nexthop", "add", "id", str(nexthops.FIRST_ID + 7), "via", "198.18.0.9", "dev", "eth0")
    ns.run("ip", *stray, "proto", str(PROTO_OURS))
    ns.run("ip", "nexthop", "add", "id", "7", "via", "198.18.0.9", "dev", "eth0")  # somebody else's
    ns.run("ip", "link", "add", "twin0", "type", "veth")
    ns.run("sh", "-c", "ip addr add 198.51.100.1/24 dev twin0; ip link set twin0 up; ip link set veth0 up")
    twin = ("nexthop", "add", "id", "8", "via", "198.51.100.9", "dev", "twin0")  # another of our kind, on its device
    ns.run("ip", *twin, "proto", str(PROTO_OURS))

    async def scenario() -> None:
        kernel = Rtnl()
        await kernel.read(OWN, ())
        kernel.close()

    ns.exec_async(scenario)
    left = ns.run("ip", "nexthop")
    assert [line.split()[:2] for line in left.splitlines()] == [["id", "7"], ["id", "8"]]
