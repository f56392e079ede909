"""A host changes from Go flanneld to ours and back: same subnet and MAC, no lost ping, nothing doubled (contract 13.15).

Go's part is played by ``tests/support/go_state.py``, or by the binary that ``FLANNELD_GO`` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source, ping
from flanneld.lab.spec import SUBNETS_KEY
from flanneld.model.addr import Family
from tests.netns.test_end_to_end import Stream, until
from tests.support.go_state import go_flanneld, iptables_rules

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_go_ours_go_loses_no_ping_and_keeps_subnet_device_and_rules(make_lab: MakeLab, backend: str) -> None:
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
    there, back = Stream(lab), Stream(lab, source=2, target=1)
    go.stop()
    start_ours(swapped)
    assert lease_of(lab, swapped)["FlanneldID"], "ours runs"
    assert rules(swapped) == rules_of_go == expected_rules(swapped)
    swapped.daemon.stop()
    go.start()
    assert (there.lost(), back.lost()) == (0, 0)
    assert swapped.subnet_env() == env
    assert rules(swapped) == rules_of_go
    assert "FlanneldID" not in lease_of(lab, swapped), "Go runs again"
    if before:
        assert device(swapped) == before
    assert egress_source(lab, 1, Family.V4) == swapped.address()
