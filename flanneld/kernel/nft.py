"""Masquerade and forward rules by nftables (``EnableNFTables``): two tables of our own, replaced whole.

What the rules are is decided in ``plan/``; here ``nft`` is run and the kernel's announcements heard.
In steady state ``ensure`` costs one netlink request and no process (failures F38, F39).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from flanneld.contracts import TrafficRules, Wake
from flanneld.errors import KernelError
from flanneld.kernel.nft_events import NftEvents
from flanneld.kernel.run import find, run
from flanneld.model.addr import Family, Prefix
from flanneld.plan.rule_owner import Us
from flanneld.plan.traffic_nft import (
    Table,
    blocks_in,
    is_table,
    parse_table,
    render_file,
    render_random_probe,
    render_removal,
    rules_in,
    table_name,
    wanted_table,
)

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_LARGEST_READ = 1 << 20
"""Characters of another program's table, some thousand rules: a few hundredths of a second to decode."""
Name: TypeAlias = tuple[str, str]
"""nft's word for the family, and a table's name."""


class _Look(NamedTuple):
    """What one family's tables are like."""

    mark: str
    """What the name of our table ends with."""
    right: bool
    surplus: tuple[Name, ...]
    """Tables of ours that must not be there."""


class Nftables:
    """The tables ``ip flannel-ipv4`` and ``ip6 flannel-ipv6`` (contract 8.14 to 8.18).

    Args:
        us: whose rules they are; None = there is only one network on this host.
    """

    name = "nftables"

    def __init__(self, us: Us | None = None) -> None:
        self._us = us
        marks = ("", us.mark) if us else ("",)
        watched = {(int(family), table_name(family, mark)[1]) for family in Family for mark in marks}
        self._events = NftEvents(lambda family, table, chain: (family, table) in watched)
        self._good: dict[Family, tuple[int, TrafficRules | None]] = {}
        """What was last found in place, and the version of the kernel's rules it was found in."""
        self._random: bool | None = None
        """Whether the kernel and nft know ``fully-random``; None = not tried yet."""

    async def ensure(self, wanted: Sequence[TrafficRules]) -> Sequence[str]:
        """See ``TrafficManager.ensure``. Not to be called twice at the same time."""
        rules = {rules.network.family: rules for rules in wanted}
        todo = [f for f in Family if self._good.get(f) != (self._events.version(f), rules.get(f))]
        if not todo:
            return ()
        with self._events.held():
            return await self._converge(todo, rules)

    async def _converge(self, todo: list[Family], rules: Mapping[Family, TrafficRules]) -> list[str]:
        changes: list[str] = []
        for _ in range(_ATTEMPTS):
            versions = {family: self._events.version(family) for family in todo}
            names = await _names()
            looks = {family: await self._look(family, rules.get(family), names) for family in todo}
            wrong = {family: look for family, look in looks.items() if not look.right or look.surplus}
            self._good |= {family: (versions[family], rules.get(family)) for family in looks.keys() - wrong.keys()}
            if not wrong:
                return changes
            if self._random is None and any(r.fully_random and r.masquerade for r in rules.values()):
                self._random = await _knows_random()
            # one transaction, so that traffic meets the old rules or the new ones
            text = ""
            for family, look in wrong.items():
                if not look.right:
                    text += render_file({family: self._table(rules.get(family))}, look.mark)
                    changes.append(f"replaced nftables table {' '.join(table_name(family, look.mark))}")
                text += render_removal(look.surplus)
                changes += [f"deleted nftables table {' '.join(name)}" for name in look.surplus]
            await run("nft", "-f", "-", stdin=text)
        raise KernelError(
            "set nftables rules", 0, "they differ again right after each write; does another flanneld run here?"
        )

    async def _look(self, family: Family, rules: TrafficRules | None, names: set[Name]) -> _Look:
        self._good.pop(family, None)
        mark, plain, own = await self._place(family, names)
        if mark and rules is None:
            # nothing is wanted, and the table that always exists is another network's
            right, surplus = True, own is not None
        else:
            found = own if mark else plain
            right = found is not None and parse_table(found) == self._table(rules)
            surplus = own is not None and not mark
        return _Look(mark, right, (self._own_name(family),) if surplus else ())

    async def _place(self, family: Family, names: set[Name]) -> tuple[str, object, object]:
        """What the name of our table ends with; the plain table and our own, None = it does not exist."""
        plain = await _list(table_name(family)) if table_name(family) in names else None
        if self._us is None:
            return "", plain, None
        own = await _list(self._own_name(family)) if self._own_name(family) in names else None
        rules = rules_in(plain)
        # Where both exist, and a flush emptied them, each daemon stays with its own.
        stays = plain is not None and own is not None and not any(map(self._us.wrote, rules))
        return self._us.mark if stays or self._us.others(rules) else "", plain, own

    def _own_name(self, family: Family) -> Name:
        return table_name(family, self._us.mark if self._us else "")

    def _table(self, rules: TrafficRules | None) -> Table:
        if rules and self._random is False:
            rules = rules._replace(fully_random=False)
        # both tables always exist, empty where nothing is wanted (contract 8.14)
        return wanted_table(rules)

    async def remove(self) -> Sequence[str]:
        """See ``TrafficManager.remove``; nothing to do where nft is not installed (contract 8.20)."""
        self._good.clear()
        if find("nft") is None:
            return ()
        try:
            names = await _names()
        except KernelError as exc:
            # no nftables in this kernel at all: nothing to remove either
            _log.debug("nftables tables cannot be listed cause=%s", exc)
            return ()
        there: list[Name] = []
        for family in Family:
            mark, plain, own = await self._place(family, names)
            there += [table_name(family)] if plain is not None and not mark else []
            there += [self._own_name(family)] if own is not None else []
        if there:
            with self._events.held():
                await run("nft", "-f", "-", stdin=render_removal(there))
        return [f"deleted nftables table {' '.join(name)}" for name in there]

    async def remnants(self) -> dict[Name, frozenset[Prefix]]:
        """By table of flannel's, whichever network's, the blocks that its rules speak of."""
        if find("nft") is None:
            return {}
        names = sorted(name for name in await _names() if any(is_table(family, *name) for family in Family))
        return {name: blocks_in(await _list(name)) for name in names}

    async def remove_table(self, name: Name) -> None:
        """Remove one table."""
        self._good.clear()
        with self._events.held():
            await run("nft", "-f", "-", stdin=render_removal([name]))

    def watch(self, wake: Wake) -> None:
        """See ``TrafficManager.watch``."""
        try:
            self._events.watch(wake)
        except KernelError as exc:
            # ensure() will say so too, and watching begins when it works
            _log.info("nftables changes are not announced yet cause=%s", exc)

    def close(self) -> None:
        """See ``TrafficManager.close``."""
        self._events.close()


async def remove_empty_table(word: str, name: str) -> bool:
    """Remove a table, such as iptables-nft makes by being looked at, if it holds base chains without rules alone.

    Args:
        word: nft's word for the family.
        name: of the table.

    Returns:
        Whether it was removed; False also where nft is not installed.

    Raises:
        KernelError: somebody put a rule there at this moment, or nft failed.
    """
    if find("nft") is None:
        return False
    listing = json.loads(await run("nft", "-j", "list", "table", word, name))["nftables"]
    kinds = {kind for item in listing for kind in item} - {"metainfo", "table", "chain"}
    chains = [item["chain"] for item in listing if "chain" in item]
    if kinds or any(chain.get("policy") != "accept" for chain in chains):
        return False
    # by chain, because a chain with rules refuses to go while a table takes all along
    lines = [f"delete chain {word} {name} {chain['name']}\n" for chain in chains]
    await run("nft", "-f", "-", stdin="".join([*lines, f"delete table {word} {name}\n"]))
    return True


async def _names() -> set[Name]:
    """All tables that exist."""
    items = _parse(await run("nft", "-j", "list", "tables"))
    return {(str(item["table"]["family"]), str(item["table"]["name"])) for item in items if "table" in item}


async def _list(name: Name) -> object:
    """The listing of a table; None when it is missing."""
    try:
        return {"nftables": _parse(await run("nft", "-j", "list", "table", *name))}
    except KernelError as exc:
        if "No such file or directory" in exc.detail:
            return None
        raise


async def list_chains() -> Sequence[object]:
    """All chains that exist, without their rules; empty where nft is not installed.

    Raises:
        KernelError: nft failed.
    """
    return _parse(await run("nft", "-j", "list", "chains")) if find("nft") else []


async def list_rules(name: Name) -> Sequence[object] | None:
    """Chains and rules of anybody's table; None when it is gone by now, or larger than one turn of the loop may take.

    Raises:
        KernelError: nft failed.
    """
    try:
        text = await run("nft", "-j", "-t", "list", "table", *name)
    except KernelError as exc:
        if "No such file or directory" in exc.detail:
            return None
        raise
    return _parse(text) if len(text) <= _LARGEST_READ else None


def _parse(text: str) -> list[dict[str, Any]]:
    try:
        items: list[dict[str, Any]] = json.loads(text)["nftables"]
    except (ValueError, LookupError, TypeError, RecursionError) as exc:
        raise KernelError("list nftables rules", 0, "nft was built without JSON; install Debian's nftables") from exc
    return items


async def _knows_random() -> bool:
    try:
        await run("nft", "-c", "-f", "-", stdin=render_random_probe())
    except KernelError as exc:
        _log.warning("nftables cannot randomise masquerade ports, going without cause=%s", exc)
        return False
    return True
