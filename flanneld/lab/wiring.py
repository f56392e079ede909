"""The lab's cables: underlay, router, outside network, and the pods' bridges. Topology in ``__init__``."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import partial
from typing import Any

from flanneld.lab import netns
from flanneld.lab.spec import OUTSIDE, OUTSIDE_GATEWAY, PREFIX_LEN, LabSpec, underlay
from flanneld.model.addr import Family

ROUTER_NUMBER = 1

_COMMON = {
    # duplicate address detection would keep every new IPv6 address unusable for a second
    "ipv6/conf/all/accept_dad": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/all/accept_ra": 0,
    "ipv6/conf/default/accept_ra": 0,
}
_FORWARD = {"ipv4/ip_forward": 1, "ipv6/conf/all/forwarding": 1}
# the switch is a cable: its frames must not pass iptables
_SWITCH = {"bridge/bridge-nf-call-iptables": 0, "bridge/bridge-nf-call-ip6tables": 0}


def build(spec: LabSpec) -> None:
    """Make all namespaces and connect them, up to but not including the pods.

    Raises:
        KernelError: the kernel refused something.
    """
    netns.add(map(spec.netns, spec.nodes()))
    for node in spec.nodes():
        forwards = node == "router" or node.startswith("h")
        special = _SWITCH if node == "switch" else _FORWARD if forwards else {}
        netns.write_sysctls(spec.netns(node), {**_COMMON, **special})
    netns.links(spec.netns("switch"), lambda ip: _switch(ip, spec))
    netns.links(spec.netns("router"), lambda ip: _router(ip, spec))
    outside = [f"{OUTSIDE[family]}/{PREFIX_LEN[family]}" for family in spec.families]
    to_hosts = [(_underlay_of_all(family), OUTSIDE_GATEWAY[family]) for family in spec.families]
    netns.links(spec.netns("outside"), lambda ip: _endpoint(ip, outside, to_hosts))
    for host in range(1, spec.hosts + 1):
        segment = spec.segment_of(host)
        own = [f"{spec.host_address(host, family)}/{PREFIX_LEN[family]}" for family in spec.families]
        default = [(_default(family), underlay(segment, ROUTER_NUMBER, family)) for family in spec.families]
        netns.links(spec.netns(f"h{host}"), partial(_endpoint, addresses=own, routes=default))


def attach_pod(spec: LabSpec, host: int, gateways: Sequence[str], mtu: int) -> None:
    """Give a host its ``cni0`` bridge and its pod, replacing those of an earlier subnet.

    Args:
        spec: the lab.
        host: number of the host, from 1.
        gateways: the bridge's addresses with prefix length, as in ``subnet.env``.
        mtu: of bridge and pod, in bytes, as in ``subnet.env``.
    """
    pod = spec.netns(f"pod{host}")

    def bridge_side(ip: Any) -> None:
        if old := ip.link_lookup(ifname="cni0"):
            ip.link("del", index=old[0])
        if old := ip.link_lookup(ifname="pod"):
            ip.link("del", index=old[0])  # the other end, in the pod, goes with it
        index = _bridge(ip, "cni0", mtu)
        for gateway in gateways:
            address, _, length = gateway.partition("/")
            ip.addr("add", index=index, address=address, prefixlen=int(length))
        _cable(ip, "pod", index, pod, mtu)

    netns.links(spec.netns(f"h{host}"), bridge_side)
    addresses = [_next_address(gateway) for gateway in gateways]
    routes = [(_default(_family(gateway)), gateway.partition("/")[0]) for gateway in gateways]
    netns.links(pod, lambda ip: _endpoint(ip, addresses, routes))


def _switch(ip: Any, spec: LabSpec) -> None:
    _loopback_up(ip)
    bridges = [_bridge(ip, f"br{segment}", spec.mtu) for segment in range(spec.segments)]
    for family in spec.families:
        for member in range(1, spec.etcd_members + 1):
            address = underlay(0, 1 + member, family)
            ip.addr("add", index=bridges[0], address=address, prefixlen=PREFIX_LEN[family])
    for segment, bridge in enumerate(bridges):
        _cable(ip, f"router{segment}", bridge, spec.netns("router"), spec.mtu, f"seg{segment}")
    for host in range(1, spec.hosts + 1):
        _cable(ip, f"h{host}", bridges[spec.segment_of(host)], spec.netns(f"h{host}"), spec.mtu)
    for family in spec.families:
        if spec.segments > 1:  # etcd answers the hosts of the other segment through the router, as hosts do
            gateway = underlay(0, ROUTER_NUMBER, family)
            ip.route("add", dst=_underlay_of_all(family), gateway=gateway, family=int(family))


def _router(ip: Any, spec: LabSpec) -> None:
    _loopback_up(ip)
    ip.link("add", ifname="out", kind="veth", peer={"ifname": "eth0", "net_ns_fd": spec.netns("outside")})
    addresses = {f"seg{segment}": [(underlay(segment, ROUTER_NUMBER, f), f) for f in spec.families]
                 for segment in range(spec.segments)}  # fmt: skip
    addresses["out"] = [(OUTSIDE_GATEWAY[family], family) for family in spec.families]
    for name, own in addresses.items():
        index = ip.link_lookup(ifname=name)[0]
        ip.link("set", index=index, state="up")
        for address, family in own:
            ip.addr("add", index=index, address=address, prefixlen=PREFIX_LEN[family])


def _endpoint(ip: Any, addresses: Sequence[str], routes: Sequence[tuple[str, str]]) -> None:
    """Configure ``eth0`` of a namespace: addresses with prefix length, then (destination, gateway) routes."""
    _loopback_up(ip)
    index = ip.link_lookup(ifname="eth0")[0]
    ip.link("set", index=index, state="up")
    for entry in addresses:
        address, _, length = entry.partition("/")
        ip.addr("add", index=index, address=address, prefixlen=int(length))
    for destination, gateway in routes:
        ip.route("add", dst=destination, gateway=gateway, family=int(_family(gateway)))


def _bridge(ip: Any, name: str, mtu: int) -> int:
    # snooping off: a lab has no querier, and a snooping bridge without one forgets IPv6 neighbours
    ip.link("add", ifname=name, kind="bridge", mtu=mtu, br_forward_delay=0, br_mcast_snooping=0, state="up")
    index: int = ip.link_lookup(ifname=name)[0]
    return index


def _cable(ip: Any, port: str, bridge: int, peer_netns: str, mtu: int, peer: str = "eth0") -> None:
    """A veth from a bridge's port into another namespace; that end is still down."""
    far_end = {"ifname": peer, "net_ns_fd": peer_netns, "mtu": mtu}
    ip.link("add", ifname=port, kind="veth", peer=far_end, mtu=mtu, master=bridge, state="up")


def _loopback_up(ip: Any) -> None:
    ip.link("set", index=1, state="up")


def _family(address: str) -> Family:
    return Family.V6 if ":" in address else Family.V4


def _default(family: Family) -> str:
    return "0.0.0.0/0" if family is Family.V4 else "::/0"


def _underlay_of_all(family: Family) -> str:
    return "198.18.0.0/15" if family is Family.V4 else "2001:db8:18::/48"


def _next_address(gateway: str) -> str:
    """``10.244.7.1/24`` → ``10.244.7.2/24``."""
    interface = ipaddress.ip_interface(gateway)
    return f"{interface.ip + 1}/{interface.network.prefixlen}"
