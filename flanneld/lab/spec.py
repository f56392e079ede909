"""What a lab looks like: its size, its addresses and names. Pure values, no I/O.

Addresses come from prefixes that exist for tests and documentation only (RFC 2544, 3849, 5737), so a lab
can never shadow a network that the operator's machine really talks to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from flanneld.errors import UsageError
from flanneld.model.addr import Family, format_ip, parse_ip

IPv6Mode = Literal["off", "on", "only"]
StoreKind = Literal["etcd", "kube"]

EXTRA = "install flanneld with its extra, by pip install '.[lab]' in a clone of it"
"""What to do where a part of the extra is missing."""
POD_NETWORK = "10.244.0.0/16"
POD_NETWORK6 = "fd00:244::/48"
OUTSIDE = {Family.V4: "203.0.113.10", Family.V6: "2001:db8:cb::10"}
OUTSIDE_GATEWAY = {Family.V4: "203.0.113.1", Family.V6: "2001:db8:cb::1"}
PREFIX_LEN = {Family.V4: 24, Family.V6: 64}
CONFIG_KEY = "/coreos.com/network/config"
SUBNETS_KEY = "/coreos.com/network/subnets/"
HEALTH_PORT = 8471
MAX_HOSTS = 200
"""Host numbers are the last byte of an address, from 11 on."""


@dataclass(frozen=True)
class LabSpec:
    """Everything that must be known to build a lab or to find it again.

    Raises:
        UsageError: a value is out of range; the sentence names it.
    """

    name: str
    """1 to 10 lower-case letters and digits: part of every namespace's name."""
    hosts: int = 3
    backend: Mapping[str, object] = field(default_factory=lambda: {"Type": "vxlan"})
    """The ``Backend`` object of the network configuration."""
    ipv6: IPv6Mode = "off"
    """``only``: the underlay has no IPv4 either."""
    segments: int = 1
    store: StoreKind = "etcd"
    """Where daemons keep leases: in etcd, or on the Nodes of a Kubernetes API server that the lab plays."""
    etcd_members: int = 1
    daemon: tuple[str, ...] = ()
    """The command that starts a daemon; empty = the ``flanneld`` of this installation."""
    daemon_flags: tuple[str, ...] = ()
    """Appended to the flags that every daemon of the lab gets."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Keys laid over the generated network configuration; ``Backend`` too is replaced whole."""
    mtu: int = 1500
    """MTU of the underlay in bytes."""
    cni: bool = False
    """Pods are made by this machine's CNI plugins, from the configuration that flanneld writes."""
    ephemeral: bool = False
    """Belongs to the process that built it: leftovers of a dead one may be swept away."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]{1,10}", self.name):
            raise UsageError(f"lab name {self.name!r} must be 1 to 10 lower-case letters and digits")
        for what, value, allowed in (
            ("number of hosts", self.hosts, range(1, MAX_HOSTS + 1)),
            ("number of segments", self.segments, range(1, 3)),
            ("number of etcd members", self.etcd_members, range(1, 4, 2)),
            ("underlay MTU", self.mtu, range(576, 65536)),
        ):
            if value not in allowed:
                choice = " or ".join(map(str, allowed)) if len(allowed) < 3 else f"{allowed[0]} to {allowed[-1]}"
                raise UsageError(f"the {what} must be {choice}, not {value}")
        if self.ipv6 not in ("off", "on", "only"):
            raise UsageError(f"--ipv6 must be off, on or only, not {self.ipv6!r}")
        if self.store not in ("etcd", "kube"):
            raise UsageError(f"--store must be etcd or kube, not {self.store!r}")
        if self.store == "kube" and self.etcd_members != 1:
            raise UsageError("--etcd-members has no meaning with --store kube")

    @property
    def families(self) -> tuple[Family, ...]:
        """Address families of underlay and pod network, IPv4 first."""
        return {"off": (Family.V4,), "on": (Family.V4, Family.V6), "only": (Family.V6,)}[self.ipv6]

    @property
    def prefix(self) -> str:
        """What the names of all our namespaces begin with."""
        return f"fl-{self.name}-"

    def netns(self, node: str) -> str:
        """Namespace of a node: ``h1``, ``pod1``, ``switch``, ``router`` or ``outside``."""
        return self.prefix + node

    def nodes(self) -> list[str]:
        """All nodes, in the order in which they are shown."""
        pairs = [node for i in range(1, self.hosts + 1) for node in (f"h{i}", f"pod{i}")]
        return ["switch", "router", "outside", *pairs]

    def segment_of(self, host: int) -> int:
        """The segment that host number ``host`` (from 1) is plugged into."""
        return (host - 1) % self.segments

    def host_address(self, host: int, family: Family) -> str:
        """Underlay address of a host, counted from 1."""
        return underlay(self.segment_of(host), 10 + host, family)

    def member_address(self, member: int) -> str:
        """Address of an etcd member, counted from 1, or of the API server; IPv4 unless there is none."""
        return underlay(0, 1 + member, self.families[0])

    def network_config(self) -> str:
        """The network configuration as it is put into etcd or ``net-conf.json``."""
        config: dict[str, object] = {}
        if self.ipv6 == "only":
            config["EnableIPv4"] = False
        else:
            config["Network"] = POD_NETWORK
        if self.ipv6 != "off":
            config |= {"EnableIPv6": True, "IPv6Network": POD_NETWORK6}
        return json.dumps({**config, "Backend": dict(self.backend), **self.config})

    def to_json(self) -> dict[str, object]:
        """For the lab's own state file."""
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, object]) -> LabSpec:
        """Back from ``to_json``, after a trip through a file."""
        lists = {key: tuple(value) for key, value in raw.items() if isinstance(value, list)}
        return LabSpec(**{**raw, **lists})  # type: ignore[arg-type]  # our own file, written by to_json


def underlay(segment: int, number: int, family: Family) -> str:
    """Address number ``number`` of an underlay segment, in canonical text."""
    text = f"198.18.{segment}.{number}" if family is Family.V4 else f"2001:db8:18:{segment}::{number}"
    return format_ip(parse_ip(text))
