"""A host changes from Go flanneld to ours and back: same subnet, no lost ping, nothing doubled (contract 13.15).

Go's part is played by ``tests/support/go_state.py``, or by the binary that ``FLANNELD_GO`` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source, ping
from flanneld.lab.spec import SUBNETS_KEY, IPv6Mode
from flanneld.model.addr import Family
from tests.netns.test_cleanup import cleanup, with_peers
from tests.support.go_state import SimulatedGo, go_flanneld, iptables_rules
from tests.support.live import Stream, until
from tests.support.snapshot import differences, nft_rules, snapshot

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
BACKENDS = ["vxlan", "host-gw"]


def lease_of(lab: Lab, host: Host) -> dict[str, object]:
    key = SUBNETS_KEY + host.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
    value: dict[str, object] = json.loads(lab.etcd.get(key) or "{}")
    return value


def device(host: Host) -> tuple[int, str]:
    """Index and MAC of the vxlan device; it is the same one as long as both are."""
    [link] = json.loads(host.ip("-j", "link", "show", "flannel.1"))
    return link["ifindex"], link["address"]


def rules(host: Host) -> list[str]:
    """All rules of flannel's in both tables, those of the built-in chains too."""
    saved = host.run("iptables-save").stdout.splitlines()
    return sorted(line for line in saved if line.startswith("-A") and "flannel" in line.lower())


def expected_rules(host: Host) -> list[str]:
    env = host.subnet_env()
    network, subnet = env["FLANNEL_NETWORK"], env["FLANNEL_SUBNET"].replace(".1/", ".0/")
    return sorted(f"-A {rule}" for _table, _chain, rules in iptables_rules(network, subnet) for rule in rules)


def start_ours(host: Host) -> None:
    host.daemon.start()
    host.daemon.wait_ready()


@pytest.mark.parametrize("handover", [False, True], ids=["plain", "handed-over"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_go_ours_go_loses_no_ping_and_keeps_subnet_device_and_rules(
    make_lab: MakeLab, backend: str, handover: bool
) -> None:
    lab = make_lab(3, backend={"Type": backend})
    lab.up(daemons=False)
    swapped, *others = lab.hosts
    for host in others:
        start_ours(host)
    go = go_flanneld(lab, 1)
    go.start()
    lab.attach_pods()
    until(lambda: ping(others[0].pod, swapped.pod_address()).lost == 0, "the pods are connected")
    env, rules_of_go = swapped.subnet_env(), rules(swapped)
    before = device(swapped) if backend == "vxlan" else None
    left_by_go = snapshot(swapped)
    there, back = Stream(lab), Stream(lab, source=2, target=1)
    go.stop()
    start_ours(swapped)
    ping(swapped.pod, "10.244.250.1")  # an address that nobody leases, which is refused by a block
    assert lease_of(lab, swapped)["FlanneldID"], "ours runs"
    assert rules(swapped) == rules_of_go == expected_rules(swapped)
    swapped.daemon.stop()
    if handover:
        cleanup(swapped, "--handover", "--yes")
        left = [line for line in differences(left_by_go, snapshot(swapped)) if not line.startswith("files")]
        assert left == [], "nothing of ours"
    go.start()
    assert (there.lost(), back.lost()) == (0, 0)
    assert swapped.subnet_env() == env
    assert rules(swapped) == rules_of_go
    assert "FlanneldID" not in lease_of(lab, swapped), "Go runs again"
    if before:
        assert device(swapped) == before
    assert egress_source(lab, 1, Family.V4) == swapped.address()


def test_rules_of_nftables_are_taken_over_both_ways(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "vxlan"}, config={"EnableNFTables": True})
    lab.up(daemons=False)
    swapped = lab.host(1)
    start_ours(lab.host(2))
    go = go_flanneld(lab, 1)
    go.start()
    lab.attach_pods()
    of_go = nft_rules(swapped)
    go.stop()
    start_ours(swapped)
    assert egress_source(lab, 1, Family.V4) == swapped.address()
    assert nft_rules(swapped) != of_go, "ours masquerade what Go's do not (contract 8.16)"
    swapped.daemon.stop()
    go.start()
    assert [line for line in nft_rules(swapped) if "comment" not in line] == [
        line for line in of_go if "comment" not in line
    ]


@pytest.mark.parametrize("ipv6", ["off", "on"])
def test_a_device_that_ours_made_is_handed_over_so_that_go_keeps_it(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    """Ours asks for misses, which Go flanneld takes for another device and makes it anew (contract 6.12)."""
    lab = make_lab(2, backend={"Type": "vxlan"}, ipv6=ipv6)
    lab.up()
    swapped, other = lab.hosts
    _index, mac = device(swapped)
    swapped.daemon.stop()
    go = SimulatedGo(lab, 1)
    assert go.device_complaint() == "l2miss"
    stream = Stream(lab)
    done = cleanup(swapped, "--handover", "--yes")
    assert go.device_complaint() == ""
    for family in lab.spec.families:
        assert ping(swapped.pod, other.pod_address(family)).lost == 0
        assert ping(other.pod, swapped.pod_address(family)).lost == 0
    assert stream.lost() < 10, "a tenth of a second at most"
    assert "traffic stops for a moment" in done.stdout
    kept = device(swapped)
    if ipv6 == "off":
        go.start()
    assert device(swapped) == kept == (kept[0], mac)
    assert cleanup(swapped, "--handover", "--yes").stdout.startswith("nothing to hand over")


def test_routes_through_nexthop_objects_are_handed_over_as_plain_ones_that_go_can_delete(make_lab: MakeLab) -> None:
    """The kernel does not find a route through an object by its gateway, which is how Go flanneld deletes (6.25)."""
    lab = make_lab(2, backend={"Type": "host-gw"}, config={"SubnetMin": "10.244.200.0"})
    lab.up()
    swapped, other = lab.hosts
    with_peers(lab, 600)
    until(lambda: "nhid" in swapped.ip("route"), "routes go through objects")
    stream = Stream(lab)
    swapped.daemon.stop()
    cleanup(swapped, "--handover", "--yes")
    assert ("nhid" in swapped.ip("route"), swapped.ip("nexthop"), swapped.ip("route", "show", "proto", "86")) == (
        False,
        "",
        "",
    )
    assert swapped.ip("route").count("via 198.18.0.") > 600
    go = SimulatedGo(lab, 1)
    peers = go.peers()
    assert len(peers) == 601
    for peer in peers:
        if peer.address != other.address():
            go.remove_route(peer)
    assert stream.lost() == 0
    assert len(swapped.ip("route").splitlines()) == 4, "default, underlay, pods, and the one peer that is left"


@pytest.mark.needs("udp_kernel")
def test_the_udp_data_path_in_the_kernel_makes_room_for_gos(make_lab: MakeLab) -> None:
    """A TUN that stays, and programs that take its packets, would leave Go with a device without route (6.48)."""
    lab = make_lab(2, backend={"Type": "udp", "DataPath": "kernel"})
    lab.up()
    swapped = lab.host(1)
    before = rules(swapped)
    swapped.daemon.stop()
    assert "flannel0" in swapped.ip("link")
    cleanup(swapped, "--handover", "--yes")
    assert "flannel0" not in swapped.ip("link")
    assert "flanneld" not in swapped.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    assert rules(swapped) == before
    assert swapped.subnet_env()
