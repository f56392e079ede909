"""Whoever loses its subnet takes itself out of harm's way, on real hosts (design/lease-protocol.md; failures F18, F19).

What must not happen is counted where it would hurt: packets with the lost subnet's addresses that arrive at peers.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source, ping
from flanneld.lab.spec import SUBNETS_KEY
from flanneld.model.addr import Family
from tests.netns.test_cold_start import memory, subnet_of
from tests.support.live import Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
THIEF = {"PublicIP": "198.51.100.7", "PublicIPv6": "2001:db8::7", "FlanneldID": "f" * 32}
QUARANTINE_S = 1.0


def key_of(lab: Lab, host: Host) -> str:
    subnet = subnet_of(host).replace("/", "-")
    return next(key for key in lab.etcd.items(SUBNETS_KEY) if subnet in key)


def steal(lab: Lab, host: Host) -> str:
    """Write another machine's value over a host's key; returns the key."""
    key = key_of(lab, host)
    value = json.loads(lab.etcd.items(SUBNETS_KEY)[key]) | THIEF
    for part in ("BackendData", "BackendV6Data"):
        if isinstance(value.get(part), dict) and "VtepMAC" in value[part]:
            value[part]["VtepMAC"] = "0a:00:00:00:00:07"
    lab.etcd.put(key, json.dumps(value))
    return key


def status(host: Host) -> dict[str, object]:
    argv = [
        str(Path(sys.executable).with_name("flannelctl")),
        "status",
        "-o",
        "json",
        f"--subnet-file={host.daemon.subnet_file}",
    ]
    found = host.run(*argv, check=False).stdout
    return json.loads(found) if found else {}


def is_closed(host: Host) -> bool:
    """Whether nothing gets into the network from here, in any family."""
    networks = [("-4", "10.244.0.0/16")] + [("-6", "fd00:244::/48")] * (len(host.spec.families) > 1)
    return all(f"unreachable {network}" in host.ip(family, "route", "show", network) for family, network in networks)


class Trespassers:
    """Counts packets from a subnet that other hosts get to see."""

    def __init__(self, lab: Lab, subnet: str, *at: Host) -> None:
        self._hosts, self._before = at, 0
        for host in at:
            rule = f'iifname != "cni0" ip saddr {subnet} ip daddr 10.244.0.0/16 counter'
            host.run(
                "nft",
                f"table ip fence {{ chain c {{ type filter hook prerouting priority raw; policy accept; {rule}; }}; }}",
            )

    def count(self) -> int:
        """Since the last call."""
        total = 0
        for host in self._hosts:
            listing = json.loads(host.run("nft", "-j", "list", "table", "ip", "fence").stdout)["nftables"]
            rules = [item["rule"] for item in listing if "rule" in item]
            total += sum(part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part)
        before, self._before = self._before, total
        return total - before


@pytest.mark.parametrize(
    ("backend", "more"),
    [("vxlan", {}), ("vxlan", {"ipv6": "on"}), ("host-gw", {}), ("udp", {})],
    ids=["vxlan", "vxlan-dual", "host-gw", "udp"],
)
def test_a_host_whose_lease_was_stolen_sends_nothing_of_it_and_comes_back(
    make_lab: MakeLab, backend: str, more: dict[str, str]
) -> None:
    with make_lab(backend={"Type": backend}, **more) as lab:
        host, peer, third = lab.hosts
        pid, pods_before = host.daemon.pid, host.pod_address()
        seen = Trespassers(lab, subnet_of(host), peer, third)
        others = Stream(lab, source=2, target=3)
        stream = Stream(lab)
        assert seen.count() > 0

        key, began = steal(lab, host), time.monotonic()
        until(lambda: is_closed(host), "the network is closed")
        assert time.monotonic() - began < QUARANTINE_S
        seen.count()
        until(lambda: "quarantine" in host.daemon.ask("/readyz")[1], "it says so")
        assert ping(host.pod, peer.pod_address(), count=20).received == 0
        assert ping(host, peer.pod_address(), count=5).received == 0
        assert seen.count() == 0, "with the stream still running"

        for family in lab.spec.families:
            assert egress_source(lab, 1, family) == host.address(family)
        assert ping(host, host.pod_address(), count=3).lost == 0
        assert ping(host.pod, str(host.gateway(Family.V4)).partition("/")[0], count=3).lost == 0
        found = status(host)
        assert found["state"] == "quarantined"
        assert "f" * 32 in str(found["problems"])
        assert "delete that key" in str(found["problems"])
        assert json.loads(lab.etcd.items(SUBNETS_KEY)[key])["FlanneldID"] == "f" * 32, "never written over"

        lab.etcd.delete(key)
        until(lambda: host.daemon.is_ready(), "ready again")
        until(lambda: not is_closed(host), "open again")
        assert_all_pods_connected(lab)
        assert (host.daemon.pid, host.pod_address()) == (pid, pods_before)
        assert stream.lost() > 0
        assert others.lost() == 0
        assert host.daemon.log().count("lease lost") == 1
        assert host.daemon.log().count("our subnet is ours again") == 1


def test_a_host_whose_lease_ran_out_and_was_leased_to_another_moves(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    lab.up(daemons=False)
    host, peer, winner = lab.hosts
    for early in (host, peer):
        early.daemon.start()
        early.daemon.wait_ready()
        early.attach_pod()
    pid, former = host.daemon.pid, subnet_of(host)
    host.daemon.signal(signal.SIGSTOP)
    expire(lab, key_of(lab, host))
    winner.daemon.subnet_file.parent.mkdir(parents=True, exist_ok=True)
    winner.daemon.subnet_file.write_text(
        f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={former.replace('.0/', '.1/')}\n"
    )
    winner.daemon.start()
    winner.daemon.wait_ready()
    winner.attach_pod()
    assert subnet_of(winner) == former
    until(lambda: ping(winner.pod, peer.pod_address()).lost == 0, "peers send to the winner")
    traffic = Stream(lab, source=3, target=2)
    seen = Trespassers(lab, former, winner)  # nobody sends the winner its own addresses

    host.daemon.signal(signal.SIGCONT)
    until(lambda: subnet_of(host) not in ("", former), "another subnet in subnet.env")
    assert host.daemon.pid == pid
    assert "restart the containers of this host" in host.daemon.log()
    ping(host.pod, peer.pod_address(), count=5)  # of the old subnet: masqueraded, so nothing goes astray
    host.ip("link", "del", "cni0")  # containers restarted by their runtime, on the bridge of the new subnet
    host.attach_pod()
    host.daemon.wait_ready()
    assert_all_pods_connected(lab)
    assert traffic.lost() == 0
    assert seen.count() == 0


def test_a_lease_that_ran_out_while_its_host_was_away_is_kept_when_nobody_took_it(make_lab: MakeLab) -> None:
    with make_lab(hosts=2) as lab:
        host = lab.host(1)
        pid, subnet, key = host.daemon.pid, subnet_of(host), key_of(lab, host)
        host.daemon.signal(signal.SIGSTOP)
        expire(lab, key)
        host.daemon.signal(signal.SIGCONT)
        until(lambda: lab.etcd.get(key) is not None, "the key again")
        assert (host.daemon.pid, subnet_of(host)) == (pid, subnet)
        assert_all_pods_connected(lab)
        assert "lease lost" not in host.daemon.log()


def test_a_host_that_is_restarted_in_quarantine_without_the_store_does_not_come_back_with_the_lost_subnet(
    make_lab: MakeLab,
) -> None:
    with make_lab(hosts=2) as lab:
        host, peer = lab.hosts
        until(lambda: len(memory(host)) == 4, "both leases are remembered")
        lost = subnet_of(host)
        steal(lab, host)
        until(lambda: is_closed(host), "the network is closed")
        until(lambda: '"lost":true' in memory(host)[0], "the loss is remembered")
        lab.etcd.stop_member(1)
        host.daemon.kill()
        host.daemon.start()
        until(lambda: "another host had our subnet" in host.daemon.log(), "the reason is told")
        assert not host.daemon.is_ready()
        assert is_closed(host)
        assert ping(host.pod, peer.pod_address(), count=5).received == 0
        lab.etcd.start()
        until(lambda: subnet_of(host) not in ("", lost), "another subnet")


def expire(lab: Lab, key: str) -> None:
    """What etcd does when a lease's time is over."""
    found = json.loads(lab.etcd.ctl("get", key, "-w", "json"))["kvs"][0]
    lab.etcd.ctl("lease", "revoke", f"{found['lease']:x}")
