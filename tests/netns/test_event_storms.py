"""Storms of kernel events that are none of our business, and some that are: little CPU, few lines, the right end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from tests.support.live import assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
BACKENDS = ["vxlan", "host-gw", "udp"]
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """Of a storm, to the daemon."""

    cpu_s: float
    lines: int


class Storm:
    """Measures what the daemon spends from its making on."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._before = self._now()

    def _now(self) -> Cost:
        fields = Path(f"/proc/{self._host.daemon.pid}/stat").read_text().rpartition(")")[2].split()
        return Cost((int(fields[11]) + int(fields[12])) / TICKS_A_SECOND, self._host.daemon.log().count("\n"))

    def cost(self) -> Cost:
        """So far, once the daemon is done with what it has heard."""
        last = self._now()
        while True:
            time.sleep(0.3)  # nothing tells from outside that it rests
            now = self._now()
            if now.cpu_s - last.cpu_s < 0.02:
                return Cost(now.cpu_s - self._before.cpu_s, now.lines - self._before.lines)
            last = now


def batch(host: Host, lines: list[str]) -> float:
    """Run many commands of ``ip``; seconds that it took."""
    began = time.monotonic()
    host.run("ip", "-force", "-batch", "-", stdin="\n".join(lines), timeout_s=120, check=False)
    return time.monotonic() - began


def foreign_routes(verb: str, count: int) -> list[str]:
    return [f"route {verb} 100.64.{n >> 8}.{n & 255}/32 dev eth0 proto static" for n in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_routes_of_others_cost_little_and_change_nothing(make_lab: MakeLab, backend: str) -> None:
    with make_lab(2, backend={"Type": backend}) as lab:
        host = lab.host(1)
        ours = host.ip("route", "show")
        storm = Storm(host)
        took_s = batch(host, foreign_routes("add", 10_000)) + batch(host, foreign_routes("del", 10_000))
        cost = storm.cost()
        print(f"\n{backend}: 20000 route events in {took_s:.1f} s: {cost.cpu_s:.2f} s of CPU, {cost.lines} lines")
        assert cost.cpu_s < 2.0
        assert cost.lines < 5
        assert host.ip("route", "show") == ours
        assert_all_pods_connected(lab)


@pytest.mark.parametrize("backend", BACKENDS)
def test_link_of_others_that_flaps_two_thousand_times_costs_little(make_lab: MakeLab, backend: str) -> None:
    with make_lab(2, backend={"Type": backend}) as lab:
        host = lab.host(1)
        host.ip("link", "add", "flap0", "type", "veth", "peer", "name", "flap1")
        host.ip("link", "set", "flap1", "up")
        storm = Storm(host)
        took_s = batch(host, ["link set flap0 up", "link set flap0 down"] * 1000)
        cost = storm.cost()
        print(f"\n{backend}: 2000 link changes in {took_s:.1f} s: {cost.cpu_s:.2f} s of CPU, {cost.lines} lines")
        assert cost.cpu_s < 0.25 * took_s + 1.0
        assert cost.lines < 5
        assert_all_pods_connected(lab)


@pytest.mark.parametrize("backend", BACKENDS)
def test_underlay_that_flaps_ends_with_everything_in_place(make_lab: MakeLab, backend: str) -> None:
    """Failures F15; a link that comes up again has lost its routes, the kernel tells of none of them."""
    with make_lab(3, backend={"Type": backend}) as lab:
        host = lab.host(1)
        storm = Storm(host)
        took_s = batch(host, ["link set eth0 down", "link set eth0 up"] * 50)
        host.run("ip", "route", "replace", "default", "via", "198.18.0.1", "dev", "eth0", "proto", "static")
        until(lambda: host.daemon.ask("/readyz") == (200, "flanneld is ready"), "it is ready again")
        assert_all_pods_connected(lab)
        cost = storm.cost()
        print(f"\n{backend}: 100 changes of eth0 in {took_s:.1f} s: {cost.cpu_s:.2f} s of CPU, {cost.lines} lines")
        assert cost.cpu_s < 3.0
        assert cost.lines < 250


@pytest.mark.parametrize("backend", BACKENDS)
def test_overrun_sockets_lose_no_damage(make_lab: MakeLab, backend: str) -> None:
    """Whoever does not get to run hears nothing of what is dropped; afterwards he has to look."""
    with make_lab(2, backend={"Type": backend}) as lab:
        host = lab.host(1)
        before = host.ip("route", "show")
        host.daemon.signal(signal.SIGSTOP)
        batch(host, foreign_routes("add", 10_000))
        host.run("sh", "-c", "ip link del flannel.1; ip link del flannel0; ip route flush proto 86; nft flush ruleset")
        batch(host, foreign_routes("del", 10_000))
        storm = Storm(host)
        host.daemon.signal(signal.SIGCONT)
        until(lambda: host.ip("route", "show") == before, "all routes are back")
        until(lambda: host.daemon.ask("/readyz") == (200, "flanneld is ready"), "it is ready")
        assert_all_pods_connected(lab)
        cost = storm.cost()
        print(f"\n{backend}: 20000 events overslept: {cost.cpu_s:.2f} s of CPU, {cost.lines} lines")
        assert cost.cpu_s < 2.0
        assert cost.lines < 40


def test_firewall_that_others_change_all_the_time_costs_little(make_lab: MakeLab) -> None:
    """kube-proxy of a busy cluster."""
    with make_lab(2) as lab:
        host = lab.host(1)
        host.run("nft", "add table ip busy; add chain ip busy c")
        storm = Storm(host)
        began = time.monotonic()
        for number in range(200):
            rules = "".join(f"add rule ip busy c ip daddr 100.64.{number}.{n} accept\n" for n in range(20))
            host.run("nft", "-f", "-", stdin="flush chain ip busy c\n" + rules)
        took_s = time.monotonic() - began
        cost = storm.cost()
        print(f"\n200 transactions of nft in {took_s:.1f} s: {cost.cpu_s:.2f} s of CPU, {cost.lines} lines")
        assert cost.cpu_s < 1.0
        assert cost.lines < 5
        assert_all_pods_connected(lab)
