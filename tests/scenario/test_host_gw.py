"""host-gw on one host: routes follow the leases and the kernel's own idea of who is on-link."""

from __future__ import annotations

import asyncio
import logging

import pytest

from backends.host_gw import TYPE, HostGwBackend
from flanneld.contracts import Kernel, Surroundings
from flanneld.errors import ConfigError
from flanneld.model.addr import Family, Prefix, parse_ip
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease, LeaseTable
from flanneld.model.lease_codec import encode_attrs, render_key
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import PROTO_OURS, Route
from flanneld.plan.diff import Op, Verb
from flanneld.reconcile import LEASES, Reconciler, Tell
from flanneld.wake import Wake
from tests.scenario.conftest import Stage
from tests.scenario.world import OWN, OWN_IP, peer
from tests.support.fake_kernel import FakeKernel

CONF = parse_netconf(b'{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}')
EXT = ExtIface("eth0", 2, 1500, OWN_IP, None, OWN_IP, None)


def gw(number: int, ip: str = "") -> Lease:
    return peer(number, ip=ip, backend=TYPE)


class Host:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        around = Surroundings(EXT, {Family.V4: OWN}, "flanneld /coreos.com/network", (), False)
        self.path = HostGwBackend(CONF).data_path(around)
        self.table = LeaseTable()
        self.wake = Wake()
        self.problem: str | None = None
        self.reconciler = Reconciler(kernel, self.path, self.table, self.wake, Tell(self.take))

    def take(self, problem: str | None) -> None:
        self.problem = problem

    async def settle(self, *leases: Lease, reason: str = LEASES) -> list[str]:
        """Take these leases for all there are; returns our routes as text."""
        self.table.replace_all({render_key(lease.subnet, None): lease for lease in leases}, 1)
        if isinstance(self.kernel, FakeKernel):
            on_link = [lease.attrs.public_ip for lease in leases if str(lease.attrs.where()).startswith("198.18.0.")]
            self.kernel.direct = {ip: "eth0" for ip in on_link if ip}
        self.wake(reason)
        for _ in range(8):
            reasons = await self.wake.wait(0)
            if not reasons.names:
                break
            await self.reconciler.cycle(reasons)
        observed = await self.kernel.read(self.path.own, ())
        return sorted(str(route) for route in observed.routes if self.path.own.owns(route))


def test_each_peer_gets_a_route_through_its_address_and_loses_it_with_the_lease(stage: Stage) -> None:
    async def scenario(kernel: Kernel, _ifindex: int) -> None:
        host = Host(kernel)
        assert await host.settle(gw(2), gw(3)) == [
            "route 10.244.2.0/24 via 198.18.0.2 dev eth0",
            "route 10.244.3.0/24 via 198.18.0.3 dev eth0",
        ]
        assert await host.settle(gw(3, ip="198.18.0.33")) == ["route 10.244.3.0/24 via 198.18.0.33 dev eth0"]
        assert await host.settle() == []

    stage.play(scenario)


def test_a_peer_beyond_a_router_is_refused_with_a_sentence_and_harms_nobody(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(kernel: Kernel, _ifindex: int) -> None:
        host = Host(kernel)
        with caplog.at_level(logging.WARNING):
            routes = await host.settle(gw(2), gw(3, ip="203.0.113.3"))
        assert routes == ["route 10.244.2.0/24 via 198.18.0.2 dev eth0"]

    stage.play(scenario)
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if "203.0.113.3" in line and "shares no segment" in line]


def test_a_strangers_route_in_the_way_is_named_and_left_alone(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Route(Prefix.parse("10.244.2.0/24"), "eth0", parse_ip("198.18.0.200"), proto=4)

    async def scenario(kernel: Kernel, _ifindex: int) -> None:
        host = Host(kernel)
        await host.settle()
        assert await kernel.apply([Op(Verb.PUT, stranger)]) == []
        with caplog.at_level(logging.ERROR):
            assert await host.settle(gw(2), gw(3)) == ["route 10.244.3.0/24 via 198.18.0.3 dev eth0"]
        assert host.problem is not None
        assert "10.244.2.0/24" in host.problem
        assert stranger in (await kernel.read(host.path.own, ())).routes
        await kernel.apply([Op(Verb.DELETE, stranger)])
        assert len(await host.settle(gw(2), gw(3), reason="underlay route")) == 2
        assert host.problem is None

    stage.play(scenario)


def test_routes_come_back_after_the_underlay_was_down(real_stage: Stage) -> None:
    async def scenario(kernel: Kernel, _ifindex: int) -> None:
        host = Host(kernel)
        before = await host.settle(gw(2), gw(3))
        real_stage.sh("ip link set eth0 down; ip link set eth0 up")
        assert await host.settle(gw(2), gw(3), reason="underlay link") == before

    real_stage.play(scenario)


def test_the_lease_carries_addresses_and_no_data() -> None:
    attrs = HostGwBackend(CONF).lease_attrs(EXT, "")
    assert encode_attrs(attrs) == b'{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"host-gw"}'


def test_a_public_address_that_is_not_the_interfaces_own_is_refused() -> None:
    away = EXT._replace(public_ip=parse_ip("203.0.113.9"))
    around = Surroundings(away, {Family.V4: OWN}, "", (), False)
    with pytest.raises(ConfigError, match=r"203\.0\.113\.9.*198\.18\.0\.1.*--public-ip"):
        HostGwBackend(CONF).data_path(around)


def test_own_routes_carry_our_protocol_so_that_a_restart_knows_them() -> None:
    async def scenario() -> None:
        kernel = FakeKernel({"eth0": True})
        await Host(kernel).settle(gw(2), gw(3))
        assert {route.proto for route in kernel.state.routes} == {PROTO_OURS}
        assert await Host(kernel).settle(gw(3)) == ["route 10.244.3.0/24 via 198.18.0.3 dev eth0"]

    asyncio.run(scenario())


def test_a_host_in_quarantine_has_no_peer_and_sends_nobodys_packets_to_the_router(stage: Stage) -> None:
    async def scenario(kernel: Kernel, _ifindex: int) -> None:
        host = Host(kernel)
        before = await host.settle(gw(2), gw(3))
        assert len(before) == 2
        host.path.isolate(True)
        assert await host.settle(gw(2), gw(3), reason="quarantine") == ["route unreachable 10.244.0.0/16"]
        assert await host.settle(gw(2), gw(3), gw(4)) == ["route unreachable 10.244.0.0/16"]
        host.path.isolate(False)
        assert await host.settle(gw(2), gw(3), reason="quarantine is over") == before

    stage.play(scenario)
