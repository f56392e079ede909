"""Things of others on a host, many of them much like ours: whatever is broken and repaired, these stay as they are."""

from __future__ import annotations

import json
import re

from flanneld.lab.node import Host
from flanneld.model.addr import Family

LINKS = """\
ip link add vx7 type vxlan id 7 dstport 4789
ip link set vx7 up
ip addr add 10.99.0.1/24 dev vx7
ip neigh add 10.99.0.9 lladdr 02:00:00:00:00:99 nud permanent dev vx7
bridge fdb add 02:00:00:00:00:99 dev vx7 dst 198.18.0.99 self permanent
ip link add flannel.99 type vxlan id 99 dstport 4790
ip link set flannel.99 alias "flanneld /other" up
ip addr add 10.77.1.0/32 dev flannel.99
ip rule add fwmark 0x77 lookup 77
ip route add 192.0.2.0/24 dev vx7 table 77
"""
UNDERLAY = """\
neigh replace 198.18.0.98 lladdr 02:00:00:00:00:98 nud permanent dev eth0
route replace 10.98.0.0/16 via 198.18.0.1 proto 86
route replace 10.244.0.0/24 via 198.18.0.1 proto static
route replace 192.0.2.0/24 via 198.18.0.1
"""
"""For ``ip -batch``. Goes with the underlay interface; whoever makes that anew makes these anew."""
FILTER = """\
tc qdisc replace dev eth0 clsact
tc filter del dev eth0 ingress pref 7 2>/dev/null
tc filter add dev eth0 ingress pref 7 protocol ip u32 match ip src 192.0.2.7/32 classid 1:1
"""
IMPATIENT = "for v in ipv4 ipv6; do echo 20 > /proc/sys/net/$v/neigh/eth0/retrans_time_ms; done\n"
"""A switch port that has just come up may lose the underlay's own ARP request, which the kernel repeats after a second.
That is not what is to be measured."""
FIREWALL = """\
nft add table ip mine
nft 'add chain ip mine postrtg { type nat hook postrouting priority 110; }'
nft 'add rule ip mine postrtg ip saddr 192.0.2.0/24 counter'
iptables -w -t nat -N MINE
iptables -w -t nat -A MINE -s 192.0.2.0/24 -m comment --comment flannel -j RETURN
iptables -w -t nat -A POSTROUTING -j MINE
iptables -w -A INPUT -s 192.0.2.9 -j DROP
"""
FIREWALL_GONE = """\
nft delete table ip mine 2>/dev/null
iptables -w -t nat -D POSTROUTING -j MINE 2>/dev/null
iptables -w -t nat -F MINE 2>/dev/null
iptables -w -t nat -X MINE 2>/dev/null
iptables -w -D INPUT -s 192.0.2.9 -j DROP 2>/dev/null
"""


def plug_in(host: Host) -> str:
    """What an operator does about the underlay interface of a host: it is up, has addresses and default routes."""
    lines = ["link set eth0 up"]
    for family in host.spec.families:
        router = re.sub(r"(\.|::)\d+$", r"\g<1>1", host.address(family))
        length = 24 if family is Family.V4 else 64
        lines += [
            f"addr replace {host.address(family)}/{length} dev eth0",
            f"route replace default via {router} proto static",
        ]
    return IMPATIENT + _batch("\n".join([*lines, UNDERLAY])) + FILTER


def routes_of_others(host: Host, device: str) -> str:
    """A command that puts back the routes of the main table that are not ours."""
    lines = []
    for family in host.spec.families:
        routes = host.ip("-4" if family is Family.V4 else "-6", "route", "show", "table", "main").splitlines()
        # the ones through no gateway first, as the others stand on them
        for line in sorted((line.strip() for line in routes), key=lambda line: " via " in line):
            is_ours = " proto 86" in line and not line.startswith("10.98.")
            if not is_ours and not (device and f" dev {device} " in f"{line} ") and "fe80" not in line:
                lines.append(f"route replace {_settable(line)}")
    return _batch("\n".join(lines))


def _batch(lines: str) -> str:
    """One process for all: time runs."""
    return f"ip -batch - <<END\n{lines.strip()}\nEND\n"


def _settable(line: str) -> str:
    """A route as it is shown, in words that can be given back."""
    return re.sub(r" (linkdown|dead|offload|pref \w+|nhid \d+)", "", line)


def port_of(host: Host) -> str:
    """The MAC of the underlay interface."""
    [link] = json.loads(host.ip("-j", "link", "show", "dev", "eth0"))
    return str(link["address"])
