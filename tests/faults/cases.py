"""The clusters that faults are made in: one for each way in which packets and firewall rules are handled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flanneld.model.addr import Family


class Case(NamedTuple):
    """A kind of cluster."""

    spec: Mapping[str, object]
    """For ``LabSpec``, beside name and hosts."""
    device: str = ""
    """The device of ours that faults hit; empty = none."""
    family: Family = Family.V4
    """The family whose entries faults hit."""
    needs: tuple[str, ...] = ()
    """Of the machine beside ``TOOLS``, as in ``tests/conftest.py``."""
    iptables: str = ""
    """Variant behind the name ``iptables``; empty = the machine's own."""

    @property
    def backend(self) -> str:
        """Type of the backend."""
        return str(self.spec["backend"]["Type"])  # type: ignore[index]

    @property
    def is_on_demand(self) -> bool:
        """Whether peers come into the tables when a packet asks for them."""
        return "PageAhead" in self.spec["backend"]  # type: ignore[operator]


TOOLS = ("netns", "etcd", "iptables", "nft")
"""What every cluster needs."""
VXLAN: dict[str, object] = {"Type": "vxlan"}
CASES = {
    "vxlan": Case({"backend": VXLAN}, "flannel.1", needs=("vxlan",)),
    "vxlan on demand": Case(
        {"backend": {**VXLAN, "PageAhead": 0, "TxChecksum": "off"}}, "flannel.1", needs=("vxlan", "ethtool")
    ),
    "vxlan IPv6": Case({"backend": VXLAN, "ipv6": "on"}, "flannel-v6.1", Family.V6, needs=("vxlan",)),
    "vxlan nftables": Case({"backend": VXLAN, "config": {"EnableNFTables": True}}, "flannel.1", needs=("vxlan",)),
    "vxlan legacy": Case({"backend": VXLAN}, "flannel.1", needs=("vxlan",), iptables="xtables-legacy-multi"),
    "host-gw": Case({"backend": {"Type": "host-gw"}}),
    "udp": Case({"backend": {"Type": "udp", "DataPath": "kernel"}}, "flannel0", needs=("udp_kernel",)),
    "udp basic": Case({"backend": {"Type": "udp", "DataPath": "basic"}}, "flannel0"),
}
VXLANS = tuple(name for name in CASES if name.startswith("vxlan"))
UDPS = ("udp", "udp basic")
ALL = ("vxlan", "vxlan on demand", "vxlan IPv6", "host-gw", "udp", "udp basic")
"""Those that differ in their data path; the two others differ in their firewall."""
