"""What we write into the kernel, read back by us and by iproute2, which knows nothing of our codec. Real kernel.

namespace fl-rt-…                      namespace fl-rt-peer-…
  eth0 198.18.0.1/24  ───── veth ─────  eth0 198.18.0.2/24
       2001:db8:18::1/64                     2001:db8:18::2/64
  flannel.1, flannel-v6.1: vxlan over eth0
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from backends.vxlan import Overlay, Peer
from flanneld.errors import KernelError
from flanneld.kernel import link_codec, route_codec
from flanneld.kernel.host_net import read_host_net
from flanneld.kernel.nlsocket import Socket
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import MAC, Family, Prefix, parse_ip, parse_mac
from flanneld.model.mtu import TunnelMTU
from flanneld.model.objects import (
    METRIC_VOID,
    PROTO_OURS,
    Address,
    Fdb,
    KernelObject,
    Link,
    Neighbour,
    Route,
    RouteKind,
    Sysctl,
    Vxlan,
)
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb, plan
from flanneld.plan.ownership import Ownership
from tests.support.netns import Netns, join

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vxlan")]

NETWORK = {Family.V4: Prefix.parse("10.244.0.0/16"), Family.V6: Prefix.parse("fd00:244::/48")}
OWN = {Family.V4: Prefix.parse("10.244.1.0/24"), Family.V6: Prefix.parse("fd00:244:0:1::/64")}
LOCAL = {Family.V4: parse_ip("198.18.0.1"), Family.V6: parse_ip("2001:db8:18::1")}
DEVICE = {Family.V4: "flannel.1", Family.V6: "flannel-v6.1"}
MAC1 = parse_mac("02:00:00:00:00:01")
MAC2 = parse_mac("02:00:00:00:00:02")
PEER = {
    Family.V4: Peer(Prefix.parse("10.244.2.0/24"), MAC2, parse_ip("198.18.0.2"), 0),
    Family.V6: Peer(Prefix.parse("fd00:244:0:2::/64"), MAC2, parse_ip("2001:db8:18::2"), 0),
}
OWNERSHIP = Ownership(
    frozenset(DEVICE.values()), "flanneld /x", tuple(NETWORK.values()), frozenset({24, 64}), underlay="eth0"
)

Scenario = Callable[[Rtnl], Coroutine[Any, Any, None]]


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fl-rt") as ns, Netns("fl-rt-peer") as other:
        join(ns, "eth0", other, "eth0")
        for number, host in enumerate((ns, other), 1):
            host.run("ip", "addr", "add", f"198.18.0.{number}/24", "dev", "eth0")
            host.run("ip", "addr", "add", f"2001:db8:18::{number}/64", "dev", "eth0", "nodad")
        yield ns


def play(ns: Netns, scenario: Scenario) -> None:
    async def inside() -> None:
        kernel = Rtnl()
        try:
            await scenario(kernel)
        finally:
            kernel.close()

    ns.exec_async(inside)


def overlay(family: Family, **vxlan: object) -> Overlay:
    """Built inside the namespace, where eth0 has its index."""
    lower = socket.if_nametoindex("eth0")
    settings = Vxlan(1, lower, LOCAL[family], 8472)._replace(**vxlan)  # type: ignore[arg-type]
    mtu = TunnelMTU(1450 if family is Family.V4 else 1430)
    return Overlay(family, DEVICE[family], MAC1, NETWORK[family], OWN[family], mtu, "eth0", OWNERSHIP.alias, settings)


def everything(family: Family) -> list[KernelObject]:
    half = overlay(family)
    return [*half.base_objects(), *half.peer_objects(PEER[family], "")]


def ops_for(objects: list[KernelObject]) -> list[Op]:
    """In writing order: a device is made, furnished and then set up."""
    ops = []
    for obj in objects:
        ops.append(Op(Verb.CREATE if isinstance(obj, Link) else Verb.PUT, obj))
    links = [Op(Verb.PUT, obj, obj._replace(up=False)) for obj in objects if isinstance(obj, Link)]
    first_route = next(at for at, op in enumerate(ops) if isinstance(op.obj, Route))
    return [*ops[:first_route], *links, *ops[first_route:]]


async def build(kernel: Rtnl, family: Family = Family.V4) -> list[KernelObject]:
    objects = everything(family)
    assert await kernel.apply(ops_for(objects)) == []
    return objects


def listed(ns: Netns, *argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ns.run(*argv) or "[]")
    return found


# ---- written, read back by us, and by iproute2 ---------------------------------------------------------


@pytest.mark.parametrize("family", Family)
def test_all_that_was_written_is_read_back_equal(ns: Netns, family: Family) -> None:
    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel, family)
        observed = await kernel.read(OWNERSHIP, [obj.path for obj in written if isinstance(obj, Sysctl)])
        assert [str(obj) for obj in written if obj not in observed] == []
        # what we do not own is what the kernel adds by itself: its own routes, link-local addresses
        ours = State.of(obj for obj in observed if OWNERSHIP.owns(obj) or isinstance(obj, Sysctl))
        assert str(ours) == str(State.of(written))

    play(ns, scenario)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("gbp", "learning"), [(False, False), (True, True)])
def test_iproute2_sees_the_device_of_contract_6_9(ns: Netns, family: Family, gbp: bool, learning: bool) -> None:
    async def scenario(kernel: Rtnl) -> None:
        half = overlay(family, gbp=gbp, learning=learning, vni=77, port=4789)
        assert await kernel.apply(ops_for(list(half.base_objects()))) == []

    play(ns, scenario)
    [link] = listed(ns, "ip", "-d", "-j", "link", "show", DEVICE[family])
    told = link["linkinfo"]["info_data"]
    local = {"local": "198.18.0.1"} if family is Family.V4 else {"local6": "2001:db8:18::1"}
    assert told.items() >= {"id": 77, "link": "eth0", "port": 4789, "learning": learning, **local}.items()
    # contract 6.9 and 6.4: all off or zero, UDP checksums on over IPv4 as the kernel has it by default
    assert told.get("gbp", False) is gbp
    assert not any(told.get(key) for key in ("proxy", "rsc", "l3miss", "udp_zero_csum6_tx", "udp_zero_csum6_rx"))
    assert told.get("tos", 0) == 0
    assert told.get("ttl", 0) in (0, "auto")
    assert told["udp_csum"] is True
    assert (link["address"], link["mtu"]) == ("02:00:00:00:00:01", 1450 if family is Family.V4 else 1430)
    assert (link.get("txqlen", 0), link["ifalias"], "UP" in link["flags"]) == (0, "flanneld /x", True)


@pytest.mark.parametrize("family", Family)
def test_iproute2_sees_the_entries_of_contract_6_15_and_6_16(ns: Netns, family: Family) -> None:
    async def scenario(kernel: Rtnl) -> None:
        await build(kernel, family)

    play(ns, scenario)
    device, peer = DEVICE[family], PEER[family]
    ip = ["ip", "-4" if family is Family.V4 else "-6", "-j", "-d"]
    [route] = listed(ns, *ip, "route", "show", str(peer.subnet))
    base = str(peer.subnet).partition("/")[0]
    told = {key: route.get(key) for key in ("dst", "gateway", "dev", "protocol", "flags", "type")}
    assert told == {
        "dst": str(peer.subnet),
        "gateway": base,
        "dev": device,
        "protocol": "boot",
        "flags": ["onlink"],
        "type": "unicast",
    }
    assert (route.get("metric"), route["scope"]) == (None if family is Family.V4 else 1024, "global")
    [covering] = listed(ns, *ip, "route", "show", str(NETWORK[family]))
    assert (covering["dev"], covering.get("gateway")) == (device, None)
    permanent = listed(ns, *ip, "neigh", "show", "dev", device, "nud", "permanent")
    assert [(e["dst"], e["lladdr"], e["state"]) for e in permanent] == [(base, "02:00:00:00:00:02", ["PERMANENT"])]
    fdb = [e for e in listed(ns, "bridge", "-j", "fdb", "show", "dev", device) if "dst" in e]
    assert [(e["mac"], e["dst"], e["flags"], e["state"]) for e in fdb] == [
        ("02:00:00:00:00:02", "198.18.0.2" if family is Family.V4 else "2001:db8:18::2", ["self"], "permanent")
    ]
    [shown] = listed(ns, "ip", "-j", "addr", "show", "dev", device)
    own = [(a["local"], a["prefixlen"]) for a in shown["addr_info"] if a["scope"] == "global"]
    assert own == [(str(OWN[family]).partition("/")[0], family.bits)]


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("kind", [RouteKind.BLACKHOLE, RouteKind.UNREACHABLE])
def test_a_route_to_nowhere_is_read_back_by_its_protocol(ns: Netns, family: Family, kind: RouteKind) -> None:
    block = Prefix.parse("10.244.128.0/17" if family is Family.V4 else "fd00:244:0:8000::/49")
    written = Route(block, "", kind=kind, proto=PROTO_OURS, metric=METRIC_VOID)

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel, family)
        assert await kernel.apply([Op(Verb.PUT, written)]) == []
        assert written in await kernel.read(OWNERSHIP, ())
        [told] = listed(ns, "ip", "-j", "-N", "-4" if family is Family.V4 else "-6", "route", "show", str(block))
        assert (told["type"], told["protocol"], told["metric"]) == (str(int(kind)), str(PROTO_OURS), METRIC_VOID)
        assert await kernel.apply([Op(Verb.DELETE, written)]) == []
        assert written not in await kernel.read(OWNERSHIP, ())

    play(ns, scenario)


@pytest.mark.parametrize("kind", ["blackhole", "prohibit", "unreachable", "throw"])
def test_a_route_to_nowhere_of_somebody_else_in_our_way_is_named(ns: Netns, kind: str) -> None:
    ns.run("ip", "route", "add", kind, "10.244.9.0/24")
    ours = Route(Prefix.parse("10.244.9.0/24"), "flannel.1", parse_ip("10.244.9.0"), onlink=True)

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel, Family.V4)
        await kernel.read(OWNERSHIP, ())
        [failure] = await kernel.apply([Op(Verb.PUT, ours)])
        assert f"route {kind} 10.244.9.0/24 of somebody else is in the way" in str(failure.error)
        assert listed(ns, "ip", "-j", "route", "show", "10.244.9.0/24")[0]["type"] == kind

    play(ns, scenario)


@pytest.mark.parametrize("family", Family)
def test_everything_written_can_be_deleted_and_deleting_it_again_is_no_failure(ns: Netns, family: Family) -> None:
    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel, family)
        entries = [obj for obj in reversed(written) if not isinstance(obj, Link | Sysctl)]
        for _ in range(2):
            assert await kernel.apply([Op(Verb.DELETE, obj) for obj in entries]) == []
        observed = await kernel.read(OWNERSHIP, ())
        assert [str(obj) for obj in observed if OWNERSHIP.owns(obj) and not isinstance(obj, Link)] == []
        device = next(obj for obj in written if isinstance(obj, Link))
        assert await kernel.apply([Op(Verb.DELETE, device)]) == []
        assert kernel.links().keys() == {"lo", "eth0"}

    play(ns, scenario)


@pytest.mark.parametrize("family", Family)
def test_putting_what_is_there_is_no_failure(ns: Netns, family: Family) -> None:
    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel, family)
        again = [Op(Verb.PUT, obj, obj if isinstance(obj, Link) else None) for obj in written]
        assert await kernel.apply(again) == []

    play(ns, scenario)


def test_a_device_is_changed_in_place_field_by_field(ns: Netns) -> None:
    async def scenario(kernel: Rtnl) -> None:
        first = next(obj for obj in await build(kernel) if isinstance(obj, Link))
        index = kernel.index("flannel.1")
        assert first.vxlan is not None
        was = first
        for change in (
            {"mtu": 1300},
            {"mac": parse_mac("02:00:00:00:00:77")},
            {"alias": "flanneld /y"},
            {"vxlan": first.vxlan._replace(local=parse_ip("198.18.0.2"))},
            {"vxlan": first.vxlan._replace(local=parse_ip("198.18.0.2"), learning=True)},
            {"up": False},
        ):
            want = was._replace(**change)
            assert await kernel.apply([Op(Verb.PUT, want, was)]) == []
            assert kernel.links()["flannel.1"] == want
            was = want
        assert socket.if_nametoindex("flannel.1") == index

    play(ns, scenario)


@pytest.mark.parametrize("family", Family)
def test_an_address_with_another_prefix_length_is_replaced_in_one_go_and_the_routes_stay(
    ns: Netns, family: Family
) -> None:
    """The kernel keeps an IPv6 address's length when told to add it with another, and drops all routes of a
    device with its last IPv4 address: so the order differs."""
    base, length = str(OWN[family]).split("/")

    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel, family)
        settings = [obj.path for obj in written if isinstance(obj, Sysctl)]
        ns.run("ip", "addr", "add", f"{base}/{length}", "dev", DEVICE[family], check=False)  # IPv6 refuses a second
        ns.run("ip", "addr", "del", f"{base}/{family.bits}", "dev", DEVICE[family])
        ns.run("ip", "addr", "replace", f"{base}/{length}", "dev", DEVICE[family])
        desired = State.of(written)
        ops = plan(desired, await kernel.read(OWNERSHIP, settings), OWNERSHIP)
        assert {type(op.obj) for op in ops} == {Address}
        assert await kernel.apply(ops) == []
        observed = await kernel.read(OWNERSHIP, settings)
        assert [str(op) for op in plan(desired, observed, OWNERSHIP)] == []
        assert [str(obj) for obj in written if obj not in observed] == []

    play(ns, scenario)


# ---- results and errors ------------------------------------------------------------------------------


def test_each_operation_of_a_batch_has_its_own_result_and_the_kernels_own_words(ns: Netns) -> None:
    good = [Route(Prefix.of_int((10 << 24 | 244 << 16) + (n << 8), 24, Family.V4), "eth0") for n in range(3, 200)]
    bad_route = Route(Prefix.parse("10.245.0.0/24"), "eth0", parse_ip("203.0.113.1"))
    bad_fdb = Fdb("flannel.1", parse_mac("01:00:00:00:00:01"), parse_ip("224.0.0.1"))
    bad_device = Neighbour("flannel.9", parse_ip("10.244.2.0"), MAC2)

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        objects: list[KernelObject] = [*good[:70], bad_route, *good[70:140], bad_device, bad_fdb, *good[140:]]
        failures = await kernel.apply([Op(Verb.PUT, obj) for obj in objects])
        codes = {failure.op.obj: failure.error.code for failure in failures}
        assert codes.keys() >= {bad_route, bad_device}
        assert codes[bad_device] == errno.ENODEV
        assert codes[bad_route] in (errno.EINVAL, errno.ENETUNREACH)
        [sentence] = [str(failure.error) for failure in failures if failure.op.obj == bad_route]
        assert "put route 10.245.0.0/24 via 203.0.113.1 dev eth0" in sentence
        assert "Nexthop has invalid gateway" in sentence  # net/ipv4/fib_semantics.c, by extended ACK
        observed = await kernel.read(OWNERSHIP, ())
        assert [str(route) for route in good if route not in observed.routes] == []

    play(ns, scenario)


@pytest.mark.parametrize("family", Family)
def test_somebody_elses_route_is_never_replaced_and_the_failure_names_it(ns: Netns, family: Family) -> None:
    subnet = "10.244.3.0/24" if family is Family.V4 else "fd00:244:0:3::/64"
    gateway = "198.18.0.2" if family is Family.V4 else "2001:db8:18::2"
    metric = 0 if family is Family.V4 else 1024
    ours = Route(Prefix.parse(subnet), DEVICE[family], None, metric=metric)

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel, family)
        ns.run("ip", "route", "add", subnet, "via", gateway, "proto", "static")
        await kernel.read(OWNERSHIP, ())
        [failure] = await kernel.apply([Op(Verb.PUT, ours)])
        assert failure.error.code == errno.EEXIST
        assert f"route {subnet} via {gateway} dev eth0" in str(failure.error)
        assert "dev eth0" in ns.run("ip", "-4" if family is Family.V4 else "-6", "route", "show", subnet)

    play(ns, scenario)


def test_a_setting_that_cannot_be_written_is_a_failure_of_that_operation_only(ns: Netns) -> None:
    wrong = Sysctl("net/ipv4/neigh/flannel.1/app_solicit", "many")
    missing = Sysctl("net/ipv4/neigh/flannel.9/app_solicit", "3")

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        right = Sysctl("net/ipv4/neigh/flannel.1/app_solicit", "5")
        failures = await kernel.apply([Op(Verb.PUT, obj) for obj in (wrong, missing, right)])
        assert {f.op.obj: f.error.code for f in failures} == {wrong: errno.EINVAL, missing: errno.ENOENT}
        assert (await kernel.read(OWNERSHIP, [right.path])).sysctls == {right.path: "5"}

    play(ns, scenario)


def test_a_kernel_that_cannot_be_asked_fails_the_operations_and_nobody_else(ns: Netns) -> None:
    """A closed socket stands for one that cannot send: no memory, or a sandbox that changed its mind."""

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        kernel.close()
        ops = [Op(Verb.PUT, obj) for obj in overlay(Family.V4).peer_objects(PEER[Family.V4], "")]
        failures = await kernel.apply(ops)
        assert {failure.op for failure in failures} == set(ops)

    play(ns, scenario)


def test_a_dump_of_a_device_that_is_gone_is_an_error_and_not_an_empty_table(ns: Netns) -> None:
    def inside() -> None:
        sock = Socket()
        try:
            with pytest.raises(KernelError) as caught:
                sock.dump_all(route_codec.dump_routes(Family.V4, ifindex=9999))
            assert caught.value.code == errno.ENODEV
        finally:
            sock.close()

    ns.call(inside)


def test_a_table_that_changes_under_a_dump_is_read_again(ns: Netns) -> None:
    """Addresses come and go between the datagrams of one dump; the kernel marks it (NLM_F_DUMP_INTR)."""
    count = 2000

    def inside() -> None:
        reader, writer = Socket(), Socket()
        index = socket.if_nametoindex("eth0")
        addresses = [Address("eth0", parse_ip(f"10.{n >> 8}.{n & 255}.1"), 32) for n in range(1, count + 1)]
        extra = Address("eth0", parse_ip("10.200.0.1"), 32)
        try:
            assert {code for code, _ in writer.batch([link_codec.address(a, index) for a in addresses])} == {0}
            parts = reader.dump(link_codec.dump_addresses())
            next(parts)
            writer.batch([link_codec.address(extra, index)])
            with pytest.raises(KernelError) as caught:
                list(parts)
            assert caught.value.code == errno.EINTR
            # nothing of the broken dump is mistaken for the next answer
            assert len(reader.dump_all(link_codec.dump_addresses())) >= count
            assert reader.batch([link_codec.address(extra, index)])[0][0] == 0
        finally:
            reader.close()
            writer.close()

    ns.call(inside)


def test_a_device_that_vanishes_while_it_is_read_costs_a_second_look(ns: Netns) -> None:
    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        reading = asyncio.ensure_future(kernel.read(OWNERSHIP, ()))
        for _ in range(3):
            await asyncio.sleep(0)  # the devices are listed, what is on them is not
        other = Rtnl()
        other.apply_now([Op(Verb.DELETE, kernel.links()["flannel.1"])])
        other.close()
        assert (await reading).links == {}

    play(ns, scenario)


# ---- questions ---------------------------------------------------------------------------------------


def test_onlink_names_the_device_of_addresses_reached_without_a_gateway_only(ns: Netns) -> None:
    ns.run("ip", "route", "add", "203.0.113.0/24", "via", "198.18.0.2")
    ns.run("ip", "route", "add", "blackhole", "192.0.2.0/24")
    addresses = [
        parse_ip(text)
        for text in ("198.18.0.2", "203.0.113.7", "192.0.2.7", "100.64.0.1", "198.18.0.1", "2001:db8:18::2")
    ]

    async def scenario(kernel: Rtnl) -> None:
        await kernel.read(OWNERSHIP, ())
        expected = {parse_ip("198.18.0.2"): "eth0", parse_ip("2001:db8:18::2"): "eth0"}
        assert kernel.onlink(addresses) == expected
        many = [parse_ip(f"198.18.0.{n}") for n in range(2, 250)]
        assert kernel.onlink(many) == dict.fromkeys(many, "eth0")

    play(ns, scenario)


def test_idle_seconds_grow_without_packets_and_start_again_with_one(ns: Netns) -> None:
    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        deadline = asyncio.get_running_loop().time() + 5
        while kernel.idle_s("flannel.1")[MAC2] < 0.2:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)
        sender.sendto(b"x", ("10.244.2.7", 9))
        sender.close()
        assert kernel.idle_s("flannel.1")[MAC2] < 0.1

    play(ns, scenario)


def test_only_answers_to_misses_are_told_as_such_and_only_open_questions_as_unresolved(ns: Netns) -> None:
    answer = Neighbour("flannel.1", parse_ip("10.244.2.9"), MAC2, permanent=False)

    async def scenario(kernel: Rtnl) -> None:
        await build(kernel)
        assert await kernel.apply([Op(Verb.PUT, answer)]) == []
        assert kernel.answered("flannel.1") == [answer]
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.sendto(b"x", ("10.244.77.7", 9))
        observed = await kernel.read(OWNERSHIP, ())
        assert list(observed.unresolved) == [("flannel.1", parse_ip("10.244.77.7"))]
        refusal = Neighbour("flannel.1", parse_ip("10.244.77.7"), MAC(b""), permanent=False)
        assert kernel.apply_now([Op(Verb.PUT, refusal)]) == []
        assert (await kernel.read(OWNERSHIP, ())).unresolved == {}
        sender.close()

    play(ns, scenario)


def test_the_host_net_is_what_iproute2_shows(ns: Netns) -> None:
    ns.run("ip", "route", "add", "default", "via", "198.18.0.2", "metric", "100")
    net = ns.call(read_host_net, [parse_ip("203.0.113.9")])
    shown = {link["ifname"]: (link["ifindex"], link["mtu"]) for link in listed(ns, "ip", "-j", "link")}
    assert {link.name: (link.ifindex, link.mtu) for link in net.links} == shown
    [default] = net.defaults
    assert (default.family, default.gateway, default.metric) == (Family.V4, parse_ip("198.18.0.2"), 100)
    eth0 = net.link("eth0")
    assert eth0 is not None
    assert {a.ip for a in net.addrs if a.ifindex == eth0.ifindex} >= {LOCAL[Family.V4], LOCAL[Family.V6]}
    reach = net.reach[parse_ip("203.0.113.9")]
    assert (reach.ifindex, reach.source) == (eth0.ifindex, LOCAL[Family.V4])


def test_devices_without_ipv6_and_with_a_small_mtu_are_read(ns: Netns) -> None:
    """The kernel takes IPv6 away from devices under 1280 bytes, and an operator may switch it off."""

    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel)
        for path in ("net/ipv6/conf/flannel.1/disable_ipv6", "net/ipv6/conf/all/disable_ipv6"):
            ns.run("sh", "-c", f"echo 1 > /proc/sys/{path}")
        assert [str(obj) for obj in written if obj not in await kernel.read(OWNERSHIP, ())] == [
            str(obj) for obj in written if isinstance(obj, Sysctl)
        ]
        device = kernel.links()["flannel.1"]
        assert await kernel.apply([Op(Verb.PUT, device._replace(mtu=1000), device)]) == []
        assert (await kernel.read(OWNERSHIP, ())).links["flannel.1"].mtu == 1000

    play(ns, scenario)


def test_a_forwarding_entry_with_a_port_of_its_own_is_seen_as_wrong_and_replaced(ns: Netns) -> None:
    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel)
        entry = next(obj for obj in written if isinstance(obj, Fdb))
        for how in ("port 4789", "vni 5", "via eth0"):
            ns.run(
                "sh", "-c", f"bridge fdb replace 02:00:00:00:00:02 dst 198.18.0.2 dev flannel.1 self permanent {how}"
            )
            assert entry not in await kernel.read(OWNERSHIP, ())
            assert await kernel.apply([Op(Verb.PUT, entry)]) == []
            assert entry in await kernel.read(OWNERSHIP, ())
        stranger = "02:00:00:00:00:55"
        ns.run("sh", "-c", f"bridge fdb add {stranger} dst 198.18.0.2 dev flannel.1 self permanent port 4789")
        observed = await kernel.read(OWNERSHIP, ())
        found = observed.fdb["flannel.1", parse_mac(stranger)]
        assert await kernel.apply([Op(Verb.DELETE, found)]) == []
        assert ("flannel.1", parse_mac(stranger)) not in (await kernel.read(OWNERSHIP, ())).fdb

    play(ns, scenario)


def test_a_forwarding_entry_that_names_nexthop_objects_is_seen_as_wrong_and_replaced(ns: Netns) -> None:
    """The kernel acknowledges a replacement of such an entry and leaves it as it is."""

    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel)
        settings = [obj.path for obj in written if isinstance(obj, Sysctl)]
        entry = next(obj for obj in written if isinstance(obj, Fdb))
        for command in (
            "ip nexthop add id 5 via 198.18.0.99 fdb",
            "ip nexthop add id 6 group 5 fdb",
            "bridge fdb del 02:00:00:00:00:02 dev flannel.1",
            "bridge fdb add 02:00:00:00:00:02 dev flannel.1 nhid 6 self",
            "bridge fdb add 02:00:00:00:00:55 dev flannel.1 nhid 6 self",
        ):
            ns.run(*command.split())
        observed = await kernel.read(OWNERSHIP, settings)
        assert observed.fdb.keys() == {("flannel.1", entry.mac), ("flannel.1", parse_mac("02:00:00:00:00:55"))}
        assert await kernel.apply(plan(State.of(written), observed, OWNERSHIP)) == []
        assert list((await kernel.read(OWNERSHIP, ())).fdb.values()) == [entry]

    play(ns, scenario)


def test_a_device_that_is_up_but_held_down_is_let_go_whatever_the_reason_given(ns: Netns) -> None:
    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel)
        settings = [obj.path for obj in written if isinstance(obj, Sysctl)]
        for command in ("protodown on", "protodown_reason 3 on"):
            ns.run("ip", "link", "set", "flannel.1", *command.split())
        ops = plan(State.of(written), await kernel.read(OWNERSHIP, settings), OWNERSHIP)
        assert next(str(op.was) for op in ops if isinstance(op.was, Link)).endswith("(protodown on)")
        assert await kernel.apply(ops) == []
        assert plan(State.of(written), await kernel.read(OWNERSHIP, settings), OWNERSHIP) == []
        assert "protodown" not in ns.run("ip", "-d", "link", "show", "flannel.1")

    play(ns, scenario)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        (Family.V4, "10.244.1.0/32 scope link"),
        (Family.V4, "10.244.1.0 peer 10.244.9.9/32"),
        (Family.V6, "fd00:244:0:1:: peer fd00:244:0:9::9/128 nodad"),
    ],
)
def test_our_address_put_back_as_another_kind_is_made_right_in_one_go(ns: Netns, family: Family, wrong: str) -> None:
    """The kernel would send from another address, or on a way of its own to the other end."""
    base, device = str(OWN[family]).split("/")[0], DEVICE[family]

    async def scenario(kernel: Rtnl) -> None:
        written = await build(kernel, family)
        settings = [obj.path for obj in written if isinstance(obj, Sysctl)]
        ns.run("ip", "addr", "del", f"{base}/{family.bits}", "dev", device)
        ns.run("ip", "addr", "add", *wrong.split(), "dev", device)
        # what went with the address is back, as after a repair that overlooked what kind of address it is
        await kernel.apply([Op(Verb.PUT, obj) for obj in written if isinstance(obj, Neighbour | Route)])
        desired = State.of(written)
        assert await kernel.apply(plan(desired, await kernel.read(OWNERSHIP, settings), OWNERSHIP)) == []
        observed = await kernel.read(OWNERSHIP, settings)
        assert [str(op) for op in plan(desired, observed, OWNERSHIP)] == []
        assert [str(obj) for obj in written if obj not in observed] == []
        [shown] = listed(ns, "ip", "-j", "-4" if family is Family.V4 else "-6", "addr", "show", device)
        [found] = [entry for entry in shown["addr_info"] if entry["local"] == base]
        assert (found["scope"], "address" in found) == ("global", False)

    play(ns, scenario)
