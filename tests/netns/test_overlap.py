"""A cluster network that overlaps networks of the host: refused before anything is touched, waited for, told (F22).

The lab's underlay is 198.18.0.0/24 (a second segment: 198.18.1.0/24) with a default route.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY, POD_NETWORK, SUBNETS_KEY
from tests.netns.test_audit import status
from tests.support.live import Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
OVER_SIX = {"IPv6Network": "2001:db8:18::/48"}
VPN = "10.244.128.0/18"
VPN_OVERLAP = (
    f"Network {POD_NETWORK} contains {VPN}, a network of interface vpn0: packets to pods with such addresses go there"
)


def host_state(host: Host) -> str:
    """Devices, addresses, routes and rules of a host."""
    looks = ("ip -o link", "ip -o addr", "ip route", "ip -6 route", "iptables-save -t nat", "nft list ruleset")
    shown = [host.run(*look.split()).stdout for look in looks]
    return "\n".join(line for text in shown for line in text.splitlines() if not line.startswith(("#", ":")))


def add_vpn(host: Host) -> None:
    host.ip("link", "add", "vpn0", "type", "veth", "peer", "name", "far0")
    host.ip("addr", "add", VPN.replace(".0/", ".1/"), "dev", "vpn0")
    host.ip("link", "set", "vpn0", "up")


def warnings(host: Host) -> int:
    return sum(line.startswith("W") and VPN_OVERLAP in line for line in host.daemon.log().splitlines())


def refusal_of(host: Host) -> str:
    until(lambda: "--allow-overlap" in host.daemon.ask("/readyz")[1], "the refusal is shown")
    assert host.daemon.is_running(), "another configuration, or another host, may come"
    return host.daemon.ask("/readyz")[1]


@pytest.mark.parametrize(
    ("spec", "network"),
    [
        ({"config": {"Network": "198.18.0.0/16"}}, "Network 198.18.0.0/16"),
        ({"config": {"Network": "198.18.0.0/24"}}, "Network 198.18.0.0/24"),
        ({"config": {"Network": "198.18.0.0/16"}, "backend": {"Type": "host-gw"}}, "Network 198.18.0.0/16"),
        ({"config": {"Network": "198.18.0.0/16"}, "store": "kube"}, "Network 198.18.0.0/16"),
        ({"config": OVER_SIX, "ipv6": "only"}, "IPv6Network 2001:db8:18::/48"),
    ],
    ids=["around", "equal", "host-gw", "kube", "ipv6"],
)
def test_an_underlay_in_the_network_is_refused_before_anything_is_touched(
    make_lab: MakeLab, spec: dict[str, Any], network: str
) -> None:
    lab = make_lab(1, **spec)
    lab.up(daemons=False)
    host = lab.host(1)
    before = host_state(host)
    host.daemon.start()
    said = refusal_of(host)
    assert network in said
    assert "interface eth0" in said
    assert host_state(host) == before
    assert not host.daemon.subnet_file.exists()
    if lab.store is lab.etcd:
        assert lab.etcd.items(SUBNETS_KEY) == {}


def test_a_store_that_our_routes_would_take_away_is_named(make_lab: MakeLab) -> None:
    """etcd is on the first segment, the second host on another one: only the default route leads there."""
    lab = make_lab(2, segments=2, config={"Network": "198.18.0.0/24"})
    lab.up(daemons=False)
    host = lab.host(2)
    host.daemon.start()
    said = refusal_of(host)
    assert f"the etcd server {lab.etcd.endpoints}, reached through interface eth0: this host would lose it" in said


def test_a_network_that_is_moved_heals_a_refused_host_by_itself(make_lab: MakeLab) -> None:
    lab = make_lab(2, config={"Network": "198.18.0.0/16"})
    lab.up(daemons=False)
    for host in lab.hosts:
        host.daemon.start()
    for host in lab.hosts:
        refusal_of(host)
    assert lab.host(1).daemon.log().count("cannot start yet") == 1
    lab.etcd.put(CONFIG_KEY, json.dumps({"Network": POD_NETWORK, "Backend": {"Type": "vxlan"}}))
    for host in lab.hosts:
        host.daemon.wait_ready()
        assert host.daemon.log().count("external interface eth0 by") == 1, "said once, however often it was tried"
    lab.attach_pods()
    assert_all_pods_connected(lab)


def test_an_overlap_that_is_allowed_starts_and_is_told_in_the_log(make_lab: MakeLab) -> None:
    lab = make_lab(1, daemon_flags=("--allow-overlap",))
    lab.up(daemons=False)
    host = lab.host(1)
    add_vpn(host)
    host.daemon.start()
    host.daemon.wait_ready()
    assert status(host)["state"] == "ready"
    assert warnings(host) == 1


def test_another_network_that_comes_later_is_told_while_it_lasts_and_ends_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up()
    host = lab.host(1)
    assert status(host)["state"] == "ready"
    stream = Stream(lab)
    add_vpn(host)
    until(lambda: status(host)["remarks"] == [VPN_OVERLAP], "the overlap is told")
    assert status(host)["state"] == "degraded"
    host.daemon.stop()
    host.daemon.start()
    host.daemon.wait_ready()
    assert warnings(host) == 2, "once by each run"
    until(lambda: status(host)["remarks"] == [VPN_OVERLAP], "a host that serves the network is not turned away")
    host.ip("link", "del", "vpn0")
    until(lambda: status(host)["state"] == "ready", "it is over when the interface is gone")
    assert stream.lost() == 0


def test_a_changed_configuration_that_would_cut_the_host_off_is_not_taken(make_lab: MakeLab) -> None:
    subnet = {"SubnetMin": "198.19.7.0", "SubnetMax": "198.19.9.0"}
    lab = make_lab(2, config={"Network": "198.19.0.0/16", **subnet})
    lab.up()
    host = lab.host(1)
    host.ip("route", "flush", "proto", "kernel", "198.18.0.0/24")  # as on clouds with addresses of 32 bits
    lab.etcd.put(CONFIG_KEY, json.dumps({"Network": "198.18.0.0/15", **subnet, "Backend": {"Type": "vxlan"}}))
    until(lambda: "the old one is kept: Network 198.18.0.0/15 contains" in host.daemon.log(), "it is refused")
    assert "198.18.0.0/15" not in host.daemon.subnet_file.read_text()
