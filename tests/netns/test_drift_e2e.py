"""What others do to our things while a daemon runs: undone within two pings, and told with old and new value.

``test_damage.py`` has the damage table; here each single entry, host tools that grab the device, what Go's
flanneld leaves, and what misses do after a device was made anew. One lab serves a whole list of damages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.lab.spec import SUBNETS_KEY, IPv6Mode
from flanneld.model.addr import Family
from tests.support.live import Stream, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]
DEVICE = {Family.V4: "flannel.1", Family.V6: "flannel-v6.1"}
FLAG = {Family.V4: "-4", Family.V6: "-6"}


class Words:
    """What the damages need to know of host 2, as host 1 sees it."""

    def __init__(self, first: Host, second: Host, family: Family) -> None:
        gateway = second.gateway(family) or ""
        address, _, length = gateway.partition("/")
        self.ip = f"ip {FLAG[family]}"
        self.device = DEVICE[family]
        self.base = re.sub(r"1$", "0" if family is Family.V4 else "", address)
        self.subnet = f"{self.base}/{length}"
        self.host = second.address(family)
        self.nowhere = "198.18.0.99" if family is Family.V4 else "2001:db8:18::99"
        entries = json.loads(first.run("bridge", "-j", "fdb", "show", "dev", self.device).stdout)
        self.mac = next(entry["mac"] for entry in entries if entry.get("dst") == self.host)


DAMAGE = {
    "neighbour deleted": (
        "{ip} neigh del {base} dev {device}",
        r"restored neighbour {base} lladdr {mac} permanent dev {device}: it was gone",
    ),
    "neighbour with a wrong MAC": (
        "{ip} neigh replace {base} lladdr 02:00:00:00:66:66 nud permanent dev {device}",
        r"restored neighbour {base} .*: it was {base} lladdr 02:00:00:00:66:66",
    ),
    "forwarding entry deleted": (
        "bridge fdb del {mac} dev {device}",
        r"restored fdb {mac} dst {host} dev {device}: it was gone",
    ),
    "forwarding entry to nowhere": (
        "bridge fdb replace {mac} dst {nowhere} dev {device}",
        r"restored fdb {mac} dst {host} dev {device}: it was {mac} dst {nowhere}",
    ),
    "forwarding entry to another port": (
        "bridge fdb replace {mac} dst {host} port 4789 dev {device}",
        r"restored fdb {mac} dst {host} dev {device}: it was ",
    ),
    "route deleted": (
        "{ip} route del {subnet} dev {device}",
        r"restored route {subnet} via {base} dev {device} .*onlink: it was gone",
    ),
    "route to the wrong host": (
        "{ip} route replace {subnet} dev {device}",
        r"restored route {subnet} via {base} dev {device} .*onlink: it was {subnet} dev {device}",
    ),
    "a route of nobody's": (
        "{ip} route add {stray} via {base} dev {device} onlink",
        r"removed route {stray} via {base} dev {device}.*: no lease asks for it",
    ),
    "host tool adds an address and a default route (failures F31)": (
        "{ip} addr add {foreign} dev {device}; {ip} route add default dev {device} metric 5",
        r"removed address {foreign} dev {device}: no lease asks for it",
    ),
    "MTU": ("ip link set {device} mtu 1300", r"restored link {device}: its MTU was 1300"),
    "alias": ("ip link set {device} alias mine", r"restored link {device}: its alias was 'mine'"),
}


def told(host: Host, pattern: str, since: int) -> bool:
    return re.search(pattern + r".*, after \d+ ms", host.daemon.log()[since:]) is not None


def tables(host: Host, family: Family) -> str:
    """All that is ours on the device, without what ages or counts."""
    device = DEVICE[family]
    parts = [
        host.ip(FLAG[family], "route", "show", "dev", device),
        host.ip(FLAG[family], "neigh", "show", "dev", device, "nud", "permanent"),
        host.ip(FLAG[family], "-br", "addr", "show", "dev", device),
        host.run("bridge", "fdb", "show", "dev", device).stdout,
        host.ip("-o", "link", "show", device),
    ]
    return "\n".join(sorted(line.strip() for part in parts for line in part.splitlines() if "fe80:" not in line))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ipv6", ["off", "only"])
def test_each_entry_comes_back_within_two_pings_and_is_told_with_old_and_new(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    lab = make_lab(2, ipv6=ipv6)
    lab.up()
    first, second = lab.hosts
    [family] = lab.spec.families
    until(lambda: ping(first.pod, second.pod_address()).lost == 0, "the pods are connected")
    words = vars(Words(first, second, family))
    words["stray"] = "10.244.250.0/24" if family is Family.V4 else "fd00:244:0:fa00::/64"
    words["foreign"] = "192.168.1.125/24" if family is Family.V4 else "2001:db8:99::125/64"
    before = tables(first, family)
    for damage, (command, audit) in DAMAGE.items():
        if family is Family.V6 and damage == "MTU":
            continue  # below 1280 the kernel would take IPv6 away, and a smaller change says no more than IPv4's
        logged = len(first.daemon.log())
        stream = Stream(lab)
        first.run("sh", "-c", command.format(**words))
        pattern = audit.format(**{key: re.escape(value) for key, value in words.items()})
        until(lambda p=pattern, at=logged: told(first, p, at), f"{damage}: the log says {pattern}")  # type: ignore[misc]
        until(lambda: tables(first, family) == before, f"{damage}: the tables are as before")
        assert stream.lost() <= 2, damage
    assert first.daemon.is_ready()


def test_what_go_flanneld_made_is_taken_over_without_loss_and_what_it_left_behind_goes(make_lab: MakeLab) -> None:
    """Contract 6.6, 6.11, 6.15, 6.18, 13.8: same device, same MAC, same subnet; stale peers of its missed events go."""
    lab = make_lab(2)
    lab.up()
    first, second = lab.hosts
    subnet = first.subnet_env()["FLANNEL_SUBNET"]
    own = subnet.replace(".1/24", ".0")
    words = vars(Words(first, second, Family.V4))
    first.daemon.stop()
    mac = "9a:11:22:33:44:55"
    script = f"""
        ip link del flannel.1
        ip link add flannel.1 type vxlan id 1 dev eth0 local {first.address()} dstport 8472 nolearning
        ip link set flannel.1 address {mac} mtu 1450 txqueuelen 0
        ip addr add {own}/32 dev flannel.1
        ip link set flannel.1 up
    """
    peers = [(words["base"], words["mac"], words["host"]), ("10.244.251.0", "9a:00:00:00:00:fb", "198.18.0.251")]
    for base, peer_mac, host in peers:
        script += f"""
            ip neigh replace {base} lladdr {peer_mac} nud permanent dev flannel.1
            bridge fdb replace {peer_mac} dst {host} dev flannel.1 self permanent
            ip route replace {base}/24 via {base} dev flannel.1 onlink
        """
    script += "ip route add 10.244.252.0/24 via 198.18.0.252 dev eth0\n"  # DirectRouting's form
    script += "bridge fdb append 9a:00:00:00:00:fc dst 198.18.0.252 dev flannel.1 self permanent\n"  # 6.18's orphan
    first.run("sh", "-e", stdin=script)
    # peers have the MAC that Go published
    key = f"{SUBNETS_KEY}{own}-24"
    value = lab.etcd.get(key) or ""
    [stored] = json.loads(lab.etcd.ctl("get", key, "-w", "json"))["kvs"]
    published = re.sub(r'"VtepMAC":"[^"]*"', f'"VtepMAC":"{mac}"', value)
    published = re.sub(r',"FlanneldID":"[^"]*"', "", published)
    lab.etcd.put(key, published, lease=f"{stored['lease']:x}")
    until(lambda: ping(first.pod, second.pod_address()).lost == 0, "the pods are connected as under Go's flanneld")
    index = first.ip("-o", "link", "show", "flannel.1").split(":")[0]
    stream = Stream(lab)
    first.daemon.start()
    first.daemon.wait_ready()

    def remains() -> str:
        return first.ip("route") + first.ip("neigh") + first.run("bridge", "fdb", "show", "dev", "flannel.1").stdout

    stale = ("10.244.251.0", "10.244.252.0", "9a:00:00:00:00:fb", "9a:00:00:00:00:fc")
    until(lambda: not any(word in remains() for word in stale), "stale entries are gone")
    assert stream.lost() == 0
    link = first.ip("-o", "-d", "link", "show", "flannel.1")
    assert link.split(":")[0] == index, "the device was made anew"
    assert mac in link
    assert mac in (lab.etcd.get(key) or "")
    assert first.subnet_env()["FLANNEL_SUBNET"] == subnet
    assert words["base"] in remains()


def test_a_peer_that_was_never_needed_is_reached_through_a_device_made_anew(make_lab: MakeLab) -> None:
    lab = make_lab(3, backend={"Type": "vxlan", "PageAhead": 0})
    lab.up()
    first, second, third = lab.hosts
    assert ping(first.pod, second.pod_address()).lost == 0
    before = first.ip("-o", "link", "show", "flannel.1").split(":")[0]
    first.ip("link", "del", "flannel.1")
    until(
        lambda: (
            first.run("ip", "-o", "link", "show", "up", "dev", "flannel.1", check=False).stdout.split(":")[0]
            not in ("", before)
        ),
        "the device is there again",
    )
    until(lambda: "scope link" in first.ip("route", "show", "10.244.0.0/16"), "the covering route is there again")
    assert ping(first.pod, third.pod_address()).lost == 0
    assert "another one" not in first.daemon.log()
