"""Which packets are masqueraded and which forwarded: the rules by meaning, without any tool's syntax.

``traffic_nft.py`` and ``traffic_iptables.py`` write these rules for their tool and read back what the
kernel lists. Wanted and found are compared as the values below, never as text: tools print the same rule
differently from version to version, and a comparison of text then repairs for ever (failures F12).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from flanneld.model.addr import Family, Prefix

DONT_MASQUERADE_MARK = 0x4000
"""Bit that kube-proxy and CNI plugins set on packets that must keep their source. Source: contract 8.2."""

MULTICAST = {Family.V4: Prefix.parse("224.0.0.0/4"), Family.V6: Prefix.parse("ff00::/8")}
"""Never masqueraded (contract 8.2 rule 6)."""


class TrafficRules(NamedTuple):
    """Firewall rules wanted for one family (contract section 8)."""

    network: Prefix
    """C, the cluster network."""
    subnet: Prefix
    """P, our own subnet, host bits cleared."""
    masquerade: bool
    """``--ip-masq``."""
    fully_random: bool
    """Ask for port randomisation; dropped when the tool or kernel lacks it."""
    forward: bool
    """``--iptables-forward-rules``."""


class Verdict(Enum):
    """What happens to a packet that matches."""

    RETURN = "return"
    MASQUERADE = "masquerade"
    ACCEPT = "accept"


class Block(NamedTuple):
    """A condition on an address: inside the block, or outside of it."""

    prefix: Prefix
    outside: bool = False


class Rule(NamedTuple):
    """One rule; all conditions given must hold."""

    verdict: Verdict
    source: Block | None = None
    destination: Block | None = None
    marked: bool = False
    """Only packets with the bit ``DONT_MASQUERADE_MARK`` set."""
    fully_random: bool = False
    """Masquerade to a random port, against port clashes under load (failures F12)."""


def blocks_named(rules: Iterable[Rule | None]) -> frozenset[Prefix]:
    """Blocks that rules speak of, multicast aside: they tell whose network the rules are of."""
    blocks = {block.prefix for rule in rules if rule for block in (rule.source, rule.destination) if block}
    return frozenset(blocks.difference(MULTICAST.values()))


def masquerade_rules(wanted: TrafficRules) -> tuple[Rule, ...]:
    """The rules for packets that leave this host, in order; empty without ``--ip-masq``.

    Both tools get iptables' set. Go flanneld's nftables set compares the whole mark, so a packet with any
    other bit set too is masqueraded against the marker's will, and its fourth rule hides the sixth, so
    host-to-overlay traffic keeps a source the peer cannot answer (contract 8.15, 8.16, 11.22).

    Source: contract 8.2 rules 2 to 7.
    """
    if not wanted.masquerade:
        return ()
    network, own = wanted.network.masked(), wanted.subnet.masked()
    multicast = MULTICAST[network.family]
    random = wanted.fully_random
    return (
        Rule(Verdict.RETURN, marked=True),
        Rule(Verdict.RETURN, Block(own), Block(network)),
        Rule(Verdict.RETURN, Block(network), Block(own)),
        Rule(Verdict.RETURN, Block(network, outside=True), Block(own)),
        Rule(Verdict.MASQUERADE, Block(network), Block(multicast, outside=True), fully_random=random),
        Rule(Verdict.MASQUERADE, Block(network, outside=True), Block(network), fully_random=random),
    )


def forward_rules(wanted: TrafficRules) -> tuple[Rule, ...]:
    """The rules that let overlay traffic through the host; empty without ``--iptables-forward-rules``.

    Source: contract 8.5, 8.18.
    """
    if not wanted.forward:
        return ()
    network = wanted.network.masked()
    return (Rule(Verdict.ACCEPT, source=Block(network)), Rule(Verdict.ACCEPT, destination=Block(network)))
