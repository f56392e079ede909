"""Finds base chains of others that are certain to drop what the overlay forwards (failure F08). Pure.

An accept ends the base chain that it stands in and no other one, so no rule of ours overrules a drop in another table.
Each foreign chain at the forward hook is walked with the packets that the overlay forwards: a new connection between
the network and our subnet, in or out by our device. Whatever a rule may do to such a packet counts; only where nothing
but dropping is left, somebody is named. What is not understood may accept: a wrong accusation is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple

from flanneld.model.addr import Family, Prefix, parse_ip

Key = tuple[str, str, str]
"""A chain: family in nft's words, table, name."""

WORDS = {Family.V4: ("ip", "ipv4"), Family.V6: ("ip6", "ipv6")}
MOST_DEEP = 16
"""Jumps into each other; the kernel allows as many (NFT_JUMP_STACK_SIZE)."""


class Walk(NamedTuple):
    """Packets whose fate is asked for."""

    what: str
    """``new connections from …``."""
    source: Prefix
    destination: Prefix
    incoming: frozenset[str]
    """Interfaces by which they may come; empty = any that holds containers."""
    outgoing: frozenset[str]


class Out(Enum):
    """What may become of a packet in a rule or chain."""

    ACCEPT = "accept"
    DROP = "drop"
    NEXT = "next"
    """It goes on with the next rule."""
    BACK = "back"
    """It goes back to the chain that jumped here; out of a base chain, to the policy."""


ANYTHING = frozenset(Out)


def walks(network: Prefix, subnet: Prefix, devices: frozenset[str]) -> tuple[Walk, Walk]:
    """What a host forwards for the overlay, both ways.

    Args:
        network: the cluster's.
        subnet: ours.
        devices: interfaces by which packets of other hosts come.
    """
    network, subnet = network.masked(), subnet.masked()
    return (
        Walk(f"new connections from {network} to {subnet}", network, subnet, devices, frozenset()),
        Walk(f"new connections from {subnet} to {network}", subnet, network, frozenset(), devices),
    )


def forward_tables(listing: Sequence[object]) -> list[tuple[str, str]]:
    """The tables with base chains at the forward hook, of a listing of chains: nft's word for the family, name."""
    chains = Ruleset(listing).bases
    return list(dict.fromkeys((family, table) for family, table, _name in chains))


def certain_drops(listing: Sequence[object], packets: Sequence[Walk]) -> list[str]:
    """Chains that are certain to drop, a sentence each.

    Args:
        listing: what ``nft -j list table`` has under ``nftables``, of one or more tables.
        packets: what is forwarded.
    """
    rules = Ruleset(listing)
    found = []
    for key, policy in rules.bases.items():
        fates = {walk.what: rules.fate(key, walk) for walk in packets if key[0] in ("inet", _word(walk))}
        lost = [what for what, fate in fates.items() if (fate - {Out.BACK}) | _end(fate, policy) == {Out.DROP}]
        if lost:
            why = "by its policy" if any(Out.BACK in fates[what] for what in lost) else "by a rule without exception"
            family, table, name = key
            found.append(
                f"nftables table {family} {table} drops {' and '.join(lost)} in its chain {name}, {why}, and rules of "
                f"other tables cannot overrule that: accept them there (nft -a list chain {family} {table} {name})"
            )
    return found


class Ruleset:
    """Chains and rules of a listing."""

    def __init__(self, listing: Sequence[object]) -> None:
        self.bases: dict[Key, str] = {}
        """Base chains at the forward hook that filter, with their policy."""
        self._rules: dict[Key, list[Sequence[object]]] = {}
        self._fates: dict[tuple[Key, Walk], frozenset[Out]] = {}
        for item in map(_mapping, listing):
            if chain := _mapping(item.get("chain")):
                key = _key(chain, "name")
                self._rules.setdefault(key, [])
                if chain.get("hook") == "forward" and key[0] in ("ip", "ip6", "inet"):
                    self.bases[key] = str(chain.get("policy", "accept"))
            if rule := _mapping(item.get("rule")):
                expr = rule.get("expr")
                self._rules.setdefault(_key(rule, "chain"), []).append(expr if isinstance(expr, list) else [None])

    def fate(self, key: Key, walk: Walk, depth: int = 0) -> frozenset[Out]:
        """All that may become of such packets in a chain; never ``NEXT``."""
        if key not in self._rules or depth > MOST_DEEP:
            return ANYTHING - {Out.NEXT}
        if (key, walk) not in self._fates:
            self._fates[key, walk] = self._walked(key, walk, depth)
        return self._fates[key, walk]

    def _walked(self, key: Key, walk: Walk, depth: int) -> frozenset[Out]:
        fate: frozenset[Out] = frozenset()
        for rule in self._rules[key]:
            matches, outs = self._rule(key, rule, walk, depth)
            if matches is False:
                continue
            fate |= outs - {Out.NEXT}
            if matches and Out.NEXT not in outs:
                return fate
        return fate | {Out.BACK}

    def _rule(self, key: Key, rule: Sequence[object], walk: Walk, depth: int) -> tuple[bool | None, frozenset[Out]]:
        """Whether a rule matches, None = maybe; and what its verdict may be."""
        matches: bool | None = True
        for statement in map(_mapping, rule):
            kind = next(iter(statement), "")
            value = _mapping(statement.get(kind))
            if kind == "match":
                matched = _matches(value, walk)
                if matched is False:
                    return False, frozenset()
                matches = matches and matched
            elif kind in ("accept", "drop", "reject", "return"):
                out = {"accept": Out.ACCEPT, "return": Out.BACK}.get(kind, Out.DROP)
                return matches, frozenset({out})
            elif kind in ("jump", "goto"):
                fate = self.fate((*key[:2], str(value.get("target"))), walk, depth + 1)
                if kind == "jump" and Out.BACK in fate:
                    fate = fate - {Out.BACK} | {Out.NEXT}
                return matches, fate
            elif kind not in ("counter", "log"):
                return None, ANYTHING
        return matches, frozenset({Out.NEXT})


def _end(fate: frozenset[Out], policy: str) -> frozenset[Out]:
    """What the policy does to packets that come to the end of a base chain."""
    if Out.BACK not in fate:
        return frozenset()
    return frozenset({Out.DROP if policy == "drop" else Out.ACCEPT})


def _matches(match: Mapping[str, object], walk: Walk) -> bool | None:
    left, right, op = _mapping(match.get("left")), match.get("right"), match.get("op")
    if op not in ("==", "!=", "in"):
        return None
    values = list(_values(right))
    payload, meta, ct = (_mapping(left.get(kind)) for kind in ("payload", "meta", "ct"))
    found: bool | None = None
    if payload.get("protocol") in ("ip", "ip6"):
        if payload["protocol"] != _word(walk):
            return False  # of the other family; so is a "!=" of it
        field = {"saddr": walk.source, "daddr": walk.destination}.get(str(payload.get("field")))
        found = _any(_covers(value, field) for value in values) if field else None
    elif meta.get("key") in ("iifname", "oifname"):
        names = walk.incoming if meta["key"] == "iifname" else walk.outgoing
        found = _any(_named(value, names) for value in values)
    elif meta.get("key") == "nfproto":
        found = _any(value == WORDS[walk.source.family][1] for value in values)
    elif ct.get("key") == "state":
        found = _any(value == "new" if isinstance(value, str) else None for value in values)
    elif ct.get("key") == "status" and set(map(str, values)) <= {"dnat", "snat"}:
        found = False
    return found if op != "!=" or found is None else not found


def _values(right: object) -> Iterator[object]:
    """The alternatives of the right side of a comparison."""
    members = _mapping(right).get("set") if isinstance(right, dict) else right
    if isinstance(members, list):
        yield from members
    else:
        yield right


def _any(answers: Iterator[bool | None]) -> bool | None:
    found = list(answers)
    return True if True in found else None if None in found else False


def _covers(value: object, block: Prefix) -> bool | None:
    """Whether an address or block of a rule holds all, or nothing, of what packets may have."""
    prefix = _mapping(value).get("prefix") if isinstance(value, dict) else {"addr": value, "len": block.family.bits}
    try:
        text, length = str(_mapping(prefix)["addr"]), int(str(_mapping(prefix)["len"]))
        other = Prefix(parse_ip(text), length)
    except (KeyError, ValueError):
        return None
    return True if other.covers(block) else None if other.overlaps(block) else False


def _named(value: object, names: frozenset[str]) -> bool | None:
    """Whether an interface's name, perhaps with a ``*`` at its end, is all or none of some."""
    if not isinstance(value, str) or value.startswith("@"):
        return None
    if not names:
        return False if value == "lo" else None
    hits = sum(fnmatchcase(name, value.replace("[", "[[]")) for name in names)
    return True if hits == len(names) else None if hits else False


def _word(walk: Walk) -> str:
    return WORDS[walk.source.family][0]


def _key(obj: Mapping[str, object], name: str) -> Key:
    return str(obj.get("family")), str(obj.get("table")), str(obj.get(name))


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
