"""Our rules as nftables tables: writes the file for one transaction, reads ``nft -j list table``.

The tables are ours alone, proven by their names, so whatever else is found in them is replaced. Where the plain
name is another network's, ours have a longer one (``rule_owner.py``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flanneld.model.addr import Family, Prefix
from flanneld.plan.rule_owner import MARK_DIGITS
from flanneld.plan.traffic import (
    DONT_MASQUERADE_MARK,
    MULTICAST,
    Block,
    Rule,
    TrafficRules,
    Verdict,
    forward_rules,
    masquerade_rules,
)

TABLES = {Family.V4: ("ip", "flannel-ipv4"), Family.V6: ("ip6", "flannel-ipv6")}
"""nft's word for the family, and the table's name. Source: contract 8.14."""
_MARKED = re.compile(rf"-[0-9a-f]{{{MARK_DIGITS}}}")


def table_name(family: Family, mark: str = "") -> tuple[str, str]:
    """nft's word for the family, and the name of a table: the plain one, or one network's own."""
    word, name = TABLES[family]
    return word, f"{name}-{mark}" if mark else name


def is_table(family: Family, word: str, name: str) -> bool:
    """Whether a table is some network's."""
    plain_word, plain = TABLES[family]
    return word == plain_word and (name == plain or bool(_MARKED.fullmatch(name.removeprefix(plain))))


class Chain(NamedTuple):
    """A base chain, with its hook as ``nft -j`` tells it."""

    kind: str
    hook: str
    priority: int
    policy: str
    rules: tuple[Rule | None, ...]
    """None stands for a rule that we cannot have written."""


Table = Mapping[str, Chain]
"""The chains of one table by name."""

_COMMENTS = {
    "postrtg": "chain to manage traffic masquerading by flannel",
    "forward": "chain to accept flannel traffic",
}


def wanted_table(wanted: TrafficRules | None) -> Table:
    """The table of one family; without chains when the family or both features are off.

    Source: contract 8.15, 8.18 for names, hooks and priorities (srcnat = 100, filter = 0). The policy is
    never drop: an accept here would not undo a drop there for traffic that is not ours.
    """
    chains = {}
    if wanted and (rules := masquerade_rules(wanted)):
        chains["postrtg"] = Chain("nat", "postrouting", 100, "accept", rules)
    if wanted and (rules := forward_rules(wanted)):
        chains["forward"] = Chain("filter", "forward", 0, "accept", rules)
    return chains


def render_file(tables: Mapping[Family, Table], mark: str = "") -> str:
    """The ``nft -f`` file that replaces each table given, all of them in one transaction.

    ``delete`` fails on a missing table, hence the empty declaration before it.
    """
    return "".join(_render_table(family, table, mark) for family, table in tables.items())


def render_removal(names: Iterable[tuple[str, str]]) -> str:
    """The ``nft -f`` file that deletes these tables, which exist."""
    return "".join(f"delete table {' '.join(name)}\n" for name in names)


def render_random_probe() -> str:
    """A file for ``nft -c`` that the kernel accepts when it knows ``fully-random`` (contract 8.17)."""
    rule = Rule(Verdict.MASQUERADE, fully_random=True)
    return _render_table(Family.V4, {"postrtg": Chain("nat", "postrouting", 100, "accept", (rule,))})


def _render_table(family: Family, table: Table, mark: str = "") -> str:
    word, name = table_name(family, mark)
    lines = [f"table {word} {name}", f"delete table {word} {name}", f"table {word} {name} {{"]
    lines.append(f'  comment "rules for {name}"')
    for chain_name, chain in table.items():
        lines += [f"  chain {chain_name} {{", f'    comment "{_COMMENTS[chain_name]}"']
        lines.append(f"    type {chain.kind} hook {chain.hook} priority {chain.priority}; policy {chain.policy};")
        lines += [f"    {render_rule(rule, family)}" for rule in chain.rules if rule]
        lines.append("  }")
    return "\n".join([*lines, "}", ""])


def render_rule(rule: Rule, family: Family) -> str:
    """One rule as nft writes it."""
    word = TABLES[family][0]
    parts = [f"meta mark & {DONT_MASQUERADE_MARK:#x} == {DONT_MASQUERADE_MARK:#x}"] if rule.marked else []
    for field, block in (("saddr", rule.source), ("daddr", rule.destination)):
        if block:
            parts.append(f"{word} {field} {'!= ' if block.outside else ''}{block.prefix}")
    return " ".join([*parts, rule.verdict.value, *(["fully-random"] if rule.fully_random else [])])


def parse_table(listing: object) -> Table | None:
    """Read the decoded output of ``nft -j list table``.

    Returns:
        The chains found; None when the table holds anything we never make (sets, plain chains, flags such
        as ``dormant``) or the text is not a listing. Comments are not compared: nft before 1.0.7 omits
        them from JSON.
    """
    match listing:
        case {"nftables": [*items]}:
            pass
        case _:
            return None
    chains: dict[str, Chain] = {}
    rules: dict[str, list[Rule | None]] = {}
    for item in items:
        match item:
            case {"metainfo": _}:
                pass
            case {"table": dict(table)} if not table.get("flags"):
                pass
            case {
                "chain": {
                    "name": str(name),
                    "type": str(kind),
                    "hook": str(hook),
                    "prio": int(prio),
                    "policy": str(pol),
                }
            }:
                chains[name] = Chain(kind, hook, prio, pol, ())
            case {"rule": {"family": str(word), "chain": str(name), "expr": [*expressions]}}:
                rules.setdefault(name, []).append(_parse_rule(expressions, word))
            case _:
                return None
    return {name: chain._replace(rules=tuple(rules.get(name, ()))) for name, chain in chains.items()}


def rules_in(listing: object) -> list[Rule | None]:
    """All rules of a table, whatever else there is in it; None = not understood."""
    match listing:
        case {"nftables": [*items]}:
            pass
        case _:
            return []
    rules: list[Rule | None] = []
    for item in items:
        match item:
            case {"rule": {"family": str(word), "expr": [*expressions]}}:
                rules.append(_parse_rule(expressions, word))
    return rules


def blocks_in(listing: object) -> frozenset[Prefix]:
    """All blocks that a table's rules speak of, multicast aside, however the rules look: whose network they are of."""
    found: set[Prefix] = set()
    todo = [listing]
    while todo:
        match todo.pop():
            case {"prefix": {"addr": str(address), "len": int(length)}}:
                with contextlib.suppress(ValueError):
                    found.add(Prefix.parse(f"{address}/{length}"))
            case dict(item):
                todo += item.values()
            case list(items):
                todo += items
    return frozenset(found.difference(MULTICAST.values()))


def _parse_rule(expressions: list[object], word: str) -> Rule | None:
    family = Family.V6 if word == "ip6" else Family.V4
    source = destination = None
    marked = False
    for expression in expressions[:-1]:
        match expression:
            case {
                "match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, int(mask)]}, "right": int(value)}
            } if mask == value == DONT_MASQUERADE_MARK:
                marked = True
            case {"match": {"op": "==" | "!=" as op, "left": {"payload": {"field": field}}, "right": right}}:
                block = _parse_block(right, op == "!=", family)
                if block and field == "saddr" and source is None:
                    source = block
                elif block and field == "daddr" and destination is None:
                    destination = block
                else:
                    return None
            case _:
                return None
    match expressions[-1:]:
        case [{"masquerade": options}]:
            flags = options.get("flags") if isinstance(options, dict) else options
            if flags not in (None, "fully-random", ["fully-random"]):
                return None
            return Rule(Verdict.MASQUERADE, source, destination, marked, fully_random=flags is not None)
        case [{"return": None}]:
            return Rule(Verdict.RETURN, source, destination, marked)
        case [{"accept": None}]:
            return Rule(Verdict.ACCEPT, source, destination, marked)
        case _:
            return None


def _parse_block(right: object, outside: bool, family: Family) -> Block | None:
    match right:
        case {"prefix": {"addr": str(address), "len": int(length)}}:
            text = f"{address}/{length}"
        case str(address):
            text = f"{address}/{family.bits}"
        case _:
            return None
    try:
        return Block(Prefix.parse(text), outside)
    except ValueError:
        return None
