"""Leases on Kubernetes Nodes (contract section 9): real daemons, real packets, and the lab's API server.

::

    switch: API server .2 (TLS, the rights of our manifests)
       │
      h1 .11   h2 .12   h3 .13      flanneld --kube-subnet-mgr, NODE_NAME=h1 …; Nodes h1 … have pod CIDR 10.244.1.0/24 …
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source, ping
from flanneld.lab.spec import IPv6Mode
from tests.support.live import Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]
PREFIX = "flannel.alpha.coreos.com/"


def kube_lab(make_lab: MakeLab, hosts: int = 3, **spec: object) -> Lab:
    return make_lab(hosts, store="kube", **spec)


def announced(lab: Lab, number: int) -> dict[str, str]:
    """What flanneld has written on a Node, without the prefix."""
    written: dict[str, str] = lab.kube.node(number)["metadata"].get("annotations") or {}
    return {key.removeprefix(PREFIX): value for key, value in written.items() if key.startswith(PREFIX)}


def entries(host: Host) -> str:
    """All that a host's kernel knows of its peers."""
    neighbours = host.ip("neigh", "show", "dev", "flannel.1", "nud", "permanent")
    return host.ip("route") + neighbours + host.run("bridge", "fdb", "show", "dev", "flannel.1").stdout


def knows(host: Host, peer: Host) -> bool:
    return peer.address() in entries(host) or f"10.244.{peer.number}." in entries(host)


def forget(lab: Lab, number: int) -> None:
    """Delete a Node for good: its daemon is gone too, which would otherwise wait for it."""
    lab.host(number).daemon.kill()
    lab.kube.delete_node(number)


@pytest.mark.parametrize("ipv6", ["off", "on", "only"])
def test_every_pod_reaches_every_other_and_the_outside(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    lab = kube_lab(make_lab, ipv6=ipv6)
    lab.up()
    assert_all_pods_connected(lab)
    for family in lab.spec.families:
        assert egress_source(lab, 1, family) == lab.host(1).address(family)


def test_a_node_carries_the_contracts_annotations_and_condition(make_lab: MakeLab) -> None:
    """Contract 9.3, 9.17, 9.22."""
    lab = kube_lab(make_lab, 1)
    lab.up()
    written = announced(lab, 1)
    data = json.loads(written.pop("backend-data"))
    assert data["VNI"] == 1
    assert re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", data["VtepMAC"])
    kept = {"backend-type": "vxlan", "kube-subnet-manager": "true", "public-ip": lab.host(1).address()}
    assert {key: written.get(key) for key in kept} == kept
    [condition] = lab.kube.node(1)["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == (
        "NetworkUnavailable",
        "False",
        "FlannelIsUp",
    )
    assert lab.host(1).subnet_env()["FLANNEL_SUBNET"] == "10.244.1.1/24"


def test_a_deleted_nodes_entries_vanish_and_the_others_stay_connected(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab)
    lab.up()
    first, second, third = lab.hosts
    until(lambda: knows(first, third) and knows(second, third), "all hosts know each other")
    stream = Stream(lab)
    forget(lab, 3)
    until(lambda: not knows(first, third) and not knows(second, third), "the deleted Node is forgotten")
    assert stream.lost() == 0


def test_a_node_that_was_deleted_and_registers_again_takes_part_again(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab)
    lab.up()
    lab.kube.delete_node(3)
    until(lambda: not knows(lab.host(1), lab.host(3)), "the deleted Node is forgotten")
    lab.kube.add_node(3)
    until(lambda: knows(lab.host(1), lab.host(3)), "the Node is known again")
    until(lambda: ping(lab.host(1).pod, lab.host(3).pod_address()).lost == 0, "its pod is reached again")
    until(lab.host(3).daemon.is_ready, "its daemon is ready")


def test_a_node_that_joins_later_and_gets_its_pod_cidr_later_still_is_connected(make_lab: MakeLab) -> None:
    """Contract 9.14: Go flanneld ends with status 1 where there is no podCIDR yet."""
    lab = kube_lab(make_lab)
    lab.up(daemons=False)
    lab.kube.delete_node(3)
    early, late = lab.hosts[:2], lab.host(3)
    for host in early:
        host.daemon.start()
    for host in early:
        host.daemon.wait_ready()
        host.attach_pod()
    late.daemon.start()
    lab.kube.add_node(3, pod_cidrs=[])
    until(lambda: "node h3 has no IPv4 pod CIDR yet" in late.daemon.log(), "it says what it waits for")
    assert late.daemon.ask("/readyz") == (503, "flanneld is not ready yet\nwaiting for a lease")
    lab.kube.patch_node(3, {"spec": {"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24"]}})
    late.daemon.wait_ready()
    late.attach_pod()
    assert_all_pods_connected(lab)


def test_an_api_server_that_restarts_costs_no_ping_and_its_news_still_arrive(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab)
    lab.up()
    stream = Stream(lab)
    lab.kube.restart()
    forget(lab, 3)
    until(lambda: not knows(lab.host(1), lab.host(3)), "the deletion is learnt from the new server")
    assert stream.lost() == 0
    assert all(host.daemon.is_ready() for host in lab.hosts[:2])


def test_traffic_flows_while_the_api_server_is_down_and_what_it_missed_is_made_up(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab)
    lab.up()
    stream = Stream(lab)
    lab.kube.stop()
    until(lambda: "watch of nodes broken" in lab.host(1).daemon.log(), "the outage is logged")
    lab.host(2).daemon.kill()  # … and a daemon that starts without it leaves the data path alone
    lab.host(2).daemon.start()
    assert knows(lab.host(1), lab.host(3))
    lab.kube.start()
    forget(lab, 3)
    until(lambda: not any(knows(host, lab.host(3)) for host in lab.hosts[:2]), "the deletion is learnt")
    for host in lab.hosts[:2]:
        host.daemon.wait_ready()
    assert stream.lost() == 0


def test_a_hanging_api_server_costs_no_ping_and_is_followed_again_when_it_goes_on(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab)
    lab.up()
    stream = Stream(lab)
    lab.kube.pause()
    assert not lab.kube.is_serving()  # waits 5 s for it
    lab.kube.pause(False)
    forget(lab, 3)
    until(lambda: not knows(lab.host(1), lab.host(3)), "the deletion is learnt")
    assert stream.lost() == 0


def test_a_daemon_killed_and_started_again_writes_nothing_and_loses_no_ping(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab, 2)
    lab.up()

    def written() -> object:
        node = lab.kube.node(1)
        return announced(lab, 1), [c["lastTransitionTime"] for c in node["status"]["conditions"]]

    before, stream = written(), Stream(lab)
    lab.host(1).daemon.kill()
    lab.host(1).daemon.start()
    lab.host(1).daemon.wait_ready()
    assert stream.lost() == 0
    assert written() == before


def test_a_node_made_anew_with_another_pod_cidr_gives_its_host_that_subnet(make_lab: MakeLab) -> None:
    lab = kube_lab(make_lab, 2)
    lab.up()
    lab.kube.delete_node(2)
    lab.kube.add_node(2, ["10.244.77.0/24"])
    until(lambda: lab.host(2).subnet_env().get("FLANNEL_SUBNET") == "10.244.77.1/24", "subnet.env says the new one")
    until(lambda: "10.244.77.0/24" in entries(lab.host(1)), "the peer routes to it")
    until(lambda: "10.244.2.0/24" not in entries(lab.host(1)), "the peer has forgotten the old one")
    lab.host(2).attach_pod()
    until(lambda: ping(lab.host(1).pod, lab.host(2).pod_address()).lost == 0, "the pods are connected")


def test_the_lab_command_builds_shows_and_removes_it() -> None:
    def flannelctl(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flanneld.ctl.main", "lab", *argv], capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    name = "tkube"
    try:
        said = flannelctl("up", "--name", name, "--store=kube", "--hosts=2")
        assert "kubectl --kubeconfig=" in said
        [shown] = json.loads(flannelctl("status", "--name", name, "-o", "json"))
        assert shown["kube"] == "serving at https://198.18.0.2:6443"
        assert [host["subnet"] for host in shown["hosts"]] == ["10.244.1.1/24", "10.244.2.1/24"]
        assert "Kubernetes API serving at" in flannelctl("status", "--name", name)
    finally:
        flannelctl("down", "--name", name)


def test_the_demo_ends_well() -> None:
    argv = [sys.executable, "-m", "flanneld.ctl.main", "lab", "demo", "--name=tkubedemo", "--store=kube"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK in" in done.stdout
    assert re.search(r"h2 +10\.244\.2\.0/24 +vxlan +198\.18\.0\.12 .*False", done.stdout)
