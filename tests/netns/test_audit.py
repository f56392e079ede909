"""What others do is told by ``flannelctl audit`` and ``status``; a program that never stops is held back and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from tests.support.live import Stream, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]


def ctl(host: Host, *words: str, check: int = 0) -> str:
    argv = [sys.executable, "-m", "flanneld.ctl.main", *words, f"--subnet-file={host.daemon.subnet_file}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert done.returncode == check, done.stderr
    return done.stdout or done.stderr


def audit(host: Host) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ctl(host, "audit", "-o=json").splitlines()]


def status(host: Host) -> dict[str, Any]:
    return json.loads(ctl(host, "status", "-o=json"))  # type: ignore[no-any-return]


def test_each_repair_is_kept_with_old_and_new_value_and_how_fast_it_was(make_lab: MakeLab) -> None:
    with make_lab(hosts=2) as lab:
        host = lab.host(1)
        assert "nothing had to be repaired" in ctl(host, "audit")
        host.run("ip", "link", "set", "flannel.1", "mtu", "1300")
        until(lambda: len(audit(host)) == 1, "the repair is kept")
        [entry] = audit(host)
        assert entry["kind"] == "link"
        assert "mtu 1450" in entry["what"]
        assert "mtu 1300" in entry["was"]
        assert 0 < entry["after_ms"] < 5000
        host.run("sh", "-c", "iptables -t nat -F FLANNEL-POSTRTG")
        host.daemon.subnet_file.unlink()
        until(lambda: {"link", "rules", "file"} <= status(host)["repairs"].keys(), "all three are counted")
        assert "its MTU was 1300, is 1450" in ctl(host, "audit", "-n=1000")
        shown = ctl(host, "status")
        assert "state      ready" in shown
        assert "1 link" in shown


def test_a_program_that_undoes_every_repair_is_held_back_named_and_shown(make_lab: MakeLab) -> None:
    with make_lab(hosts=3) as lab:
        host, second, _ = lab.hosts
        base = second.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/")
        stream = Stream(lab, target=3)
        loop = f"while ip route del {base} dev flannel.1 2>/dev/null || true; do :; done"
        vandal = subprocess.Popen(host.command("sh", "-c", loop))
        try:
            until(lambda: status(host)["state"] == "degraded", "the fight is noticed")
            [remark] = status(host)["remarks"]
            assert f"changes route {base}" in remark
            assert "stop that program" in remark
            assert host.daemon.ask("/readyz") == (200, f"flanneld is ready\n{remark}")
            assert f"remark     {remark}" in ctl(host, "status")
        finally:
            vandal.kill()
            vandal.wait()
        until(lambda: base in host.ip("route", "show", base), "the route is put right when its time has come")
        assert stream.lost() == 0, "who is not fought about is not harmed"
        assert len(audit(host)) < 60
        assert any(entry["by"] for entry in audit(host)), "the kernel told who did it"


@pytest.mark.needs("udp_kernel")
def test_a_filter_taken_off_the_udp_data_path_is_put_back_and_kept(make_lab: MakeLab) -> None:
    with make_lab(hosts=2, backend={"Type": "udp"}) as lab:
        host = lab.host(1)
        assert "kernel" in status(host)["data_path"]
        host.run("tc", "filter", "del", "dev", "eth0", "ingress")
        until(lambda: status(host)["repairs"] == {"data path": 1}, "the repair is counted")
        assert "filters and devices" in ctl(host, "audit")


def test_status_of_no_daemon_is_one_sentence(make_lab: MakeLab) -> None:
    with make_lab(hosts=1) as lab:
        host = lab.host(1)
        host.daemon.stop()
        assert "no flanneld answers at" in ctl(host, "status", check=1)
