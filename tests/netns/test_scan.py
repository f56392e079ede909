"""A container scans the whole pod network: the daemon answers on, the tables stay small, peers are reached."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.probe import ping
from flanneld.model.addr import Family
from tests.support.live import ON_DEMAND, until
from tests.support.miss_bed import SCAN

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]
CONNECT = """
import socket, sys, time
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
begun = time.monotonic()
with socket.socket(family, socket.SOCK_STREAM) as sock:
    sock.settimeout(5)
    try:
        sock.connect((sys.argv[1], 80))
        print("connected", 0)
    except OSError as error:
        print(error.errno, time.monotonic() - begun)
"""
EHOSTUNREACH = "113"


def resident_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def test_the_first_packet_of_a_host_itself_and_of_its_containers_arrives_in_both_families(make_lab: MakeLab) -> None:
    lab = make_lab(4, ipv6="on", backend=ON_DEMAND)
    lab.up()
    first = lab.host(1)
    for family in Family:
        assert ping(first, lab.host(2).pod_address(family)).lost == 0  # from the host
        assert ping(first.pod, lab.host(3).pod_address(family)).lost == 0  # forwarded
        assert ping(first.pod, lab.host(4).pod_address(family), size=4000).lost == 0  # in fragments


@pytest.mark.parametrize("family", Family)
def test_an_address_without_a_lease_is_unreachable_at_once_for_host_and_container(
    make_lab: MakeLab, family: Family
) -> None:
    lab = make_lab(2, ipv6="on", backend=ON_DEMAND)
    lab.up()
    first = lab.host(1)
    unleased = ["10.244.250.7", "10.244.251.7"] if family is Family.V4 else ["fd00:244:0:fa00::7", "fd00:244:0:fb00::7"]
    for node, address in zip((first.pod, first), unleased, strict=True):
        code, took = node.run(sys.executable, "-c", CONNECT, address).stdout.split()
        assert code == EHOSTUNREACH
        assert float(took) < 0.1
    flag = "-4" if family is Family.V4 else "-6"
    until(lambda: "unreachable" in first.ip(flag, "route"), "the block is closed by a route")
    assert first.ip(flag, "route").count("unreachable") <= 4


@pytest.mark.timeout(120)
def test_a_scan_by_a_container_leaves_the_daemon_responsive_small_and_at_work(make_lab: MakeLab) -> None:
    lab = make_lab(3, backend=ON_DEMAND)
    lab.up()
    first = lab.host(1)
    assert ping(first.pod, lab.host(2).pod_address()).lost == 0
    pid = first.daemon.pid
    assert pid is not None
    before_kib = resident_kib(pid)
    for _ in range(2):
        scan = subprocess.Popen(first.pod.command(sys.executable, "-c", SCAN, "10.244.0.0/16"))
        while scan.poll() is None:
            begun = time.monotonic()
            assert first.daemon.ask("/healthz")[0] == 200
            assert time.monotonic() - begun < 1
    assert scan.returncode == 0
    # three leased subnets of 65 536 addresses: a few gaps, each one route
    assert first.ip("route").count("unreachable") < 60
    assert len(first.ip("neigh", "show", "dev", "flannel.1").splitlines()) <= 1024
    assert ping(first.pod, lab.host(3).pod_address()).lost == 0
    assert ping(first.pod, lab.host(2).pod_address(), count=5).lost == 0
    assert resident_kib(pid) - before_kib < 6 * 1024
    assert first.daemon.is_ready()
    assert "ERROR" not in first.daemon.log()
