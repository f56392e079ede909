"""Whose firewall rules these are, where several networks have a daemon on one host.

Go flanneld has one name for its chain and one for its table, and two of its kind on one host undo each other's
rules. Ours share the names with Go's, but not with each other: who finds the plain name taken by another network
puts its rules under a name of its own. So whatever is told about one daemon stays true, and nobody's rules go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from flanneld.model.addr import Prefix
from flanneld.plan.traffic import MULTICAST, Rule, Verdict, blocks_named

MARK_DIGITS = 8


class Us(NamedTuple):
    """The network that a daemon serves."""

    mark: str
    """What a name of its own ends with: hex digits."""
    networks: tuple[Prefix, ...]
    """Blocks whose rules are ours: the present ones and those of an earlier run (contract 8.11)."""

    @staticmethod
    def of(network_id: str, networks: Iterable[Prefix]) -> Us:
        """From what tells networks apart on a host, such as the etcd prefix (contract 3.3)."""
        return Us(hashlib.sha256(network_id.encode()).hexdigest()[:MARK_DIGITS], tuple(networks))

    def others(self, rules: Iterable[Rule | None]) -> frozenset[Prefix]:
        """Other networks that have their rules among these."""
        return frozenset(block for block in networks_in(rules) if not self._is_ours(block))

    def wrote(self, rule: Rule | None) -> bool:
        """Whether a rule speaks of our networks."""
        return any(self._is_ours(block) for block in blocks_named([rule]))

    def _is_ours(self, block: Prefix) -> bool:
        return any(block.overlaps(network) for network in self.networks if network.family is block.family)


def networks_in(rules: Iterable[Rule | None]) -> frozenset[Prefix]:
    """Networks that flannel's rules are for: those that are masqueraded, or accepted both ways (contract 8.2, 8.5).

    A single rule that somebody put among them, whatever it speaks of, is nobody's network.
    """
    whole: set[Prefix] = set()
    ways: dict[Prefix, set[bool]] = {}
    for rule in rules:
        match rule:
            case Rule(Verdict.MASQUERADE, source=source, destination=destination) if (
                source and destination and not source.outside and destination.prefix in MULTICAST.values()
            ):
                whole.add(source.prefix)
            case Rule(Verdict.ACCEPT, source=source, destination=None) if source and not source.outside:
                ways.setdefault(source.prefix, set()).add(True)
            case Rule(Verdict.ACCEPT, source=None, destination=destination) if destination and not destination.outside:
                ways.setdefault(destination.prefix, set()).add(False)
    return frozenset(whole.union(block for block, both in ways.items() if len(both) == 2))
