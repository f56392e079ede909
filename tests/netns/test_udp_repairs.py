"""What others do to programs and maps of the udp backend, beyond the faults: no traffic, and programs that go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.plan.fights import GAP_S
from tests.faults.bed import ask
from tests.netns.test_settings import cpu_s
from tests.support.live import until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("udp_kernel", "iptables")]

MakeLab = Callable[..., Lab]

EMPTY_MAPS = """
import contextlib, json, subprocess, sys, time
from flanneld.kernel.bpf import Loaded, Map

def maps():
    shown = json.loads(subprocess.check_output(["tc", "-j", "filter", "show", "dev", "flannel0", "egress"]))
    for number in (entry["options"]["prog"]["id"] for entry in shown if "prog" in entry.get("options", {})):
        with contextlib.closing(Loaded.by_id(number)) as program:
            yield from (Map.by_id(one) for one in program.info().map_ids)

peers = next(found for found in maps() if found.name == "flannel_peers")
while True:
    peers.delete(peers.keys())
    if sys.argv[1] == "once":
        break
    time.sleep(0.005)
"""
TAKE_FILTERS = "while :; do tc filter del dev flannel0 egress 2>/dev/null; sleep 0.01; done"


def status(host: Host) -> dict[str, Any]:
    return ask(host, "/status")[0]


def audit(host: Host) -> list[dict[str, Any]]:
    return ask(host, "/audit")


@contextmanager
def running(host: Host, *argv: str) -> Iterator[None]:
    vandal = subprocess.Popen(host.command(*argv))
    try:
        yield
    finally:
        vandal.kill()
        vandal.wait()


def test_emptied_maps_are_filled_again_without_a_packet_that_misses_them(make_lab: MakeLab) -> None:
    with make_lab(hosts=2, backend={"Type": "udp"}) as lab:
        host = lab.host(1)
        host.run(sys.executable, "-c", EMPTY_MAPS, "once")
        until(lambda: status(host)["repairs"] == {"data path": 1}, "the repair is counted")
        assert "restored 1 entries of the udp data path's maps" in audit(host)[0]["text"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("vandal", "about"),
    [((sys.executable, "-c", EMPTY_MAPS, "on and on"), "maps"), (("sh", "-c", TAKE_FILTERS), "filters and devices")],
    ids=["maps", "filters"],
)
def test_a_program_that_undoes_every_repair_is_held_back_named_and_costs_little(
    make_lab: MakeLab, vandal: tuple[str, ...], about: str
) -> None:
    with make_lab(hosts=2, backend={"Type": "udp"}) as lab:
        host = lab.host(1)
        with running(host, *vandal):
            until(lambda: status(host)["state"] == "degraded", "the fight is noticed")
            [remark] = status(host)["remarks"]
            assert f"changes the udp data path's {about} again and again" in remark
            assert host.daemon.is_ready()
            used, seen = cpu_s(host), audit(host)[-1]["seen"]
            until(lambda: audit(host)[-1]["seen"] > seen, "the next repair while it goes on")
            assert cpu_s(host) - used < 0.25 * (audit(host)[-1]["seen"] - seen)
        repairs = len(audit(host))
        assert repairs < 60
        until(lambda: len(audit(host)) > repairs, "it is put right when its time has come", 2 * GAP_S[1])
