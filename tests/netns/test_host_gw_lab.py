"""Routes to peers' own addresses as an operator sees them: host-gw, vxlan's DirectRouting, and alloc, which has none.

Contract sections 6C and 6H, 6.19. With two segments hosts take turns: 1 and 3 share one, 2 and 4 the other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source, full_size_ping, ping, ping_matrix
from flanneld.lab.spec import SUBNETS_KEY, IPv6Mode
from flanneld.lab.transfer import tcp_transfer, udp_transfer
from flanneld.model.addr import Family
from tests.support.live import Stream, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("iptables")]

MakeLab = Callable[..., Lab]
HOST_GW = {"Type": "host-gw"}


def subnet_of(host: Host) -> str:
    return host.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")


def route_to(host: Host, peer: Host) -> str:
    """The route to a peer's subnet, without the numbers that differ from run to run."""
    return host.ip("route", "show", subnet_of(peer)).strip()


def connected(source: Host, target: Host) -> bool:
    return ping(source.pod, target.pod_address()).lost == 0


def all_connected(lab: Lab, family: Family = Family.V4) -> bool:
    return not any(outcome.lost for outcome in ping_matrix(lab, family).values())


def says(host: Host, sentence: str, since: int = 0) -> bool:
    return sentence in host.daemon.log()[since:]


def move(host: Host, address: str) -> None:
    """Give a host another address, as its operator does: the default route goes with the old one."""
    host.ip("addr", "del", f"{host.address()}/24", "dev", "eth0")
    host.ip("addr", "add", f"{address}/24", "dev", "eth0")
    host.ip("route", "replace", "default", "via", "198.18.0.1")


# ---- host-gw ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipv6", ["off", "on", "only"])
def test_every_pod_reaches_every_other_without_a_tunnel(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    lab = make_lab(2, backend=HOST_GW, ipv6=ipv6)
    lab.up()
    for family in lab.spec.families:
        until(partial(all_connected, lab, family), "the pods are connected")
        size, outcome = full_size_ping(lab, 1, 2, family)
        assert (size, outcome.lost) == (1500, 0)
        assert tcp_transfer(lab, 1, 2, family).is_intact
        assert udp_transfer(lab, 2, 1, family, 200).is_intact
        assert egress_source(lab, 1, family) == lab.host(1).address(family)
    assert "flannel" not in lab.host(1).ip("link")


def test_leases_carry_type_and_address_alone(make_lab: MakeLab) -> None:
    """Contract 3.17."""
    lab = make_lab(1, backend=HOST_GW)
    lab.up()
    [value] = lab.etcd.items(SUBNETS_KEY).values()
    head = '{"PublicIP":"198.18.0.11","PublicIPv6":null,"BackendType":"host-gw","FlanneldID":'
    assert re.fullmatch(re.escape(head) + '"[0-9a-f]{32}"}', value)


def test_a_peer_behind_a_router_is_refused_with_a_sentence_and_the_others_are_unharmed(make_lab: MakeLab) -> None:
    lab = make_lab(4, backend=HOST_GW, segments=2)
    lab.up()
    for here, there, beyond in ((1, 3, 2), (2, 4, 1)):
        host, neighbour, remote = lab.host(here), lab.host(there), lab.host(beyond)
        until(partial(connected, host, neighbour), "neighbours are connected")
        refusal = f"lease {subnet_of(remote)} is at {remote.address()}, which shares no segment with this host"
        until(partial(says, host, refusal), "the log says which peer and why")
        assert host.daemon.log().count(refusal) == 1
        assert route_to(host, remote) == ""
        assert host.daemon.is_ready()


def test_a_peer_that_comes_to_share_the_segment_gets_its_route_and_loses_it_again(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend=HOST_GW, segments=2)
    lab.up()
    first, second = lab.hosts
    assert route_to(first, second) == ""
    join_segments(lab)
    for host, other in ((first, second), (second, first)):
        host.ip("route", "add", f"{other.address()}/32", "dev", "eth0")
    until(lambda: connected(first, second) and connected(second, first), "the pods are connected")
    for host, other in ((first, second), (second, first)):
        host.ip("route", "del", f"{other.address()}/32", "dev", "eth0")
    until(lambda: not route_to(first, second) and not route_to(second, first), "no route to a router's hosts is left")


def test_routes_are_back_when_the_underlay_is(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend=HOST_GW)
    lab.up()
    first, second = lab.hosts
    until(lambda: connected(first, second), "the pods are connected")
    before = route_to(first, second)
    first.ip("link", "set", "eth0", "down")
    until(lambda: not route_to(first, second), "the kernel has dropped its routes")
    first.ip("link", "set", "eth0", "up")
    first.ip("route", "replace", "default", "via", "198.18.0.1")
    until(lambda: connected(first, second) and connected(second, first), "the pods are connected again")
    assert route_to(first, second) == before
    until(first.daemon.is_ready, "the daemon is ready again")


def test_a_peer_at_a_new_address_is_followed(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend=HOST_GW)
    lab.up()
    first, second = lab.hosts
    move(first, "198.18.0.77")
    until(lambda: "via 198.18.0.77" in route_to(second, first), "the peer's route follows")
    until(lambda: connected(second, first) and connected(first, second), "the pods are connected again")
    assert first.address() not in second.ip("route")


def test_a_deleted_or_bent_route_is_put_right_while_a_ping_runs(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend=HOST_GW)
    lab.up()
    first, second = lab.hosts
    until(lambda: connected(first, second), "the pods are connected")
    before = route_to(first, second)
    for damage in (f"del {subnet_of(second)}", f"replace {subnet_of(second)} via 198.18.0.1"):
        logged, stream = len(first.daemon.log()), Stream(lab)
        first.ip("route", *damage.split())
        until(partial(says, first, "restored", logged), damage)
        assert route_to(first, second) == before
        assert stream.lost() <= 20, damage


def test_a_strangers_route_in_the_way_is_named_and_kept_and_gives_way_when_it_goes(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend=HOST_GW, config={"SubnetMin": "10.244.7.0", "SubnetMax": "10.244.8.0"})
    lab.up(daemons=False)
    first, second = lab.hosts
    for network in ("10.244.7.0/24", "10.244.8.0/24"):
        first.ip("route", "add", network, "via", "198.18.0.1", "proto", "static")
    second.daemon.start()
    second.daemon.wait_ready()
    theirs = subnet_of(second)
    first.daemon.start()
    until(partial(says, first, f"route {theirs} via 198.18.0.1 dev eth0 of somebody else is in the way"), "it is named")
    assert "proto static" in route_to_subnet(first, theirs)
    first.ip("route", "del", theirs, "proto", "static")
    until(lambda: f"via {second.address()}" in route_to_subnet(first, theirs), "ours takes the free place")
    first.daemon.wait_ready()


def route_to_subnet(host: Host, subnet: str) -> str:
    return host.ip("route", "show", subnet).strip()


def test_routes_stay_when_the_daemon_stops_and_go_when_their_leases_went_meanwhile(make_lab: MakeLab) -> None:
    """Contract 6.28; the second half is what Go flanneld does not do (6.6)."""
    lab = make_lab(3, backend=HOST_GW)
    lab.up()
    first, second, third = lab.hosts
    until(lambda: connected(first, second) and connected(first, third), "the pods are connected")
    stream = Stream(lab)
    first.daemon.stop()
    assert route_to(first, third) != ""
    gone = subnet_of(third)
    third.daemon.kill()
    assert lab.etcd.delete(SUBNETS_KEY + gone.replace("/", "-"))
    first.daemon.start()
    first.daemon.wait_ready()
    until(lambda: route_to_subnet(first, gone) == "", "no route to the lost lease is left")
    assert stream.lost() == 0


# ---- DirectRouting: the same routes beside a tunnel ------------------------------------------------


def join_segments(lab: Lab) -> None:
    """Make both segments one wire, so that a route may lead to the other's hosts without the router."""
    lab.switch.ip("link", "add", "left", "type", "veth", "peer", "name", "right")
    for port, bridge in (("left", "br0"), ("right", "br1")):
        lab.switch.ip("link", "set", port, "master", bridge, "up")


def entries(host: Host) -> dict[str, list[str]]:
    """What a host's tables hold of its peers."""
    fdb = json.loads(host.run("bridge", "-j", "fdb", "show", "dev", "flannel.1").stdout)
    return {
        "routes": sorted(
            line.strip() for line in host.ip("route").splitlines() if " via " in line and "10.244" in line
        ),
        "neighbours": sorted(host.ip("neigh", "show", "dev", "flannel.1", "nud", "permanent").splitlines()),
        "fdb": sorted(f"{entry['mac']} {entry['dst']}" for entry in fdb if "dst" in entry),
    }


def tunnelled(host: Host) -> set[str]:
    """Addresses to which a host's tunnel leads."""
    return {line.split()[1] for line in entries(host)["fdb"]}


@pytest.mark.needs("vxlan")
def test_direct_and_tunnelled_peers_stand_side_by_side_and_follow_the_routes(make_lab: MakeLab) -> None:
    """Contract 6.19; on no transition is anything left of what was before."""
    lab = make_lab(4, segments=2, backend={"Type": "vxlan", "DirectRouting": True})
    lab.up()
    first, second, third, fourth = lab.hosts

    def routes(expected: dict[Host, str]) -> bool:
        return all(expected[peer] in first.ip("route", "get", peer.pod_address()) for peer in expected)

    tunnel, at_once = "dev flannel.1", f"via {third.address()} dev eth0"
    until(lambda: routes({second: tunnel, third: at_once, fourth: tunnel}), "direct and tunnelled side by side")
    until(partial(all_connected, lab), "every pod reaches every other")
    assert tunnelled(first) == {second.address(), fourth.address()}
    before = {host.name: entries(host) for host in lab.hosts}

    first.ip("route", "add", f"{third.address()}/32", "via", "198.18.0.1")
    until(lambda: routes({second: tunnel, third: tunnel, fourth: tunnel}), "a neighbour behind a router is tunnelled")
    until(lambda: tunnelled(first) == {peer.address() for peer in (second, third, fourth)}, "with all it needs")
    until(lambda: connected(first, third), "and reached")
    first.ip("route", "del", f"{third.address()}/32")
    until(lambda: entries(first) == before["h1"], "the direct route is back, and nothing of the tunnel's stays")

    join_segments(lab)
    for host, other in ((first, second), (second, first)):
        host.ip("route", "add", f"{other.address()}/32", "dev", "eth0")
    direct = f"via {second.address()} dev eth0"
    until(lambda: routes({second: direct, third: at_once, fourth: tunnel}), "a peer without a router between is direct")
    until(lambda: tunnelled(first) == {fourth.address()}, "and not in the tunnel's tables any more")
    until(lambda: connected(first, second) and connected(second, first), "and reached")
    for host, other in ((first, second), (second, first)):
        host.ip("route", "del", f"{other.address()}/32")
    until(lambda: {host.name: entries(host) for host in lab.hosts} == before, "all is as it was")
    assert connected(first, second)


# ---- alloc -----------------------------------------------------------------------------------------


def test_alloc_leases_a_subnet_and_touches_neither_devices_nor_routes(make_lab: MakeLab) -> None:
    """Contract 3.17, 6.55."""
    lab = make_lab(2, backend={"Type": "alloc"}, ipv6="on")
    lab.up(daemons=False)
    host = lab.host(1)

    def tables() -> str:
        return host.ip("link") + host.ip("-4", "route") + host.ip("-6", "route")

    before = tables()
    lab.start_daemons()
    assert tables() == before
    for value in lab.etcd.items(SUBNETS_KEY).values():
        lease = json.loads(value)
        assert lease.keys() <= {"PublicIP", "PublicIPv6", "FlanneldID"}
    assert host.subnet_env()["FLANNEL_MTU"] == "1500"
    lab.attach_pods()
    assert egress_source(lab, 1, Family.V4) == host.address(Family.V4)
    assert "not used" not in host.daemon.log(), "others' leases are no news to alloc"
    host.daemon.stop()
    assert host.daemon.subnet_file.exists()


def test_the_demo_of_alloc_shows_what_it_is_and_ends_well() -> None:
    argv = [sys.executable, "-m", "flanneld.ctl.main", "lab", "demo", "--name=tdalloc", "--hosts=2", "--backend=alloc"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alloc leases subnets and moves no packets" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("every pod reached the outside.")
    assert "LOST" not in done.stdout
