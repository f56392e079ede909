"""The lab itself, before any daemon: its cables, its outside world, and that it leaves nothing behind.

The overlay that a daemon would build is programmed by hand here, as contract 6.15 describes it, so a
failure of an end-to-end test that passes here is the daemon's.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.errors import ConfigError, Unavailable
from flanneld.lab import Lab, LabSpec, netns
from flanneld.lab.child import Child
from flanneld.lab.lab import names, remove
from flanneld.lab.probe import egress_source, full_size_ping, ping, ping_matrix
from flanneld.lab.spec import CONFIG_KEY, OUTSIDE, IPv6Mode
from flanneld.model.addr import Family

pytestmark = [pytest.mark.kernel, pytest.mark.etcd]

MakeLab = Callable[..., Lab]
MTU = {Family.V4: 1450, Family.V6: 1430}


def program_by_hand(lab: Lab) -> None:
    """What a daemon does: a vxlan device, and per peer FDB entry, neighbour and route; plus ``subnet.env``."""
    for family in lab.spec.families:
        for host in lab.hosts:
            mac = f"02:00:00:00:{family:02x}:{host.number:02x}"
            local = host.address(family)
            host.ip(*f"link add {_dev(family)} address {mac} type vxlan id 1 local {local} dev eth0".split(),
                    *f"dstport {8472 + family} nolearning".split())  # fmt: skip
            host.ip("link", "set", _dev(family), "mtu", str(MTU[family]), "up")
            host.ip("addr", "add", _base(host.number, family), "dev", _dev(family))
            for peer in lab.hosts:
                if peer is not host:
                    _program_peer(lab, host.number, peer.number, family)
    for host in lab.hosts:
        lines = {Family.V4: f"FLANNEL_SUBNET=10.244.{host.number}.1/24\n",
                 Family.V6: f"FLANNEL_IPV6_SUBNET=fd00:244:0:{host.number}::1/64\n"}  # fmt: skip
        mtu = min(MTU[family] for family in lab.spec.families)
        text = "".join(lines[family] for family in lab.spec.families) + f"FLANNEL_MTU={mtu}\n"
        host.daemon.subnet_file.write_text(text)


def _program_peer(lab: Lab, number: int, peer: int, family: Family) -> None:
    host, base, dev = lab.host(number), _base(peer, family), _dev(family)
    mac = f"02:00:00:00:{family:02x}:{peer:02x}"
    host.run("bridge", "fdb", "add", mac, "dev", dev, "dst", lab.host(peer).address(family), "self", "permanent")
    host.ip("neigh", "add", base, "lladdr", mac, "dev", dev, "nud", "permanent")
    length = 24 if family is Family.V4 else 64
    host.ip("route", "add", f"{base}/{length}", "via", base, "dev", dev, "onlink")


def _base(number: int, family: Family) -> str:
    return f"10.244.{number}.0" if family is Family.V4 else f"fd00:244:0:{number}::"


def _dev(family: Family) -> str:
    return "flannel.1" if family is Family.V4 else "flannel-v6.1"


@pytest.mark.needs("vxlan")
@pytest.mark.parametrize("ipv6", ["off", "on", "only"])
@pytest.mark.parametrize("segments", [1, 2])
def test_pods_reach_each_other_over_an_overlay_programmed_by_hand(
    make_lab: MakeLab, ipv6: IPv6Mode, segments: int
) -> None:
    lab = make_lab(3, ipv6=ipv6, segments=segments)
    lab.up(daemons=False)
    program_by_hand(lab)
    lab.attach_pods()
    for family in lab.spec.families:
        matrix = ping_matrix(lab, family, count=3)
        assert len(matrix) == 6
        assert {pair: outcome.lost for pair, outcome in matrix.items() if outcome.lost} == {}
        mtu = min(MTU[f] for f in lab.spec.families)
        size, outcome = full_size_ping(lab, 1, 2, family)
        assert (size, outcome.lost) == (mtu, 0)


@pytest.mark.needs("vxlan")
def test_a_packet_larger_than_the_subnet_files_mtu_does_not_pass_whole(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up(daemons=False)
    program_by_hand(lab)
    lab.attach_pods()
    assert ping(lab.host(1).pod, lab.host(2).pod_address(), size=1450 - 28, whole=True).lost == 0
    assert ping(lab.host(1).pod, lab.host(2).pod_address(), size=1451 - 28, whole=True).lost == 1


@pytest.mark.needs("nft")
@pytest.mark.parametrize("family", Family)
def test_the_outside_answers_a_pod_only_through_masquerade(make_lab: MakeLab, family: Family) -> None:
    lab = make_lab(1, ipv6="on")
    lab.up(daemons=False)
    host = lab.host(1)
    host.daemon.subnet_file.write_text(
        "FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\nFLANNEL_MTU=1450\n"
    )
    lab.attach_pods()
    assert ping(host, OUTSIDE[family]).lost == 0
    assert egress_source(lab, 1, family) is None

    table = "ip" if family is Family.V4 else "ip6"
    rules = f"table {table} t {{ chain c {{ type nat hook postrouting priority 100; oifname eth0 masquerade; }}; }}"
    host.run("nft", "-f", "-", stdin=rules)
    assert egress_source(lab, 1, family) == host.address(family)


@pytest.mark.parametrize("ipv6", ["off", "only"])
def test_hosts_of_both_segments_reach_every_etcd_member(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    lab = make_lab(2, ipv6=ipv6, segments=2, etcd_members=3)
    lab.up(daemons=False)
    for host in lab.hosts:
        for member in lab.etcd.members:
            assert ping(host, lab.spec.member_address(member)).lost == 0
    assert json.loads(lab.etcd.get(CONFIG_KEY) or "")["Backend"] == {"Type": "vxlan"}


def _put_when_there_is_a_leader(lab: Lab, key: str, value: str) -> None:
    """The member that died may have led; on a busy machine the election outlasts one etcdctl."""
    for _ in range(5):
        with contextlib.suppress(Unavailable):
            lab.etcd.put(key, value)
            return
    lab.etcd.put(key, value)


def test_etcd_serves_on_with_one_of_three_members_dead_and_the_dead_one_comes_back(make_lab: MakeLab) -> None:
    lab = make_lab(1, etcd_members=3)
    lab.up(daemons=False)
    lab.etcd.stop_member(1)
    _put_when_there_is_a_leader(lab, "/a", "1")
    assert not lab.etcd.is_running(1)
    lab.etcd.start_member(1)
    lab.etcd.wait_healthy()
    assert lab.etcd.get("/a") == "1"


def test_a_lab_leaves_no_namespace_process_or_file_behind(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up(daemons=False)
    spaces = netns.listing(lab.spec.prefix)
    pids = netns.pids(spaces)
    assert len(spaces) == len(lab.spec.nodes())
    assert pids  # etcd at least
    assert lab.down()
    assert netns.listing(lab.spec.prefix) == []
    assert [pid for pid in pids if Child.of(pid)] == []
    assert not lab.directory.exists()
    assert not lab.down()


def test_a_lab_of_a_killed_process_is_swept_away_by_the_next_one(make_lab: MakeLab) -> None:
    code = """if True:
        import time
        from flanneld.lab import Lab, LabSpec
        Lab(LabSpec("tcrash", hosts=1, ephemeral=True)).up(daemons=False)
        print("up", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == "up\n"
        finally:
            owner.kill()
    try:
        assert "tcrash" in names()
        etcd = netns.pids(netns.listing("fl-tcrash-"))
        make_lab(1).up(daemons=False)
        assert "tcrash" not in names()
        assert [pid for pid in etcd if Child.of(pid)] == []
    finally:
        remove("tcrash")


def test_a_lab_can_be_taken_down_when_its_files_are_gone(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.up(daemons=False)
    (lab.directory / "lab.json").unlink()
    assert lab.spec.name in names()
    assert remove(lab.spec.name)
    assert lab.spec.name not in names()


def test_interrupting_the_command_takes_the_lab_down(tmp_path: Path) -> None:
    waiting = tmp_path / "flanneld"
    waiting.write_text("#!/bin/sh\nsleep 60\n")
    waiting.chmod(0o755)
    argv = [sys.executable, "-m", "flanneld.ctl.main", "lab", "demo", "--name=tint", "--hosts=1", f"--daemon={waiting}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        try:
            # underlay and etcd are up when their lines are printed; what it does now is wait for the daemon
            for _ in range(3):
                command.stdout.readline()
            command.send_signal(signal.SIGINT)
            assert command.wait(10) == 130
        finally:
            command.kill()
            remove("tint")
    assert "tint" not in names()


def test_a_daemon_that_ends_is_reported_with_the_end_of_its_log(make_lab: MakeLab) -> None:
    lab = make_lab(1, daemon=("sh", "-c", "echo no such luck; exit 1"))
    with pytest.raises(Unavailable, match=r"(?s)daemon of h1 ended.*no such luck"):
        lab.up()
    assert lab.spec.name not in names()


@pytest.mark.parametrize("action", ["up", "demo"])
def test_without_the_extra_the_command_says_so_in_one_sentence(action: str) -> None:
    without = "import sys; sys.modules['pyroute2'] = None; from flanneld.ctl.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", without, "lab", action], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flannelctl: the lab needs pyroute2: install flanneld with its extra")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("store", ["etcd", "kube"])
def test_on_a_host_of_the_lab_flannelctl_finds_its_daemon_and_its_leases_by_itself(
    make_lab: MakeLab, store: str
) -> None:
    lab = make_lab(2, store=store)
    lab.up()
    flannelctl = [sys.executable, "-m", "flanneld.ctl.main"]
    on_host = [*flannelctl, "lab", "exec", "--name", lab.spec.name, "h2", *flannelctl]
    for command, said in (("status", f"public     {lab.host(2).address()}"), ("leases", lab.host(1).address())):
        done = subprocess.run([*on_host, command], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_two_labs_stand_side_by_side_but_not_under_one_name(make_lab: MakeLab) -> None:
    first, second = make_lab(1), make_lab(1)
    first.up(daemons=False)
    second.up(daemons=False)
    first.etcd.put("/who", "first")
    assert second.etcd.get("/who") is None
    with pytest.raises(ConfigError, match="exists already"):
        Lab(first.spec).up(daemons=False)
    assert ping(first.host(1), first.spec.member_address(1)).lost == 0


def test_another_process_finds_the_lab_by_its_name(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "vxlan", "PageAhead": 0}, daemon_flags=("--v=1",))
    lab.up(daemons=False)
    assert Lab.load(lab.spec.name).spec == lab.spec
    with pytest.raises(ConfigError, match="no lab 'tnone'"):
        Lab.load("tnone")


def test_the_machines_own_network_is_untouched(make_lab: MakeLab) -> None:
    def state() -> list[str]:
        commands = (["ip", "-br", "link"], ["ip", "route"], ["ip", "-6", "route"], ["nft", "list", "ruleset"])
        return [subprocess.run(argv, capture_output=True, text=True).stdout for argv in commands]

    before, forward = state(), Path("/proc/sys/net/ipv4/ip_forward").read_text()
    lab = make_lab(2, ipv6="on")
    lab.up(daemons=False)
    assert state() == before
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forward


@pytest.mark.parametrize(
    ("field", "value"), [("name", "a-b"), ("name", ""), ("hosts", 0), ("segments", 3), ("etcd_members", 2), ("mtu", 9)]
)
def test_a_lab_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=repr(value)):
        LabSpec(**{"name": "x", field: value})  # type: ignore[arg-type]
