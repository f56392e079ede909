"""What the tables of a host should hold, worked out from the leases alone, and what they hold instead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flanneld.lab.node import Host
from flanneld.model.addr import Family
from tests.faults.cases import Case

NETWORKS = {Family.V4: "10.244.0.0/16", Family.V6: "fd00:244::/48"}
FLAGS = {Family.V4: "-4", Family.V6: "-6"}


def wrong_entries(host: Host, case: Case, leases: Mapping[str, str]) -> Iterator[str]:
    """Compare; on demand, entries may be absent, and those that are there must be right."""
    for family in host.spec.families:
        wanted = _wanted(host, case, leases, family)
        found = _found(host, case, family)
        for kind in wanted:
            extra = found[kind] - wanted[kind]
            lacking = set() if case.is_on_demand and kind != "covering" else wanted[kind] - found[kind]
            yield from (f"no lease asks for the {family.label} {kind} {entry}" for entry in sorted(extra))
            yield from (f"the {family.label} {kind} {entry} is not there" for entry in sorted(lacking))


Entries = dict[str, set[str]]


def _wanted(host: Host, case: Case, leases: Mapping[str, str], family: Family) -> Entries:
    wanted: Entries = {"route": set(), "covering": set()}
    device = _device(case, family)
    if case.backend == "vxlan":
        wanted |= {"neighbour": set(), "fdb": set()}
    if device:
        wanted["covering"].add(f"{NETWORKS[family]} dev {device}")
    for key, value in leases.items():
        lease = json.loads(value)
        v4, _, v6 = key.rpartition("/")[2].partition("&")
        block = (v4 if family is Family.V4 else v6).replace("-", "/")
        at = lease["PublicIP" if family is Family.V4 else "PublicIPv6"]
        base, _, length = block.partition("/")
        if host.gateway(family) == f"{base[:-1] if family is Family.V4 else base}1/{length}":
            continue
        if case.backend == "vxlan":
            mac = lease["BackendData" if family is Family.V4 else "BackendV6Data"]["VtepMAC"]
            wanted["route"].add(f"{block} via {base} dev {device}")
            wanted["neighbour"].add(f"{base} {mac}")
            wanted["fdb"].add(f"{mac} {at}")
        elif case.backend == "host-gw":
            wanted["route"].add(f"{block} via {at} dev eth0")
    return wanted


def _found(host: Host, case: Case, family: Family) -> Entries:
    device = _device(case, family)
    found: Entries = {"route": set(), "covering": set()}
    for route in _json(host, "ip", FLAGS[family], "-j", "route", "show"):
        if device and route.get("dev") == device and route["dst"] == NETWORKS[family]:
            found["covering"].add(f"{route['dst']} dev {device}")
        elif (
            route.get("dev") == device
            if device
            else route.get("protocol") == "86" and route["dst"].startswith("10.244.")
        ):
            if route.get("protocol") == "kernel" or route.get("type") == "unreachable":
                continue
            found["route"].add(f"{route['dst']} via {route.get('gateway')} dev {route.get('dev')}")
    if case.backend == "vxlan":
        neighbours = _json(host, "ip", FLAGS[family], "-j", "neigh", "show", "dev", device, "nud", "permanent")
        found["neighbour"] = {f"{entry['dst']} {entry.get('lladdr')}" for entry in neighbours}
        entries = _json(host, "bridge", "-j", "fdb", "show", "dev", device)
        found["fdb"] = {f"{entry['mac']} {entry['dst']}" for entry in entries if "dst" in entry}
    return found


def _device(case: Case, family: Family) -> str:
    if case.backend == "vxlan":
        return "flannel.1" if family is Family.V4 else "flannel-v6.1"
    return case.device


def _json(host: Host, *argv: str) -> list[dict[str, Any]]:
    text = host.run(*argv, check=False).stdout
    return json.loads(text) if text.strip() else []
