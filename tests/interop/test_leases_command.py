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
from tests.support.live import until

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


def test_list_says_how_many_subnets_are_free(bench: Bench) -> None:
    """Failures F27."""
    assert "253 of 255 subnets are free" in bench.run().stderr


class TestRelease:
    """Failures F27: two hundred leases of hosts that are gone, and no room for a new one."""

    def lease(self, bench: Bench, number: int, ttl_s: int) -> str:
        """A lease of a host that is gone; returns its subnet."""
        ttl_id = bench.lab.etcd.ctl("lease", "grant", str(ttl_s)).split()[1]
        bench.lab.etcd.put(
            f"{SUBNETS_KEY}10.244.{number}.0-24", VXLAN % (f"198.18.0.{number}", "02:00:00:00:00:99"), ttl_id
        )
        return f"10.244.{number}.0/24"

    def held(self, bench: Bench) -> set[str]:
        return {key.removeprefix(SUBNETS_KEY) for key in bench.lab.etcd.items(SUBNETS_KEY)}

    def test_it_shows_first_and_releases_with_yes(self, bench: Bench) -> None:
        subnet = self.lease(bench, 40, 50000)
        shown = bench.run("release", subnet)
        assert (shown.returncode, "198.18.0.40" in shown.stdout) == (0, True)
        assert "Nothing was released: add --yes if this host is gone for good" in shown.stderr
        assert "10.244.40.0-24" in self.held(bench)
        done = bench.run("release", "198.18.0.40", "10.244.30.0/24", "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"released {subnet} of 198.18.0.40" in done.stdout
        assert "released 10.244.30.0/24 of 198.18.0.12" in done.stdout, "a reservation, too"
        assert self.held(bench) == {"10.244.7.0-24"}

    def test_a_lease_that_was_just_written_is_a_living_hosts(self, bench: Bench) -> None:
        done = bench.run("release", "10.244.7.0/24", "--yes")
        assert done.returncode == 1
        assert "so it lives or did a moment ago" in done.stderr
        assert "10.244.7.0-24" in self.held(bench)

    def test_the_lease_of_a_host_that_lives_is_back_and_the_operator_hears_of_it(self, bench: Bench) -> None:
        host = bench.lab.host(1)
        host.daemon.start()
        host.daemon.wait_ready()
        # as old as it is when it is nearly due; the daemon took what lay there with its address for its own
        before = bench.lab.etcd.items(SUBNETS_KEY)["/coreos.com/network/subnets/10.244.7.0-24"]
        old = bench.lab.etcd.ctl("lease", "grant", "50000").split()[1]
        pid = host.daemon.pid
        host.daemon.signal(signal.SIGSTOP)
        bench.lab.etcd.put(SUBNETS_KEY + "10.244.7.0-24", before, old)
        with subprocess.Popen(
            bench.command("release", "10.244.7.0/24", "--yes"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as release:
            until(lambda: "10.244.7.0-24" not in self.held(bench), "it is released")
            host.daemon.signal(signal.SIGCONT)
            assert release.stdout is not None
            assert "back 10.244.7.0/24" in release.stdout.read()
            assert release.wait(10) == 1
        host.daemon.wait_ready()
        assert host.daemon.pid == pid

    def test_gc_takes_what_was_not_renewed_in_time_and_nothing_else(self, bench: Bench) -> None:
        for number, ttl_s in ((50, 86400), (51, 3500), (52, 3000), (53, 100)):
            self.lease(bench, number, ttl_s)
        listed = bench.run()
        assert listed.stderr.count("was not renewed in time") == 2
        shown = bench.run("gc")
        assert "add --yes if these hosts are gone for good" in shown.stderr
        assert len(self.held(bench)) == 6
        assert bench.run("gc", "--yes").returncode == 0
        assert self.held(bench) == {"10.244.7.0-24", "10.244.30.0-24", "10.244.50.0-24", "10.244.51.0-24"}
        assert "every lease was renewed in time" in bench.run("gc", "--yes").stderr
        assert "10.244.51.0/24" in bench.run("gc", "--subnet-lease-renew-margin=120").stdout


def test_an_etcd_that_is_not_there_is_one_sentence_and_exit_1(bench: Bench) -> None:
    bench.lab.etcd.stop_member(1)
    done = bench.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert bench.lab.etcd.endpoints in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("lst",),
        ("show",),
        ("--etcd-endpoint=x",),
        ("-o", "yaml"),
        ("show", "10.0.0.0/40"),
        ("release",),
        ("gc", "10.5.2.0/24"),
        ("list", "--yes"),
        ("release", "10.5.2.0/24", "--kube-subnet-mgr", "--kube-api-url=http://127.0.0.1:1"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_2(words: tuple[str, ...]) -> None:
    argv = [sys.executable, "-m", "flanneld.ctl.main", "leases", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
