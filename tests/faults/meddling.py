"""Faults that leave everything standing and change one property of it, as scripts and tools of hosts do.

Each of them was once overlooked, or could be: the object is still there, under its name, and up.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.faults.cases import VXLANS
from tests.faults.fault import Act, Fault

if TYPE_CHECKING:
    from tests.faults.bed import Bed

AHEAD = ("vxlan", "vxlan IPv6")
IN_A_BRIDGE = "ip link add fbr0 type bridge; ip link set {dev} master fbr0"
OWN_ADDRESS = "{ip} addr del {own_base}/{bits} dev {dev}; {ip} addr add {own_base} dev {dev} "
PEERS_ROUTE = "{ip} route change {subnet} via {base} dev {dev} onlink"


def _unseen(script: str) -> Act:
    """Take something of ours away and put another in its place, faster than the daemon could put back its own."""

    def act(bed: Bed) -> None:
        bed.host.daemon.signal(signal.SIGSTOP)
        bed.run(script.format(**bed.words))
        bed.host.daemon.signal(signal.SIGCONT)

    return act


MEDDLING = [
    Fault(
        "device put into a bridge",
        ("F31",),
        VXLANS[:3],
        IN_A_BRIDGE,
        whole="ip link del fbr0",
        is_told=False,  # the operator may be faster
    ),
    Fault("device put into a bridge, which stays", ("F31",), VXLANS[:3], IN_A_BRIDGE, undo="ip link del fbr0"),
    Fault("ARP switched off on the device", ("F31",), VXLANS[:3], "ip link set {dev} arp off"),
    Fault(
        "TTL, TOS and DF of outer packets changed",
        ("F31",),
        VXLANS[:3],
        "ip link set {dev} type vxlan ttl 1 tos 4; ip link set {dev} type vxlan df set",
    ),
    Fault("device up, but held down by protodown", ("F30",), VXLANS[:3], "ip link set {dev} protodown on"),
    Fault(
        "own address put back as one of the link",
        ("F11", "F31"),
        ("vxlan", "vxlan on demand"),
        act=_unseen(OWN_ADDRESS + "scope link"),
    ),
    Fault("own address put back as one end of two", ("F31",), VXLANS[:3], act=_unseen(OWN_ADDRESS + "peer {base}")),
    Fault("learning switched on", ("F31",), VXLANS[:3], "ip link set {dev} type vxlan learning", lost_at_most=0),
    Fault(
        "FDB entry made temporary, to another host",
        ("F05",),
        AHEAD,
        "bridge fdb replace {mac} dst {nowhere} dev {dev} self dynamic",
    ),
    Fault("FDB entry with another port", ("F05",), AHEAD, "bridge fdb replace {mac} dst {host} port 9 dev {dev} self"),
    Fault(
        "FDB entry through nexthop objects",
        ("F05",),
        AHEAD,
        act=_unseen(
            "ip nexthop add id 5 via {nowhere} fdb; ip nexthop add id 6 group 5 fdb; "
            "printf 'fdb del {mac} dev {dev}\\nfdb add {mac} dev {dev} nhid 6 self' | bridge -batch -"
        ),
        undo="ip nexthop del id 6; ip nexthop del id 5",
    ),
    Fault("broadcast FDB entry added", ("F31",), AHEAD, "bridge fdb append 00:00:00:00:00:00 dst {nowhere} dev {dev}"),
    Fault(
        "neighbour made temporary",
        ("F05",),
        AHEAD,
        "{ip} neigh change {base} lladdr 02:00:00:00:66:66 nud stale dev {dev}",
    ),
    Fault("MTU of a route lowered", ("F01",), AHEAD, PEERS_ROUTE + " mtu lock 600 advmss 500", lost_at_most=0),
    Fault(
        "MTU of a direct route lowered",
        ("F01",),
        ("host-gw",),
        "ip route change {subnet} via {host} proto 86 mtu lock 600",
    ),
    Fault("source address put into a route", ("F11",), AHEAD, PEERS_ROUTE + " src {own}", lost_at_most=0),
    Fault(
        "route spread over two next hops",
        ("F15",),
        AHEAD,
        "{ip} route replace {subnet} nexthop via {base} dev {dev} onlink nexthop via {router} dev eth0 weight 99",
    ),
    Fault(
        "direct route spread over two next hops",
        ("F15",),
        ("host-gw",),
        "ip route replace {subnet} proto 86 nexthop via {host} weight 1 nexthop via {router} weight 99",
    ),
    Fault("route of ours thrown", ("F15",), ("host-gw",), "ip route replace throw {subnet} proto 86"),
    Fault("route of ours prohibited", ("F15",), ("host-gw",), "ip route replace prohibit {subnet} proto 86"),
    Fault("end of the pair of devices down", ("F30",), ("udp",), "ip link set flannel0c0 down"),
    Fault("MTU of the pair of devices lowered", ("F30",), ("udp",), "ip link set flannel0c0 mtu 1400"),
    Fault("offloads of the pair of devices switched on", ("F03",), ("udp",), "ethtool -K flannel0c0 tx on"),
    Fault(
        "end of the pair of devices renamed",
        ("F30",),
        ("udp",),
        "ip link set flannel0c0 down; ip link set flannel0c0 name gone0; ip link set gone0 up || :",  # or gone by now
    ),
    Fault(
        "end of the pair of devices put into a bridge",
        ("F31",),
        ("udp",),
        "ip link add fbr0 type bridge; ip link set flannel0c1 master fbr0",
        undo="ip link del fbr0",
    ),
]
