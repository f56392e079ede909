"""Bridges that still have an address of another subnet (failure F36). Pure; they are not ours, so we only tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flanneld.model.addr import Family, Prefix
from flanneld.model.host import HostNet


def misplaced(host: HostNet, ext: str, networks: Iterable[Prefix], subnets: Mapping[Family, Prefix]) -> list[str]:
    """Interfaces with an address of the cluster network outside our subnet, a sentence each.

    The bridge plugin refuses new containers on such a bridge, Docker gives them addresses that are routed to another
    host; neither says why.

    Args:
        host: the host's interfaces and addresses.
        ext: name of the external interface, which holds no containers.
        networks: the cluster's, and those it had before.
        subnets: ours.
    """
    known = list(networks)
    names = {link.ifindex: link.name for link in host.links}
    found: dict[str, Prefix] = {}
    for addr in host.addrs:
        name = names.get(addr.ifindex, "")
        family = Family.V4 if len(addr.ip) == 4 else Family.V6
        own = subnets.get(family)
        if own is None or addr.ip in own or name == ext or name.startswith("flannel"):
            continue  # devices of ours are put right by ourselves
        if any(addr.ip in network for network in known):
            found.setdefault(name, Prefix(addr.ip, addr.prefixlen))
    ours = "+".join(str(subnet.masked()) for subnet in subnets.values())
    return [
        f"{name} has an address of another subnet, {address}, but this host's subnet is {ours}: its containers are cut "
        f"off and new ones may fail; stop them, then ip addr del {address} dev {name}"
        for name, address in found.items()
    ]
