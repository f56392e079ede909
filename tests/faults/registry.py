"""The faults by name: what somebody or something does to a host, and what an operator does about his part of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY
from tests.faults.cases import ALL, CASES, UDPS, VXLANS
from tests.faults.fault import Fault
from tests.faults.meddling import MEDDLING
from tests.faults.programs import PROGRAMS

if TYPE_CHECKING:
    from tests.faults.bed import Bed

DEVICES = (*VXLANS[:3], *UDPS)
NEVER = "never repaired"
GO = {
    "device down, then up": {"vxlan": NEVER},
    "MAC of the device changed": {"vxlan": NEVER},
    "addresses flushed from the device": {"vxlan": NEVER},
    "underlay down, then up": {"vxlan": "nothing to do", "host-gw": "up to 10 s"},
    "underlay deleted and made anew": {"vxlan": NEVER},
    "underlay address replaced": {"vxlan": NEVER, "host-gw": NEVER, "udp": NEVER},
    "neighbours flushed": {"vxlan": "nothing to do", "host-gw": "nothing to do"},
    "permanent neighbours flushed": {"vxlan": NEVER},
    "FDB flushed": {"vxlan": NEVER},
    "main table flushed": {"vxlan": NEVER, "host-gw": "6.5 s"},
    "underlay MTU lowered": {"vxlan": NEVER, "host-gw": NEVER, "udp": NEVER},
    "device deleted": {"vxlan": "peers never put back"},
    "device deleted while etcd is away": {"vxlan": NEVER},
    "route deleted": {"vxlan": NEVER, "host-gw": "6.5 s"},
    "route, neighbour and FDB entry bent": {"vxlan": NEVER},
    "entries of hosts that never were": {"vxlan": NEVER},
    "tables broken while the daemon is dead": {"vxlan": "stale entries stay"},
    "firewall flushed": {"vxlan": "1–5 s", "host-gw": "1–5 s", "udp": "1–5 s"},
    "nft ruleset flushed": {"vxlan nftables": NEVER, "vxlan": "1–5 s", "host-gw": "1–5 s"},
    "subnet.env deleted": {"vxlan": NEVER, "host-gw": NEVER, "udp": NEVER},
    "subnet.env cut short": {"vxlan": NEVER},
    "own lease deleted from etcd": {"vxlan": "the daemon ends"},
    "etcd loses everything": {"vxlan": "leases never come back"},
}
"""What Go flanneld (v0.28's code) does: measured, or read in its source or documentation where it does nothing."""
AHEAD = ("vxlan", "vxlan IPv6")
ANEW = """\
ip link del eth0
ip link add eth0 address {port} netns {netns} type veth peer name h1 netns {switch}
ip -n {switch} link set h1 master br0 up"""


def _stop_etcd(bed: Bed) -> None:
    bed.lab.etcd.stop_member(1)


def _start_etcd(bed: Bed) -> None:
    bed.lab.etcd.start_member(1)
    bed.lab.etcd.wait_healthy()


def _restart(bed: Bed) -> None:
    bed.host.daemon.kill()
    bed.host.daemon.start(env=bed.env())
    bed.host.daemon.wait_ready()


def _kill(bed: Bed) -> None:
    bed.host.daemon.kill()


def _start(bed: Bed) -> None:
    bed.host.daemon.start(env=bed.env())
    bed.host.daemon.wait_ready()


def _lose_etcd(bed: Bed) -> None:
    """Its disk is gone; the operator writes the configuration again, as after every new installation."""
    bed.lab.etcd.stop_member(1)
    shutil.rmtree(bed.lab.directory / "etcd1")
    bed.lab.etcd.start()
    bed.lab.etcd.put(CONFIG_KEY, bed.lab.spec.network_config())


def _delete_lease(bed: Bed) -> None:
    assert bed.lab.etcd.delete(bed.lease_key(bed.host))


MOVING = f"{SUBNETS_KEY}10.244.250.0-24"
"""The lease of a host that is not there."""


def _put_moving(bed: Bed, number: int) -> None:
    data = {"VNI": 1, "VtepMAC": f"02:00:00:00:0f:0{number}"}
    lease = {"PublicIP": f"198.18.0.9{number}", "BackendType": "vxlan", "BackendData": data}
    bed.lab.etcd.put(MOVING, json.dumps(lease))


def _add_peer(bed: Bed) -> None:
    _put_moving(bed, 1)
    complaints = bed.await_tables()
    assert not complaints, complaints


def _move_peer(bed: Bed) -> None:
    _put_moving(bed, 2)


def _remove_peer(bed: Bed) -> None:
    bed.lab.etcd.delete(MOVING)


def _flap(bed: Bed) -> None:
    for device in ("eth0", bed.case.device or "eth0"):
        bed.run(
            f"for i in $(seq 20); do ip link set {device} down; ip link set {device} up; done; {bed.words['plug_in']}"
        )


TABLE = [
    Fault(
        "device down, then up",
        ("F30",),
        DEVICES,
        "ip link set {dev} down; ip link set {dev} up",
    ),
    Fault("MAC of the device changed", ("F30", "F04"), VXLANS[:3], "ip link set {dev} address 02:00:00:00:00:99"),
    Fault("addresses flushed from the device", ("F30",), DEVICES, "ip addr flush dev {dev}"),
    Fault(
        "underlay down, then up",
        ("F30", "F15"),
        harm="ip link set eth0 down",
        whole="{plug_in}",
        is_told=False,
    ),
    Fault(
        "underlay deleted and made anew",
        ("F30",),
        harm=ANEW,
        whole="{plug_in}",
        is_told=False,
    ),
    Fault(
        "underlay address replaced",
        ("F30", "F33"),
        harm="ip addr del {address} dev eth0",
        whole="ip -batch - <<END\naddr add {other} dev eth0\nroute replace default via {router} proto static\nEND",
        undo="ip addr del {other} dev eth0\n{plug_in}",
        is_told=False,
    ),
    Fault("neighbours flushed", ("F30",), (*VXLANS[:3], "host-gw"), "{ip} neigh flush dev {dev}", is_told=False),
    Fault(
        "permanent neighbours flushed",
        ("F30",),
        VXLANS[:3],
        "{ip} neigh flush dev {dev} nud permanent",
    ),
    Fault("FDB flushed", ("F30",), VXLANS[:3], "bridge fdb flush dev {dev}"),
    Fault(
        "main table flushed",
        ("F30", "F15"),
        harm="{ip} route flush table main\n{routes}",
        quiet=("host-gw",),
    ),
    Fault(
        "underlay MTU lowered",
        ("F30", "F02"),
        harm="ip link set eth0 mtu 1400",
        undo="ip link set eth0 mtu 1500",
        is_told=False,
        lost_at_most=0,
    ),
]
TABLE = [replace(row, in_table=True, outage_at_most_ms=1000.0) for row in TABLE]

OTHERS = [
    Fault("device deleted", ("F30",), DEVICES, "ip link del {dev}"),
    Fault("device renamed", ("F30",), AHEAD, "ip link set {dev} down; ip link set {dev} name gone0"),
    Fault(
        "device taken and set up by a host tool",
        ("F31",),
        (*VXLANS[:3], *UDPS),
        "ip addr add {foreign} dev {dev}; {ip} route add default dev {dev} metric 5",
    ),
    Fault(
        "MTU and alias of the device changed",
        ("F31",),
        DEVICES,
        "ip link set {dev} mtu 1300; ip link set {dev} alias mine",
    ),
    Fault("route deleted", ("F15",), (*AHEAD, "host-gw"), "{ip} route del {subnet}"),
    Fault("covering route deleted", ("F31",), DEVICES, "{ip} route del {network} dev {dev}"),
    Fault(
        "route, neighbour and FDB entry bent",
        ("F05", "F31"),
        AHEAD,
        "bridge fdb replace {mac} dst {nowhere} dev {dev} self permanent; "
        "{ip} neigh replace {base} lladdr 02:00:00:00:66:66 nud permanent dev {dev}; "
        "{ip} route replace {subnet} dev {dev}",
    ),
    Fault(
        "own subnet routed to another host",
        ("F14",),
        ("vxlan",),
        "ip route prepend {own_subnet} via {base} dev {dev} onlink",
    ),
    Fault("route bent", ("F15",), ("host-gw",), "ip route replace {subnet} via {router} proto 86"),
    Fault(
        "entries of hosts that never were",
        ("F13", "F14"),
        AHEAD,
        "{ip} route add {stray} via {base} dev {dev} onlink; "
        "bridge fdb append 02:00:00:00:77:77 dst {nowhere} dev {dev} self permanent",
    ),
    Fault(
        "firewall flushed",
        ("F07",),
        ("vxlan", "vxlan legacy", "host-gw", "udp"),
        "iptables -w -t nat -F; iptables -w -F",
        after=lambda bed: bed.replant_firewall(),
        egress=True,
        outage_at_most_ms=8000,
    ),
    Fault(
        "nft ruleset flushed",
        ("F07",),
        ("vxlan", "vxlan nftables", "host-gw"),
        "nft flush ruleset",
        after=lambda bed: bed.replant_firewall(),
        egress=True,
    ),
    Fault("subnet.env deleted", ("F35",), ("vxlan", "host-gw", "udp"), "rm {file}", lost_at_most=0),
    Fault("subnet.env cut short", ("F35",), ("vxlan",), "truncate -s 20 {file}", lost_at_most=0),
    Fault(
        "settings of the device changed",
        ("F31",),
        VXLANS[:3],
        "cd /proc/sys/net/ipv{v}/neigh/{dev}; echo 0 > app_solicit; echo 3 > mcast_solicit",
    ),
    Fault(
        "checksum offload switched back on by a host tool",
        ("F03", "F31"),
        ("vxlan on demand",),
        "ethtool -K {dev} tx on",
        lost_at_most=0,
    ),
    Fault(
        "filters deleted",
        ("F30",),
        ("udp",),
        "tc filter del dev flannel0 egress; tc filter del dev eth0 ingress pref 8285",
    ),
    Fault("qdisc deleted", ("F30",), ("udp",), "tc qdisc del dev eth0 clsact", whole="{plug_in}"),
    Fault("pair of devices deleted", ("F30",), ("udp",), "ip link del flannel0c0"),
    Fault(
        "device deleted while etcd is away",
        ("F30", "F17"),
        DEVICES,
        "ip link del {dev}",
        before=_stop_etcd,
        after=_start_etcd,
    ),
    Fault(
        "own lease deleted from etcd",
        ("F18",),
        ("vxlan", "host-gw", "udp"),
        act=_delete_lease,
        is_told=False,
        outage_at_most_ms=1000.0,
    ),
    Fault(
        "etcd loses everything", ("F16",), ("vxlan", "host-gw", "udp"), act=_lose_etcd, is_told=False, lost_at_most=0
    ),
    Fault(
        "a peer gets another address and MAC",
        ("F05", "F33"),
        ("vxlan",),
        before=_add_peer,
        act=_move_peer,
        undo_act=_remove_peer,
        is_told=False,
        lost_at_most=0,
    ),
    Fault(
        "underlay and device flap twenty times", ("F15", "F30"), ALL, act=_flap, is_told=False, outage_at_most_ms=5000
    ),
    Fault("daemon killed and started", ("F45",), ALL[:-1], act=_restart, is_told=False, lost_at_most=0),
    Fault(
        "tables broken while the daemon is dead",
        ("F13", "F45"),
        (*AHEAD, "host-gw"),
        "{ip} route flush root {network} proto 86; ip link del flannel.1 2>/dev/null || true",
        before=_kill,
        act=_start,
        is_told=False,
        outage_at_most_ms=5000,  # a program starts meanwhile, on a machine that may be busy
    ),
]

FAULTS = [replace(found, go=GO.get(found.name, {})) for found in (*TABLE, *OTHERS, *MEDDLING, *PROGRAMS)]


def fault(name: str) -> Fault:
    """A fault by its name."""
    return next(found for found in FAULTS if found.name == name)


def rows() -> list[tuple[Fault, str]]:
    """Every fault in every cluster where it can happen; the clusters one after another."""
    return [(found, case) for case in CASES for found in FAULTS if case in found.cases]
