"""A cluster of both kinds: Go flanneld on some hosts, ours on others; every pair of pods pings at once.

Runs when ``FLANNELD_GO`` names a Go flanneld binary; without one it is skipped, and the skip says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.probe import egress_source, ping_matrix

GO = shutil.which(os.environ.get("FLANNELD_GO", ""))

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("vxlan", "iptables"),
    pytest.mark.skipif(not GO, reason="FLANNELD_GO names no Go flanneld binary"),
]

MakeLab = Callable[..., Lab]


def assert_connected(lab: Lab) -> None:
    for family in lab.spec.families:
        lost = {pair for pair, outcome in ping_matrix(lab, family).items() if outcome.lost}
        assert lost == set(), f"{family.label}, hosts with an odd number run Go flanneld"
        for host in lab.hosts:
            assert egress_source(lab, host.number, family) == host.address(family)


@pytest.mark.parametrize("page_ahead", [8192, 0], ids=["ahead", "on-demand"])
@pytest.mark.parametrize("ipv6", ["off", "on"])
def test_every_pair_of_a_mixed_vxlan_cluster_pings_first_packet_included(
    make_lab: MakeLab, ipv6: str, page_ahead: int
) -> None:
    lab = make_lab(4, ipv6=ipv6, backend={"Type": "vxlan", "PageAhead": page_ahead})
    for host in lab.hosts[::2]:
        host.daemon.command = (str(GO),)
    lab.up()
    assert_connected(lab)


@pytest.mark.parametrize("backend", ["host-gw", "udp"])
def test_every_pair_of_a_mixed_cluster_pings(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(4, backend={"Type": backend})
    for host in lab.hosts[::2]:
        host.daemon.command = (str(GO),)
    lab.up()
    assert_connected(lab)


def test_a_host_swapped_to_ours_and_back_keeps_subnet_and_traffic(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "vxlan"})
    swapped = lab.host(1)
    ours = swapped.daemon.command
    swapped.daemon.command = (str(GO),)
    lab.up()
    before = swapped.subnet_env()
    for command in (ours, (str(GO),)):
        swapped.daemon.stop()
        swapped.daemon.command = command
        swapped.daemon.start()
        swapped.daemon.wait_ready()
        assert swapped.subnet_env() == before
        assert_connected(lab)
