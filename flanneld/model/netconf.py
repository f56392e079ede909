"""The network configuration as a frozen value; ``netconf_parse.py`` makes it from JSON (contract section 2)."""

from __future__ import annotations

from typing import NamedTuple

from flanneld.model.addr import Family, Prefix


class FamilyConf(NamedTuple):
    """One address family of the network, with defaults applied (contract 2.6, 2.7)."""

    network: Prefix
    """Host bits cleared."""
    subnet_len: int
    subnet_min: int
    """First subnet that may be leased, as the integer of its address."""
    subnet_max: int
    """Last subnet that may be leased, inclusive."""


class NetConf(NamedTuple):
    """The whole network configuration."""

    v4: FamilyConf | None
    v6: FamilyConf | None
    nftables: bool
    backend_type: str
    """Lower-cased ``Backend.Type``; ``udp`` when the config has no ``Backend`` (contract 2.3)."""
    backend: bytes
    """The raw JSON object of ``Backend``; ``{}`` when absent. The backend decodes it."""

    def family(self, family: Family) -> FamilyConf | None:
        """The settings of one family; None when disabled."""
        return self.v4 if family is Family.V4 else self.v6

    def families(self) -> tuple[Family, ...]:
        """The enabled families, IPv4 first."""
        return tuple(f for f in Family if self.family(f))

    def networks(self) -> tuple[Prefix, ...]:
        """The cluster networks of the enabled families."""
        return tuple(part.network for part in (self.v4, self.v6) if part)
