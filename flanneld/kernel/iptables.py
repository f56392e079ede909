"""Masquerade and forward rules by iptables, in the variant (legacy or nf_tables) that the host uses.

What the rules are is decided in ``plan/``; here iptables' programs are run. Everything goes through
``iptables-save`` and one ``iptables-restore --noflush`` per family, which is atomic per table and takes the
xtables lock once. In steady state no process runs (failures F38, F39): the nf_tables variant is covered
by nftables' generation number and announcements, the legacy one by a fingerprint of the kernel's table, which is
taken when somebody lets go of the xtables lock, and now and then.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from flanneld.contracts import TrafficRules, Wake
from flanneld.errors import KernelError
from flanneld.kernel import xtables
from flanneld.kernel.lock_watch import LockWatch, lock_file
from flanneld.kernel.nft_events import NftEvents
from flanneld.kernel.run import find, run
from flanneld.model.addr import Family, Prefix
from flanneld.plan.rule_owner import Us
from flanneld.plan.traffic_iptables import FORWARD, MASQUERADE, Remnant, Repair, count_rules, remnants, repair

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_LOOK_SHARE = 0.01
"""Longest share of one processor that looking at legacy tables may take while others use them all the time."""
_STEM = {Family.V4: "iptables", Family.V6: "ip6tables"}
Variant: TypeAlias = Literal["nf_tables", "legacy"]
_HINTS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
_INFIX: dict[Variant, str] = {"nf_tables": "nft", "legacy": "legacy"}
Stamp: TypeAlias = int | tuple[bytes, ...]


class Tool(NamedTuple):
    """One family's programs of one variant: ``<prefix>-save`` and ``<prefix>-restore``."""

    family: Family
    variant: Variant
    prefix: str

    async def save(self) -> str:
        """All rules of this family and variant. Makes no table that is not there already."""
        return await run(f"{self.prefix}-save")

    async def restore(self, payload: str) -> None:
        """Apply a payload; waits for the xtables lock."""
        await run(f"{self.prefix}-restore", "--noflush", "-w", stdin=payload)


class Iptables:
    """The chains FLANNEL-POSTRTG and FLANNEL-FWD and the jumps to them (contract 8.1 to 8.6).

    Args:
        us: whose rules they are; None = there is only one network on this host.
    """

    name = "iptables"

    def __init__(self, us: Us | None = None) -> None:
        self._us = us
        self._chains = {
            place: (place.chain, *((place.of(us.mark).chain,) if us else ())) for place in (MASQUERADE, FORWARD)
        }
        watched = {
            (int(family), place.table, chain)
            for family in Family
            for place, chains in self._chains.items()
            for chain in ("", place.parent, *chains)  # "" = the whole table
        }
        self._events = NftEvents(lambda *change: change in watched)
        self._tools: dict[Family, Tool] = {}
        self._good: dict[Family, tuple[Stamp, TrafficRules | None]] = {}
        """What was last found in place, and the state of the kernel's rules it was found in."""
        self._random: dict[Family, bool] = {}
        """Where masquerade ports cannot be randomised: False."""
        self._looked_at_other_variant = False
        self._wake: Wake | None = None
        self._lock: LockWatch | None = None
        self._look_s = 0.0
        """What the last look at the tables cost."""

    async def ensure(self, wanted: Sequence[TrafficRules]) -> Sequence[str]:
        """See ``TrafficManager.ensure``. Not to be called twice at the same time."""
        by_family = {rules.network.family: rules for rules in wanted}
        began = time.monotonic()
        todo = [family for family in Family if not self._is_good(family, by_family.get(family))]
        self._look_s = time.monotonic() - began
        if not todo:
            self._watch_lock()
            return ()
        changes: list[str] = []
        failures: list[KernelError] = []
        with self._events.held():
            for family in todo:
                try:
                    changes += await self._converge(family, by_family.get(family))
                except KernelError as exc:
                    failures.append(exc)
            changes += await self._clean_other_variant()
        self._watch_lock()
        if failures:
            if changes:
                _log.info("firewall partly changed before a failure changes=%s", "; ".join(changes))
            raise failures[0]
        return changes

    def _is_good(self, family: Family, rules: TrafficRules | None) -> bool:
        good = self._good.get(family)
        return good is not None and good[1] == rules and good[0] == self._stamp(self._tools.get(family))

    def _stamp(self, tool: Tool | None) -> Stamp | None:
        """A value that changes when our rules may have; None when only ``iptables-save`` can tell."""
        if tool is None:
            return 0  # not installed, so there is nothing to change
        if tool.variant == "legacy":
            prints = [
                xtables.fingerprint(tool.family, place.table, place.parent, *chains)
                for place, chains in self._chains.items()
            ]
            return tuple(p for p in prints if p is not None) if None not in prints else None
        try:
            return self._events.version(tool.family)
        except KernelError:
            return None

    async def _converge(self, family: Family, rules: TrafficRules | None) -> list[str]:
        self._good.pop(family, None)
        tool = await self._tool(family)
        if tool is None:
            if rules is None or not (rules.masquerade or rules.forward):
                self._good[family] = (0, rules)
                return []
            raise KernelError(
                f"set {family.label} rules", errno.ENOENT, f"{_STEM[family]} is missing; apt-get install iptables"
            )
        changes: list[str] = []
        for _ in range(_ATTEMPTS):
            stamp = self._stamp(tool)
            todo = self._repair(await tool.save(), tool, rules, wrote=bool(changes))
            if not todo.changes:
                if stamp is not None:
                    self._good[family] = (stamp, rules)
                return changes
            await self._write(tool, todo, rules)
            changes += [f"{tool.prefix}: {change}" for change in todo.changes]
        raise KernelError(
            f"set {family.label} rules",
            0,
            f"{tool.prefix} lists other rules right after each write; does another flanneld run here?",
        )

    def _repair(self, saved: str, tool: Tool, rules: TrafficRules | None, wrote: bool) -> Repair:
        effective = self._effective(tool.family, rules)
        todo = repair(saved, tool.family, effective, self._us)
        if todo.changes and wrote and effective and effective.fully_random:
            # old kernels take --random-fully and forget it; to insist would be to write for ever (failures F12)
            plainer = repair(saved, tool.family, effective._replace(fully_random=False), self._us)
            if not plainer.changes:
                self._give_up_random(tool, "the kernel ignores the option")
                return plainer
        return todo

    async def _write(self, tool: Tool, todo: Repair, rules: TrafficRules | None) -> None:
        try:
            await tool.restore(todo.payload)
        except KernelError as exc:
            # told by trying: versions of iptables and of the kernel are no proof (failures F12)
            if exc.code or "--random-fully" not in todo.payload:
                raise
            try:
                await tool.restore(todo.payload.replace(" --random-fully", ""))
            except KernelError:
                raise exc from None
            self._give_up_random(tool, str(exc))

    def _give_up_random(self, tool: Tool, cause: str) -> None:
        self._random[tool.family] = False
        _log.warning("iptables cannot randomise masquerade ports, going without tool=%s cause=%s", tool.prefix, cause)

    def _effective(self, family: Family, rules: TrafficRules | None) -> TrafficRules | None:
        if rules and not self._random.get(family, True):
            return rules._replace(fully_random=False)
        return rules

    async def _tool(self, family: Family) -> Tool | None:
        if family not in self._tools:
            tool = await _host_choice(family)
            if tool is None:
                return None
            self._tools[family] = tool
        return self._tools[family]

    async def _clean_other_variant(self) -> list[str]:
        """Once: remove our rules from the variant the host does not use, and warn when others' are there.

        The kernel evaluates both, so what one accepts or rewrites the other can undo (failures F09).
        """
        if self._looked_at_other_variant:
            return []
        self._looked_at_other_variant = True
        changes: list[str] = []
        mixed: list[str] = []
        for choice in self._tools.values():
            other = _variant(choice.family, "legacy" if choice.variant == "nf_tables" else "nf_tables")
            if other is None or not _may_have_rules(other):
                continue
            try:
                changes += await self._remove(other)
                count = count_rules(await other.save())
            except KernelError as exc:
                _log.warning("cannot look for stale rules in the other iptables variant cause=%s", exc)
                continue
            if count:
                mixed.append(f"{other.prefix}={count}")
        if mixed:
            _log.warning(
                "iptables rules exist in a variant that this host does not use; the kernel evaluates both, so they"
                " can undo ours: remove them or switch with update-alternatives rules=%s",
                ",".join(mixed),
            )
        return changes

    async def remove(self) -> Sequence[str]:
        """See ``TrafficManager.remove``: both families, both variants, whatever is installed (contract 8.20)."""
        self._good.clear()
        changes: list[str] = []
        failures: list[KernelError] = []
        with self._events.held():
            for family in Family:
                try:
                    for tool in await self._all_tools(family):
                        changes += await self._remove(tool)
                except KernelError as exc:
                    failures.append(exc)
        if failures:
            raise failures[0]
        return changes

    async def _remove(self, tool: Tool) -> list[str]:
        if not _may_have_rules(tool):
            return []
        todo = repair(await tool.save(), tool.family, None, self._us)
        if todo.payload:
            await tool.restore(todo.payload)
        return [f"{tool.prefix}: {change}" for change in todo.changes]

    async def remnants(self, networks: Sequence[Prefix]) -> list[tuple[Tool, Remnant]]:
        """What there is of flannel's in any family and variant, and whether it is of these networks."""
        return [
            (tool, remnant)
            for family in Family
            for tool in await self._all_tools(family)
            if _may_have_rules(tool)
            for remnant in remnants(await tool.save(), networks)
        ]

    async def _all_tools(self, family: Family) -> list[Tool]:
        tools = [tool for variant in _INFIX if (tool := _variant(family, variant))]
        choice = await self._tool(family)
        if choice and choice.variant not in [tool.variant for tool in tools]:
            tools.append(choice)
        return tools

    def watch(self, wake: Wake) -> None:
        """See ``TrafficManager.watch``; legacy tables announce nothing, who changes them takes a lock."""
        self._wake = wake
        try:
            self._events.watch(wake)
        except KernelError as exc:
            _log.info("firewall changes are not announced here, they are looked for now and then cause=%s", exc)

    def close(self) -> None:
        """See ``TrafficManager.close``."""
        self._events.close()
        self._wake = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _watch_lock(self) -> None:
        """Have ``ensure`` called when somebody has used a legacy program, where that is what this host uses."""
        wake = self._wake
        if wake is None or all(tool.variant != "legacy" for tool in self._tools.values()):
            return
        if self._lock is None:
            self._lock = LockWatch(
                lock_file(), lambda: wake("xtables lock released"), lambda: self._look_s / _LOOK_SHARE
            )
        self._lock.arm()


async def _host_choice(family: Family) -> Tool | None:
    """The variant behind the plain command name, which Debian's alternatives or an image's author decided."""
    stem = _STEM[family]
    if find(stem) is None:
        return await _choice_by_rules(family)
    # "iptables v1.8.9 (nf_tables)"; before 1.8 there was only legacy, and nothing in parentheses
    text = await run(stem, "--version")
    return Tool(family, "nf_tables" if "nf_tables" in text else "legacy", stem)


async def _choice_by_rules(family: Family) -> Tool | None:
    """The variant that the host's other programs use, where no plain name tells, as in our image (contract 10.6).

    kubelet leaves a chain as a hint to just that question. Else whichever has more rules, of both families because one
    of them may have none yet; and nf_tables where there are no rules at all.

    Source: kubernetes pkg/kubelet, KUBE-IPTABLES-HINT; kubernetes-sigs/iptables-wrappers.
    """
    tools = [tool for variant in _INFIX if (tool := _variant(family, variant))]
    if xtables.tables(family) is None:  # legacy tables are root's, whatever capabilities others have
        tools = [tool for tool in tools if tool.variant != "legacy"]
    if len(tools) < 2:
        return next(iter(tools), None)
    saved = {tool: await _saved_by_both(tool.variant) for tool in tools}
    hinted = [tool for tool in tools if any(f":{chain} " in saved[tool] for chain in _HINTS)]
    choice = max(hinted or tools, key=lambda tool: count_rules(saved[tool]))
    _log.info(
        "iptables variant chosen by the rules that exist tool=%s rules=%d", choice.prefix, count_rules(saved[choice])
    )
    return choice


async def _saved_by_both(variant: Variant) -> str:
    tools = [tool for family in Family if (tool := _variant(family, variant)) and _may_have_rules(tool)]
    return "".join([await tool.save() for tool in tools])


def _variant(family: Family, variant: Variant) -> Tool | None:
    prefix = f"{_STEM[family]}-{_INFIX[variant]}"
    return Tool(family, variant, prefix) if find(f"{prefix}-save") and find(f"{prefix}-restore") else None


def _may_have_rules(tool: Tool) -> bool:
    # spares the process, in the common case, of looking at legacy tables that do not exist
    return tool.variant == "nf_tables" or xtables.tables(tool.family) != frozenset()
