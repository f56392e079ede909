"""Whole clusters: real daemons, a real etcd, real packets between pods. The topology is the lab's.

What one part promises is tested with that part; here stands what an operator sees of all of them together.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.probe import ping
from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY, IPv6Mode
from tests.support.live import DEADLINE_S, ON_DEMAND, Stream, assert_all_pods_connected, until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("vxlan", "iptables"),
]

MakeLab = Callable[..., Lab]
ONE_SUBNET = {"SubnetMin": "10.244.7.0", "SubnetMax": "10.244.7.0"}


@pytest.mark.parametrize(
    ("ipv6", "segments", "members"), [("off", 1, 1), ("on", 2, 1), ("only", 1, 3), ("off", 2, 3), ("on", 1, 3)]
)
@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, ON_DEMAND], ids=["ahead", "on-demand"])
def test_every_pod_reaches_every_other_and_the_outside(
    make_lab: MakeLab, backend: dict[str, object], ipv6: IPv6Mode, segments: int, members: int
) -> None:
    lab = make_lab(3, backend=backend, ipv6=ipv6, segments=segments, etcd_members=members)
    lab.up()
    assert_all_pods_connected(lab)


def test_a_packet_that_overtakes_the_news_of_its_senders_lease_is_not_lost(make_lab: MakeLab) -> None:
    """A new host's pod may speak before etcd's watch has told its peers; "no such lease" must not be said in haste."""
    lab = make_lab(2, backend=ON_DEMAND)
    lab.up(daemons=False)
    newcomer, peer = lab.hosts
    peer.daemon.start()
    peer.daemon.wait_ready()
    peer.attach_pod()
    assert ping(peer, peer.pod_address()).lost == 0  # the pod's own neighbours are known: only the overlay is new
    peer.daemon.signal(signal.SIGSTOP)
    newcomer.daemon.start()
    newcomer.daemon.wait_ready()
    newcomer.attach_pod()
    argv = ["ping", "-n", "-c", "1", "-W", "2", peer.pod_address()]
    with subprocess.Popen(newcomer.pod.command(*argv), stdout=subprocess.PIPE, text=True) as request:
        # the answer waits in the peer's kernel for a neighbour: a miss, queued beside the news from etcd
        until(lambda: "INCOMPLETE" in peer.ip("neigh", "show", "dev", "flannel.1"), "the answer is a miss")
        peer.daemon.signal(signal.SIGCONT)
        assert "1 received" in request.communicate(timeout=DEADLINE_S)[0]


@pytest.mark.needs("nft")
def test_nftables_masquerades_as_iptables_does(make_lab: MakeLab) -> None:
    lab = make_lab(2, ipv6="on", config={"EnableNFTables": True})
    lab.up()
    assert_all_pods_connected(lab)
    assert "masquerade" in lab.host(1).run("nft", "list", "ruleset").stdout


def test_direct_routing_uses_the_tunnel_only_across_the_router(make_lab: MakeLab) -> None:
    """Contract 6.19."""
    lab = make_lab(3, segments=2, backend={"Type": "vxlan", "DirectRouting": True})
    lab.up()
    assert_all_pods_connected(lab)
    neighbour, remote = lab.host(3), lab.host(2)
    assert "dev eth0" in lab.host(1).ip("route", "get", neighbour.pod_address())
    assert "dev flannel.1" in lab.host(1).ip("route", "get", remote.pod_address())


def test_subnet_env_and_lease_are_the_contracts_bytes(make_lab: MakeLab) -> None:
    """Contract 3.11, 3.16, 3.17, 3.19, 4.1, 13.2."""
    lab = make_lab(1, config=ONE_SUBNET)
    lab.up()
    host = lab.host(1)
    assert host.daemon.subnet_file.read_bytes() == (
        b"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    [device] = json.loads(host.ip("-j", "-d", "link", "show", "flannel.1"))
    assert list(lab.etcd.items(SUBNETS_KEY)) == [SUBNETS_KEY + "10.244.7.0-24"]
    value = lab.etcd.get(SUBNETS_KEY + "10.244.7.0-24") or ""
    flannels, _, ours = value.partition(',"FlanneldID":')
    assert flannels == (
        '{"PublicIP":"198.18.0.11","PublicIPv6":null,"BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{device["address"]}"}}'
    )
    assert re.fullmatch(r'"[0-9a-f]{32}"\}', ours)
    [stored] = json.loads(lab.etcd.ctl("get", SUBNETS_KEY, "--prefix", "-w", "json"))["kvs"]
    life = lab.etcd.ctl("lease", "timetolive", f"{stored['lease']:x}")
    assert "granted with TTL(86400s)" in life


def test_dual_stack_subnet_env_and_lease_are_the_contracts_bytes(make_lab: MakeLab) -> None:
    """Contract 3.11, 3.16, 4.1; the MTU is the smaller of both families' (6.2)."""
    one = {**ONE_SUBNET, "IPv6SubnetMin": "fd00:244:0:9::", "IPv6SubnetMax": "fd00:244:0:9::"}
    lab = make_lab(1, ipv6="on", config=one)
    lab.up()
    host = lab.host(1)
    assert host.daemon.subnet_file.read_bytes() == (
        b"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\n"
        b"FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:9::1/64\n"
        b"FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    )
    macs = [json.loads(host.ip("-j", "link", "show", dev))[0]["address"] for dev in ("flannel.1", "flannel-v6.1")]
    value = lab.etcd.get(SUBNETS_KEY + "10.244.7.0-24&fd00:244:0:9::-64") or ""
    assert value.partition(',"FlanneldID":')[0] == (
        '{"PublicIP":"198.18.0.11","PublicIPv6":"2001:db8:18::11","BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{macs[0]}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{macs[1]}"}}'
    )


def test_a_daemon_killed_and_started_again_loses_no_ping_and_keeps_its_subnet(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up()
    before = lab.host(1).subnet_env()
    stream = Stream(lab)
    lab.host(1).daemon.kill()
    lab.host(1).daemon.start()
    lab.host(1).daemon.wait_ready()
    assert stream.lost() == 0
    assert lab.host(1).subnet_env() == before


def test_sigterm_ends_a_daemon_within_5_seconds_and_leaves_the_data_path(make_lab: MakeLab) -> None:
    """Contract 0.4."""
    lab = make_lab(2)
    lab.up()
    stream = Stream(lab)
    begun = time.monotonic()
    for host in lab.hosts:
        host.daemon.stop()
    assert time.monotonic() - begun < 10
    assert stream.lost() == 0
    assert all(host.daemon.subnet_file.exists() for host in lab.hosts)
    assert len(lab.etcd.items(SUBNETS_KEY)) == 2


def test_a_lease_removed_while_the_daemon_was_dead_leaves_nothing_behind(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    lab.up()
    first, gone = lab.host(1), lab.host(3)
    subnet = gone.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0")
    until(lambda: subnet in first.ip("route"), "the route to h3 is there")
    first.daemon.kill()
    gone.daemon.kill()
    assert lab.etcd.delete(f"{SUBNETS_KEY}{subnet}-24")
    first.daemon.start()
    first.daemon.wait_ready()

    def remains() -> str:
        fdb = first.run("bridge", "fdb", "show", "dev", "flannel.1").stdout
        return first.ip("route") + first.ip("neigh", "show", "dev", "flannel.1", "nud", "permanent") + fdb

    until(lambda: subnet not in remains() and gone.address() not in remains(), "nothing of h3 remains on h1")
    assert ping(first.pod, lab.host(2).pod_address()).lost == 0


def test_pods_outlive_the_death_of_an_etcd_member_and_new_daemons_start_without_it(make_lab: MakeLab) -> None:
    lab = make_lab(2, etcd_members=3)
    lab.up()
    stream = Stream(lab)
    lab.etcd.stop_member(1)
    lab.host(2).daemon.kill()
    lab.host(2).daemon.start()
    lab.host(2).daemon.wait_ready()
    assert stream.lost() == 0


def test_daemons_wait_for_an_etcd_that_is_not_there_yet(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up(daemons=False)
    lab.etcd.stop_member(1)
    for host in lab.hosts:
        host.daemon.start()
    until(lambda: all("etcd" in host.daemon.log() for host in lab.hosts), "the logs say what is waited for")
    lab.etcd.start_member(1)
    for host in lab.hosts:
        host.daemon.wait_ready()
    lab.attach_pods()
    assert_all_pods_connected(lab)


def test_daemons_wait_for_a_network_configuration_that_is_not_there_yet(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.up(daemons=False)
    assert lab.etcd.delete(CONFIG_KEY)
    lab.host(1).daemon.start()
    until(lambda: CONFIG_KEY in lab.host(1).daemon.log(), "the log names the missing key")
    assert lab.host(1).daemon.is_running()
    lab.etcd.put(CONFIG_KEY, lab.spec.network_config())
    lab.host(1).daemon.wait_ready()


@pytest.mark.timeout(180)
def test_twenty_daemons_started_at_once_get_twenty_subnets(make_lab: MakeLab) -> None:
    lab = make_lab(20)
    lab.up(daemons=False)
    for host in lab.hosts:
        host.daemon.start()
    for host in lab.hosts:
        host.daemon.wait_ready(120)
    subnets = {host.subnet_env()["FLANNEL_SUBNET"] for host in lab.hosts}
    assert len(subnets) == 20
    assert len(lab.etcd.items(SUBNETS_KEY)) == 20
    assert all(host.daemon.is_running() for host in lab.hosts)


def test_the_demo_ends_well_and_leaves_nothing(tmp_path: Path) -> None:
    name = "tdemo"
    argv = [sys.executable, "-m", "flanneld.ctl.main", "lab", "demo", f"--name={name}", "--set=PageAhead=0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK in" in done.stdout.splitlines()[-1]
    assert "LOST" not in done.stdout
    assert f"fl-{name}-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
