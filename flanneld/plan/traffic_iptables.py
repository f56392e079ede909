"""Our rules as iptables chains: compares what ``iptables-save`` printed with what is wanted.

Nothing here runs a program; the result is the text for one ``iptables-restore --noflush``.

Ours are the chains FLANNEL-POSTRTG and FLANNEL-FWD by name, and whatever in POSTROUTING and FORWARD either
jumps to them or carries flannel's comment (old flannel wrote its rules directly there). Where these chains serve
another network, ours have a longer name (``rule_owner.py``). All other rules, and the policies, belong to
somebody else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flanneld.model.addr import Family, Prefix
from flanneld.plan.rule_owner import MARK_DIGITS, Us
from flanneld.plan.traffic import (
    DONT_MASQUERADE_MARK,
    Block,
    Rule,
    TrafficRules,
    Verdict,
    blocks_named,
    forward_rules,
    masquerade_rules,
)


class Place(NamedTuple):
    """Where a set of rules lives."""

    table: str
    chain: str
    """Our own chain."""
    parent: str
    """The built-in chain that jumps to ours."""
    comment: str

    def of(self, mark: str) -> Place:
        """The same under a name of one network's own; the kernel takes 28 characters."""
        return self._replace(chain=f"{self.chain}-{mark}")


MASQUERADE = Place("nat", "FLANNEL-POSTRTG", "POSTROUTING", "flanneld masq")
FORWARD = Place("filter", "FLANNEL-FWD", "FORWARD", "flanneld forward")
"""Source: contract 8.1."""


class Repair(NamedTuple):
    """What has to be done; empty when nothing."""

    payload: str
    """Input of ``iptables-restore --noflush``."""
    changes: tuple[str, ...]
    """One sentence per change."""


def repair(saved: str, family: Family, wanted: TrafficRules | None, us: Us | None = None) -> Repair:
    """Compare and say how to get there.

    A chain with the wrong rules is refilled as a whole, which also drops those of a network this host was
    part of before (contract 8.11). The jump is appended as flannel does (contract 8.6) but only when it is
    missing, so that no repair, however often, makes a second one.

    Args:
        saved: output of ``iptables-save`` or ``ip6tables-save``.
        family: the family it is about.
        wanted: the rules for it; None when there must be none.
        us: whose rules they are; None = there is only one network, and all rules are its.
    """
    payload, changes = "", []
    listed = _listed(saved)
    for place, rules in (
        (MASQUERADE, masquerade_rules(wanted) if wanted else ()),
        (FORWARD, forward_rules(wanted) if wanted else ()),
    ):
        lines, reasons = _repair_place(listed[place.table], place, rules, us)
        if lines:
            payload += "\n".join([f"*{place.table}", *lines, "COMMIT", ""])
        changes += [f"{family.label} {place.table}: {reason}" for reason in reasons]
    return Repair(payload, tuple(changes))


def _repair_place(
    founds: dict[str, Found], place: Place, rules: Sequence[Rule], us: Us | None
) -> tuple[list[str], list[str]]:
    plain = founds[place.chain]
    if us is None:
        return _set_up(plain, rules) if rules else _take_down(plain)
    ours = place.of(us.mark)
    own = founds.get(ours.chain) or Found(ours)
    others = us.others([*plain.rules, *plain.stray_rules()])
    # Where both exist, and a flush emptied them, each daemon stays with its own.
    if others or (own.chain_exists and plain.chain_exists and not any(map(us.wrote, plain.rules))):
        lines, reasons = _withdraw(plain, us)
        used, unused = own, None
    else:
        lines, reasons, used, unused = [], [], plain, own
    for more_lines, more_reasons in (
        _set_up(used, rules) if rules else _take_down(used),
        _take_down(unused) if unused else ([], []),
    ):
        lines += more_lines
        reasons += more_reasons
    if others and not own.chain_exists and rules:
        reasons.append(f"{place.chain} is that of {' and '.join(sorted(map(str, others)))}, which keeps it")
    return lines, reasons


def _withdraw(plain: Found, us: Us) -> tuple[list[str], list[str]]:
    """Take our rules out of a chain that another network has."""
    lines = [f"-D {text}" for text, spec in plain.specs if spec and us.wrote(spec.rule())]
    return lines, [f"deleted {len(lines)} rules of ours from {plain.place.chain}"] if lines else []


class Remnant(NamedTuple):
    """Rules of flannel's in one table, for cleanup."""

    text: str
    payload: str
    """Input of ``iptables-restore --noflush`` that removes them."""
    blocks: frozenset[Prefix]
    """What the rules speak of."""
    others: frozenset[Prefix]
    """Of these, what belongs to another network; its rules stay, and with them chain and jump."""
    table: str
    is_alone: bool
    """Whether nothing but built-in chains that accept everything remains of the table."""


def remnants(saved: str, networks: Sequence[Prefix]) -> list[Remnant]:
    """What there is to remove for a network, table by table.

    Args:
        saved: output of ``iptables-save`` or ``ip6tables-save``.
        networks: its blocks, of both families.
    """
    founds = [found for places in _listed(saved).values() for found in places.values()]
    return [_remnant(found, networks) for found in founds if found.chain_exists or found.jumps or found.strays]


def _remnant(found: Found, networks: Sequence[Prefix]) -> Remnant:
    place = found.place
    rules = [(text, blocks_named([spec.rule()] if spec else [])) for text, spec in found.specs]
    blocks = frozenset[Prefix]().union(*(named for _text, named in rules))
    others = frozenset(b for b in blocks if not any(network.covers(b) for network in networks))
    mine = [text for text, named in rules if named and not named & others]
    if others and mine:
        lines, what = [f"-D {text}" for text in mine], f"{len(mine)} rules of chain {place.chain}"
    else:
        lines, _reasons = _take_down(found)
        parents = len(found.strays) + len(found.jumps) + len(found.others)
        what = f"chain {place.chain} with {len(found.rules)} rules" if found.chain_exists else ""
        what += f"{' and ' if what and parents else ''}{f'{parents} in {place.parent}' if parents else ''}"
    payload = "\n".join([f"*{place.table}", *lines, "COMMIT", ""]) if lines else ""
    return Remnant(f"{place.table}: {what}", payload, blocks, others, place.table, not (others or found.foreign))


def count_rules(saved: str) -> int:
    """Number of rules, anybody's, in the output of ``iptables-save``."""
    return sum(line.startswith("-A ") for line in saved.splitlines())


def render_rule(rule: Rule, place: Place) -> str:
    """One rule in the order in which ``iptables -S`` lists its parts (contract 8.3)."""
    parts = ["-A", place.chain]
    for option, block in (("-s", rule.source), ("-d", rule.destination)):
        if block:
            parts += [*(["!"] if block.outside else []), option, str(block.prefix)]
    if rule.marked:
        parts += ["-m mark --mark", f"{DONT_MASQUERADE_MARK:#x}/{DONT_MASQUERADE_MARK:#x}"]
    parts += [f'-m comment --comment "{place.comment}"', "-j", rule.verdict.value.upper()]
    return " ".join([*parts, *(["--random-fully"] if rule.fully_random else [])])


def render_jump(place: Place) -> str:
    """The rule in the built-in chain, without ``-A`` or ``-D``."""
    return f'{place.parent} -m comment --comment "{place.comment}" -j {place.chain}'


class Found:
    """What the listing shows of one place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.chain_exists = False
        self.rules: list[Rule | None] = []
        """Our chain's content; None = a rule we cannot have written."""
        self.jumps: list[str] = []
        """Unconditional jumps to our chain, each as saved after ``-A``."""
        self.others: list[str] = []
        """Conditional jumps to our chain: somebody's own, gone only when the chain goes."""
        self.foreign = False
        """Whether the table holds anything that is not flannel's: rules, chains, a policy."""
        self.specs: list[tuple[str, _Spec | None]] = []
        """Our chain's rules and the strays, each as saved after ``-A``, and as understood."""
        self.strays: list[str] = []
        """Rules with our comment in the built-in chain that are not jumps: left by an old flannel."""

    def stray_rules(self) -> list[Rule | None]:
        """The strays, as understood."""
        return [spec.rule() for text, spec in self.specs if spec and text in self.strays]

    def take(self, line: str) -> None:
        """Take notice of one line of the saved table."""
        place = self.place
        if line.startswith(f":{place.chain} "):
            self.chain_exists = True
        elif line.startswith(f"-A {place.chain} "):
            spec = _parse(line)
            self.rules.append(spec.rule() if spec else None)
            self.specs.append((line.removeprefix("-A "), spec))
        elif line.startswith(f"-A {place.parent} ") and ("FLANNEL" in line or place.comment in line):
            self._take_parent(line.removeprefix("-A "), _parse(line))
        elif line.startswith("-A ") or (line.startswith(":") and " ACCEPT " not in line):
            self.foreign = True

    def _take_parent(self, text: str, spec: _Spec | None) -> None:
        # a rule with matches of which we know nothing still shows its target and comment
        words = _words(text)
        target = words[words.index("-j") + 1] if "-j" in words[:-1] else ""
        if target != self.place.chain and is_chain(target, self.place):
            return  # another network's jump
        if target == self.place.chain:
            plain = spec is not None and spec.is_plain()
            (self.jumps if plain else self.others).append(text)
        elif _after(words, "--comment") == self.place.comment and _is_plain(self.place):
            self.strays.append(text)
            self.specs.append((text, spec))
        else:
            self.foreign = True


def is_chain(name: str, place: Place) -> bool:
    """Whether a chain of this name is some network's for this place; ``place`` is the plain one or any other."""
    stem, _, mark = name.partition(_stem(place))
    return not stem and bool(_MARK.fullmatch(mark))


_MARK = re.compile(rf"(-[0-9a-f]{{{MARK_DIGITS}}})?")


def _stem(place: Place) -> str:
    return MASQUERADE.chain if place.table == MASQUERADE.table else FORWARD.chain


def _is_plain(place: Place) -> bool:
    return place.chain == _stem(place)


def _listed(saved: str) -> dict[str, dict[str, Found]]:
    """By table, then by chain, what is found; the plain chains always."""
    places = {place.table: place for place in (MASQUERADE, FORWARD)}
    listed = {table: {place.chain: Found(place)} for table, place in places.items()}
    place, founds = MASQUERADE, dict[str, Found]()
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
            place, founds = places.get(table, MASQUERADE), listed.get(table, {})
        elif founds:
            if line.startswith(":"):  # declarations of chains come before all rules
                chain = line[1:].partition(" ")[0]
                if chain not in founds and is_chain(chain, place):
                    founds[chain] = Found(place._replace(chain=chain))
            for found in founds.values():
                found.take(line)
    return listed


def _set_up(found: Found, rules: Sequence[Rule]) -> tuple[list[str], list[str]]:
    place, lines, reasons = found.place, [], []
    if not found.chain_exists or found.rules != list(rules):
        lines.append(f":{place.chain} - [0:0]")  # creates, or empties
        lines += [render_rule(rule, place) for rule in rules]
        reasons.append(f"{'refilled' if found.chain_exists else 'made'} chain {place.chain}")
    surplus = [*found.strays, *found.jumps[1:]]
    if surplus:
        lines += [f"-D {text}" for text in surplus]
        reasons.append(f"deleted {len(surplus)} surplus rules of flannel from {place.parent}")
    if not found.jumps:
        lines.append(f"-A {render_jump(place)}")
        reasons.append(f"appended the jump from {place.parent} to {place.chain}")
    return lines, reasons


def _take_down(found: Found) -> tuple[list[str], list[str]]:
    place = found.place
    lines = [f"-D {text}" for text in (*found.strays, *found.jumps, *found.others)]
    reasons = [f"deleted {len(lines)} rules of flannel from {place.parent}"] if lines else []
    if found.chain_exists:
        lines += [f"-F {place.chain}", f"-X {place.chain}"]
        reasons.append(f"deleted chain {place.chain}")
    return lines, reasons


class _Spec(NamedTuple):
    """A saved rule of which every word was understood."""

    target: str
    source: Block | None
    destination: Block | None
    marked: bool
    fully_random: bool

    def is_plain(self) -> bool:
        return not (self.source or self.destination or self.marked)

    def rule(self) -> Rule | None:
        try:
            verdict = Verdict(self.target.lower())
        except ValueError:
            return None
        return Rule(verdict, self.source, self.destination, self.marked, self.fully_random)


def _parse(line: str) -> _Spec | None:
    """Understand one ``-A`` line; None when it says anything that none of our rules does."""
    words = iter(_words(line)[2:])
    target, source, destination, marked, random, outside = "", None, None, False, False, False
    try:
        for word in words:
            if word == "!":
                outside = True
                continue
            if word in ("-s", "--source"):
                source = _block(words, outside)
            elif word in ("-d", "--destination"):
                destination = _block(words, outside)
            elif word == "--mark" and not outside:
                value, _, mask = next(words).partition("/")
                if int(value, 0) != DONT_MASQUERADE_MARK or int(mask, 0) != DONT_MASQUERADE_MARK:
                    return None
                marked = True
            elif (word == "-m" and next(words) in ("mark", "comment")) or (word == "--comment" and next(words)):
                pass
            elif word == "-j":
                target = next(words)
            elif word == "--random-fully":
                random = True
            else:
                return None
            outside = False
    except (StopIteration, ValueError):
        return None
    return _Spec(target, source, destination, marked, random)


def _block(words: Iterator[str], outside: bool) -> Block:
    text = next(words)
    if "/" not in text:
        text += "/128" if ":" in text else "/32"
    return Block(Prefix.parse(text), outside)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # an unclosed quote: not a line of iptables-save
        return []


def _after(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words[:-1] else ""
