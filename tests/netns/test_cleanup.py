"""``flannelctl cleanup``: removes all and only what flannel made, for every backend, by whom ever it was made.

The measure is a snapshot of the host before the first start. Beside flannel's things the host has others' that look
alike: a vxlan device, firewall tables, routes, a bridge with a pod.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from flanneld.lab import Lab, wiring
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.lab.spec import SUBNETS_KEY
from flanneld.model.addr import Family
from tests.netns.test_end_to_end import until
from tests.support.snapshot import differences, snapshot

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
OWN_SUBNET = {"SubnetMin": "10.244.7.0", "SubnetMax": "10.244.8.0"}
FOREIGN = """\
ip link add vx7 type vxlan id 7 dev eth0 dstport 4789
ip link set vx7 up
ip addr add 10.99.0.1/24 dev vx7
ip neigh add 10.99.0.9 lladdr 02:00:00:00:00:99 nud permanent dev vx7
bridge fdb add 02:00:00:00:00:99 dev vx7 dst 198.18.0.99 self permanent
ip link add flannel.99 type vxlan id 99 dev eth0 dstport 4790
ip link set flannel.99 alias "flanneld /other" up
ip addr add 10.77.1.0/32 dev flannel.99
ip route add 10.98.0.0/16 via 198.18.0.1 proto 86
ip route add 10.244.128.0/20 via 198.18.0.1
ip route add 192.0.2.0/24 via 198.18.0.1
ip nexthop add id 7 via 198.18.0.1 dev eth0
nft add table ip mine
nft 'add chain ip mine postrtg { type nat hook postrouting priority 100; }'
nft 'add rule ip mine postrtg ip saddr 10.244.0.0/16 counter'
iptables -t nat -N MINE
iptables -t nat -A MINE -s 10.244.0.0/16 -m comment --comment flannel -j RETURN
iptables -t nat -A POSTROUTING -j MINE
iptables -A INPUT -s 192.0.2.9 -j DROP
"""


def cleanup(host: Host, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command on a host of the lab, with the lab's places."""
    where = (f"--subnet-file={host.daemon.subnet_file}", f"--state-dir={host.daemon.state_dir}")
    argv = (sys.executable, "-m", "flanneld.ctl.main", "cleanup", *where, *flags)
    return host.run(*argv, check=check)


def a_lab_with_others_things(make_lab: MakeLab, **spec: object) -> Lab:
    """Two hosts, no daemon yet; on the first everything of FOREIGN, a bridge and a pod."""
    config: dict[str, object] = {**OWN_SUBNET, **spec.pop("config", {})}  # type: ignore[dict-item]
    lab = make_lab(2, config=config, **spec)
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("sh", "-e", stdin=FOREIGN)
    dual = len(lab.spec.families) == 2
    # Go flanneld had this host's subnet before, so it is known whose the pod's address is
    lab.etcd.put(
        f"{SUBNETS_KEY}10.244.7.0-24{'&fd00:244:0:7::-64' if dual else ''}",
        f'{{"PublicIP":"{host.address()}","PublicIPv6":{json.dumps(host.address(Family.V6) if dual else None)}}}',
    )
    gateways = ["10.244.7.1/24"] + (["fd00:244:0:7::1/64"] if dual else [])
    wiring.attach_pod(lab.spec, 1, gateways, 1400)
    return lab


def run_daemons(lab: Lab, **env: str) -> None:
    """Start both, use the network, leave what use leaves: entries, answers to misses, refused blocks."""
    host, peer = lab.hosts
    host.daemon.start(env=env or None)
    host.daemon.wait_ready()
    peer.daemon.start()
    peer.daemon.wait_ready()
    peer.attach_pod()
    until(lambda: ping(host.pod, peer.pod_address()).lost == 0, "the pods are connected")
    ping(host.pod, "10.244.200.1")


CASES = {
    "vxlan": {"backend": {"Type": "vxlan"}},
    "vxlan on demand": {"backend": {"Type": "vxlan", "PageAhead": 0}},
    "vxlan direct": {"backend": {"Type": "vxlan", "DirectRouting": True}},
    "vxlan dual": {
        "backend": {"Type": "vxlan"},
        "ipv6": "on",
        "config": {"IPv6SubnetMin": "fd00:244:0:7::", "IPv6SubnetMax": "fd00:244:0:8::"},
    },
    "vxlan nftables": {"backend": {"Type": "vxlan"}, "config": {"EnableNFTables": True}},
    "host-gw": {"backend": {"Type": "host-gw"}, "daemon_flags": ("--ip-blackhole-route",)},
    "host-gw nftables": {"backend": {"Type": "host-gw"}, "config": {"EnableNFTables": True}},
    "udp gso": {"backend": {"Type": "udp", "DataPath": "gso"}},
    "udp basic": {"backend": {"Type": "udp", "DataPath": "basic"}},
}


@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize("case", CASES)
def test_the_host_is_as_before_the_first_start(make_lab: MakeLab, case: str, end: str) -> None:
    lab = a_lab_with_others_things(make_lab, **CASES[case])  # type: ignore[arg-type]
    host = lab.host(1)
    before = snapshot(host)
    run_daemons(lab)
    (host.daemon.stop if end == "stopped" else host.daemon.kill)()
    used = snapshot(host)
    shown = cleanup(host, "--dry-run", "--state").stdout
    assert differences(used, snapshot(host)) == [], "a dry run changes nothing"
    done = cleanup(host, "--yes", "--state").stdout
    assert differences(before, snapshot(host)) == []
    assert [line.replace("removed ", "  ") for line in done.splitlines()] == shown.splitlines()[1:]
    again = cleanup(host, "--yes", "--state")
    assert (again.stdout.startswith("nothing to remove"), again.stderr) == (True, "")
