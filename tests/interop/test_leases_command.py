"""``flannelctl leases`` against a real etcd, run as an operator runs it: on a host of a lab."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from flanneld.lab import Lab
from flanneld.lab.spec import SUBNETS_KEY

pytestmark = [pytest.mark.kernel, pytest.mark.etcd]

VXLAN = '{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}'


class Bench(NamedTuple):
    lab: Lab
    ttl_id: str

    def command(self, *words: str) -> list[str]:
        flannelctl = (sys.executable, "-m", "flanneld.ctl.main", "leases")
        return self.lab.host(1).command(*flannelctl, f"--etcd-endpoints={self.lab.etcd.endpoints}", *words)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=30)

    def put(self, key: str, value: str, reserve: bool = False) -> None:
        self.lab.etcd.put(SUBNETS_KEY + key, value, "" if reserve else self.ttl_id)


@pytest.fixture
def bench(make_lab: Callable[..., Lab]) -> Bench:
    lab = make_lab(1)
    lab.up(daemons=False)
    made = Bench(lab, lab.etcd.ctl("lease", "grant", "86400").split()[1])
    made.put("10.244.7.0-24", VXLAN % ("198.18.0.11", "02:00:00:00:00:07"))
    made.put("10.244.30.0-24", VXLAN % ("198.18.0.12", "02:00:00:00:00:30"), reserve=True)
    return made


def test_list_shows_every_lease_and_stars_our_own(bench: Bench) -> None:
    done = bench.run()
    _, ours, theirs = done.stdout.splitlines()
    assert done.returncode == 0
    assert ours.split()[:5] == ["*", "10.244.7.0/24", "198.18.0.11", "vxlan", "02:00:00:00:00:07"]
    assert ours.split()[5].startswith("23h")
    assert theirs.split() == ["10.244.30.0/24", "198.18.0.12", "vxlan", "02:00:00:00:00:30", "reserved", "-"]


def test_json_is_for_programs(bench: Bench) -> None:
    first, second = json.loads(bench.run("list", "-o", "json").stdout)
    assert (first["subnet"], first["own"], first["reservation"]) == ("10.244.7.0/24", True, False)
    assert 86300 < first["ttl_s"] <= 86400
    assert (second["subnet"], second["own"], second["ttl_s"]) == ("10.244.30.0/24", False, None)


def test_show_finds_a_lease_by_a_pods_address(bench: Bench) -> None:
    done = bench.run("show", "10.244.30.99")
    assert "public IP:    198.18.0.12" in done.stdout
    assert bench.run("show", "10.244.99.1").returncode == 1


def test_watch_tells_each_change_until_interrupted(bench: Bench) -> None:
    with subprocess.Popen(bench.command("watch", "-o", "json"), stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        try:

            def event() -> tuple[str, str]:
                assert watch.stdout is not None
                change = json.loads(watch.stdout.readline())
                return change["event"], change["subnet"]

            assert {event(), event()} == {("added", "10.244.7.0/24"), ("added", "10.244.30.0/24")}
            bench.put("10.244.7.0-24", VXLAN % ("198.18.0.11", "02:00:00:00:00:07"))
            assert event() == ("renewed", "10.244.7.0/24")
            bench.put("10.244.7.0-24", VXLAN % ("198.18.0.13", "02:00:00:00:00:07"))
            assert event() == ("changed", "10.244.7.0/24")
            bench.lab.etcd.delete(SUBNETS_KEY + "10.244.30.0-24")
            assert event() == ("removed", "10.244.30.0/24")
            watch.send_signal(signal.SIGINT)
            assert watch.wait(10) == 130
        finally:
            watch.kill()


def test_an_etcd_that_is_not_there_is_one_sentence_and_exit_1(bench: Bench) -> None:
    bench.lab.etcd.stop_member(1)
    done = bench.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert bench.lab.etcd.endpoints in done.stderr


@pytest.mark.parametrize(
    "words", [("lst",), ("show",), ("--etcd-endpoint=x",), ("-o", "yaml"), ("show", "10.0.0.0/40")]
)
def test_a_wrong_command_line_is_one_sentence_and_exit_2(words: tuple[str, ...]) -> None:
    argv = [sys.executable, "-m", "flanneld.ctl.main", "leases", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
