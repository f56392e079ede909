"""Masquerade and forward rules by nftables (``EnableNFTables``): two tables of our own, replaced whole.

What the rules are is decided in ``plan/``; here ``nft`` is run and the kernel's announcements heard.
In steady state ``ensure`` costs one netlink request and no process (failures F38, F39).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from flanneld.contracts import TrafficRules, Wake
from flanneld.errors import KernelError
from flanneld.kernel.nft_events import NftEvents
from flanneld.kernel.run import find, run
from flanneld.model.addr import Family, Prefix
from flanneld.plan.traffic_nft import (
    TABLES,
    Table,
    blocks_in,
    parse_table,
    render_file,
    render_random_probe,
    render_removal,
    wanted_table,
)

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_OURS = {(int(family), name) for family, (_, name) in TABLES.items()}


class Nftables:
    """The tables ``ip flannel-ipv4`` and ``ip6 flannel-ipv6`` (contract 8.14 to 8.18)."""

    name = "nftables"

    def __init__(self) -> None:
        self._events = NftEvents(lambda family, table, chain: (family, table) in _OURS)
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
            wrong = [family for family in todo if not await self._is_right(family, rules.get(family))]
            if not wrong:
                return changes
            if self._random is None and any(r.fully_random and r.masquerade for r in rules.values()):
                self._random = await _knows_random()
            # one transaction, so that traffic meets the old rules or the new ones
            tables = {family: self._table(rules.get(family)) for family in wrong}
            await run("nft", "-f", "-", stdin=render_file(tables))
            changes += [f"replaced nftables table {' '.join(TABLES[family])}" for family in wrong]
        raise KernelError(
            "set nftables rules", 0, "they differ again right after each write; does another flanneld run here?"
        )

    async def _is_right(self, family: Family, rules: TrafficRules | None) -> bool:
        self._good.pop(family, None)
        version = self._events.version(family)
        if await _list(family) != self._table(rules):
            return False
        self._good[family] = (version, rules)
        return True

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
        there = [family for family in Family if await _exists(family)]
        if there:
            with self._events.held():
                await run("nft", "-f", "-", stdin=render_removal(there))
        return [f"deleted nftables table {' '.join(TABLES[family])}" for family in there]

    async def remnants(self) -> dict[Family, frozenset[Prefix]]:
        """By family whose table exists, the blocks that its rules speak of."""
        if find("nft") is None:
            return {}
        return {
            family: blocks_in(json.loads(await run("nft", "-j", "list", "table", *TABLES[family])))
            for family in Family
            if await _exists(family)
        }

    async def remove_table(self, family: Family) -> None:
        """Remove the table of one family."""
        self._good.clear()
        with self._events.held():
            await run("nft", "-f", "-", stdin=render_removal([family]))

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


async def _list(family: Family) -> Table | None:
    """The table as the kernel has it; None when it is missing or nothing we could have made."""
    try:
        text = await run("nft", "-j", "list", "table", *TABLES[family])
    except KernelError as exc:
        if "No such file or directory" in exc.detail:
            return None
        raise
    try:
        return parse_table(json.loads(text))
    except ValueError as exc:
        raise KernelError("list nftables rules", 0, "nft was built without JSON; install Debian's nftables") from exc


async def _exists(family: Family) -> bool:
    try:
        await run("nft", "list", "table", *TABLES[family])
    except KernelError as exc:
        # no such table, or no nftables in this kernel at all: nothing to remove either way
        _log.debug("nftables table is not there table=%s cause=%s", TABLES[family][1], exc)
        return False
    return True


async def _knows_random() -> bool:
    try:
        await run("nft", "-c", "-f", "-", stdin=render_random_probe())
    except KernelError as exc:
        _log.warning("nftables cannot randomise masquerade ports, going without cause=%s", exc)
        return False
    return True
