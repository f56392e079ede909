"""Everything that flannel could leave on a host, as text that compares equal when nothing is left.

Left out is what changes by itself: learned neighbours, counters, indexes, and what the kernel and ``ip``
number anew each time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from flanneld.lab.node import Host, Node

Snapshot = dict[str, list[str]]
IPTABLES = ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy")


def snapshot(host: Host) -> Snapshot:
    """Links, addresses, routes, rules, entries, filters, firewall, settings and files of a host, by kind."""
    devices = _devices(host)
    return {
        "links": sorted(map(_link, json.loads(host.ip("-j", "-d", "link")))),
        "addresses": _lines(host, "ip", "-o", "addr", but=r"(valid|preferred)_lft \S+"),
        "routes": _lines(host, "ip", "route", "show", "table", "all"),
        "routes6": _lines(host, "ip", "-6", "route", "show", "table", "all"),
        "nexthops": _lines(host, "ip", "nexthop"),
        "rules": _lines(host, "ip", "rule") + _lines(host, "ip", "-6", "rule"),
        "neighbours": _lines(host, "ip", "neigh", "show", "nud", "permanent"),
        "answers": _lines(
            host, "ip", "neigh", "show", "nud", "noarp", but=r"^(.* dev lo |ff|22[4-9]\.|23\d\.|::1 |127\.).*"
        ),
        "fdb": [line for line in _lines(host, "bridge", "fdb") if not line.startswith(("33:33", "01:00"))],
        "qdiscs": _lines(host, "tc", "qdisc"),
        "filters": [
            f"{device} {hook}: {line}"
            for device in devices
            for hook in ("ingress", "egress")
            for line in _lines(host, "tc", "filter", "show", "dev", device, hook)
        ],
        "xfrm": _lines(host, "ip", "xfrm", "policy"),
        "nft": nft_rules(host),
        **{tool: iptables_rules(host, tool) for tool in IPTABLES},
        "sysctls": _lines(host, "sysctl", "-a", "--pattern", r"^net\.", but=_VOLATILE),
        "files": sorted(str(path) for path in host.directory.rglob("*") if not path.is_dir() and _is_kept(path.name)),
    }


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """What came and what went, a line each; empty when all is as before."""
    found = []
    for kind in before:
        found += [f"{kind} - {line}" for line in before[kind] if line not in after[kind]]
        found += [f"{kind} + {line}" for line in after[kind] if line not in before[kind]]
        if len(before[kind]) != len(after[kind]) and not found:
            found.append(f"{kind}: {len(before[kind])} lines, now {len(after[kind])}")
    return found


def nft_rules(host: Node) -> list[str]:
    """The ruleset without handles, and without base chains that are empty and accept: they say nothing.

    iptables makes one of them when it is asked about a chain, in tables that others use.
    """
    text = re.sub(r"#.*", "", host.run("nft", "-s", "list", "ruleset", check=False).stdout)
    text = re.sub(r"\tchain \S+ \{\n\t\ttype .* policy accept;\n\t\}\n+", "", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def iptables_rules(host: Node, tool: str) -> list[str]:
    """Rules and user chains of one variant; built-in chains come into being when somebody looks and say nothing."""
    saved = host.run(f"{tool}-save", check=False).stdout.splitlines()
    return [line for line in saved if line.startswith("-A") or (line.startswith(":") and " - " in line)]


_VOLATILE = r"^net\.(netfilter\.nf_conntrack_count|ipv[46]\.route\.flush|ipv[46]\.\S*stable_secret).*"


def _is_kept(name: str) -> bool:
    return not name.startswith(("flanneld.", "xtables"))  # the lab's own: log, pid, lock


def _link(link: dict[str, object]) -> str:
    """A device without what changes while it lives: state, timers, counters."""
    info = link.get("linkinfo") or {}
    shown = [link.get(key) for key in ("ifname", "ifalias", "address", "mtu", "qdisc", "group", "master")]
    vxlan = info.get("info_data") if isinstance(info, dict) and info.get("info_kind") == "vxlan" else None
    flags = [flag in str(link["flags"]) for flag in ("UP", "NOARP")]
    return json.dumps([*shown, *flags, isinstance(info, dict) and info.get("info_kind"), vxlan])


def _devices(host: Host) -> list[str]:
    return [link["ifname"] for link in json.loads(host.ip("-j", "link"))]


def _lines(host: Node, *argv: str, but: str = "") -> list[str]:
    text = host.run(*argv, check=False).stdout
    number: Callable[[str], str] = lambda line: re.sub(r"^\d+: ", "", line)  # noqa: E731
    return sorted(
        filter(
            None, (re.sub(but, "", number(line)).strip() if but else number(line).strip() for line in text.splitlines())
        )
    )
