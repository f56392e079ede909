"""Checksums of tunnel packets (failures F03): how the setting is kept, and what happens when NAT spoils them.

The underlay's devices are without transmit offloads here, as most network cards are for packets in a tunnel. Pairs of
virtual devices leave checksums out altogether, and hide the fault.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from flanneld.duties.checksums import RARELY_S
from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.lab.spec import CONFIG_KEY, IPv6Mode
from flanneld.model.addr import Family
from tests.netns.test_audit import ctl, status
from tests.support.live import until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("vxlan", "iptables", "nft", "ethtool"),
    pytest.mark.timeout(150),
]

MakeLab = Callable[..., Lab]
REWRITE = """\
table inet foreign {
    chain postrouting {
        type nat hook postrouting priority 100
        meta l4proto udp udp dport 8472 masquerade fully-random
    }
}
"""


def offload(host: Host, device: str = "flannel.1") -> str:
    """What ``ethtool -k`` says: on or off."""
    lines = host.run("ethtool", "-k", device, check=False).stdout.splitlines()
    return next((line.split()[1] for line in lines if "tx-checksum-ip-generic" in line), "")


def configure(lab: Lab, tx_checksum: str) -> None:
    conf = json.loads(lab.spec.network_config())
    conf["Backend"]["TxChecksum"] = tx_checksum
    lab.etcd.put(CONFIG_KEY, json.dumps(conf))


def plain_cards(lab: Lab) -> None:
    for host in lab.hosts:
        host.run("ethtool", "-K", "eth0", "tx", "off")


def at_next_look(condition: Callable[[], object], what: str) -> None:
    """Wait for what the daemon finds out by looking, which takes longer than what it is told."""
    deadline = time.monotonic() + 3 * RARELY_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def told(host: Host) -> bool:
    return any(text.startswith("UDP datagrams arrive with wrong checksums") for text in status(host)["remarks"])


def answers(lab: Lab, family: Family) -> bool:
    """Whether pod 2 answers TCP of pod 1; that nobody listens there is an answer."""
    target = lab.host(2).pod_address(family)
    script = f"import socket; socket.create_connection(({target!r}, 9), 1)"
    return "ConnectionRefusedError" in lab.host(1).pod.run("python3", "-c", script, check=False).stderr


def test_the_setting_is_kept_through_whatever_happens_to_the_device(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "vxlan", "TxChecksum": "off"})
    lab.up()
    host = lab.host(1)
    assert offload(host) == "off"
    host.run("ethtool", "-K", "flannel.1", "tx", "on")
    until(lambda: offload(host) == "off", "a host tool's change is undone")
    until(lambda: "restored offload tx-checksum-ip-generic off" in host.daemon.log(), "and told")
    host.ip("link", "del", "flannel.1")
    until(lambda: offload(host) == "off", "the device that was made anew has it too")
    host.daemon.kill()
    host.run("ethtool", "-K", "flannel.1", "tx", "on")
    host.daemon.start()
    host.daemon.wait_ready()
    until(lambda: offload(host) == "off", "the next start puts it right")
    configure(lab, "on")
    until(lambda: offload(host) == "on", "the configuration is followed")
    configure(lab, "off")
    until(lambda: offload(host) == "off", "the configuration is followed back")
    configure(lab, "auto")
    until(lambda: offload(host) == "on", "left to us, it is as a new device has it")


def test_left_to_us_the_device_stays_as_the_operator_has_set_it(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up()
    host = lab.host(1)
    assert offload(host) == "on"
    host.run("ethtool", "-K", "flannel.1", "tx", "off")
    host.run("ip", "link", "set", "flannel.1", "mtu", "1300")
    until(lambda: "its MTU was 1300" in host.daemon.log(), "a full look was taken since")
    assert offload(host) == "off"
    assert "offload" not in host.daemon.log()


@pytest.mark.parametrize(
    ("ipv6", "family", "device"), [("off", Family.V4, "flannel.1"), ("only", Family.V6, "flannel-v6.1")]
)
def test_nat_of_tunnel_packets_spoils_no_connection_for_long(
    make_lab: MakeLab, ipv6: IPv6Mode, family: Family, device: str
) -> None:
    lab = make_lab(2, ipv6=ipv6)
    lab.up()
    plain_cards(lab)
    first, second = lab.hosts
    until(lambda: answers(lab, family), "the pods are connected")
    first.run("nft", "-f", "-", stdin=REWRITE)
    assert not answers(lab, family), "the fault is there"
    at_next_look(lambda: answers(lab, family), "it is found and avoided")
    assert offload(first, device) == "off"
    assert "a NAT rule of this host rewrites tunnel packets" in first.daemon.log()
    assert status(first)["data_path"] == "kernel tables, checksums in software"
    assert offload(second, device) == "on", "who sends right is not slowed down"


def test_wrong_checksums_from_elsewhere_are_told_with_their_remedy(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "vxlan", "TxChecksum": "on"})
    lab.up()
    plain_cards(lab)
    first, second = lab.hosts
    bend = "table netdev foreign {\n chain out {\n type filter hook egress device eth0 priority 0\n"
    first.run("nft", "-f", "-", stdin=f"{bend} udp dport 8472 udp checksum set 0x1234\n }}\n}}\n")
    assert ping(first.pod, second.pod_address(), count=20).lost == 20
    at_next_look(lambda: told(second), "the receiver has seen it")
    assert 'set "TxChecksum": "off"' in ctl(second, "status")
    assert status(second)["problems"] == []
