"""Keeps the firewall rules in place, whichever tool makes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from flanneld.contracts import TrafficManager, TrafficRules
from flanneld.errors import ConfigError, KernelError
from flanneld.plan.fights import FIGHT_S, GAP_S, Fights
from flanneld.problems import Problem
from flanneld.wake import Reasons, Wake

log = logging.getLogger("flanneld")

RETRY_S = 2.0
"""After rules could not be put in place."""

RULES = "rules"
WANTED = frozenset({"configuration", "other tool"})
"""Reasons for which rules change because we want others."""


class RuleKeeper:
    """Keeps the firewall rules in place: at once when told of a change, and every resync period."""

    def __init__(
        self,
        rules: TrafficManager,
        other: TrafficManager,
        wanted: Callable[[], Sequence[TrafficRules]],
        problem: Problem,
        remark: Problem = lambda _: None,
        repaired: Callable[[str, str, float], None] = lambda _kind, _text, _after_s: None,
    ) -> None:
        self._rules, self._other = rules, other
        self._wanted = wanted
        self._problem, self._remark, self._repaired = problem, remark, repaired
        self._fights = Fights()
        self._were_right = False
        """Whether the rules that are wanted now have been in place, so that a change is a repair."""
        self._failing = ""
        self.wake = Wake()

    def use(self, rules: TrafficManager, other: TrafficManager) -> None:
        """Change to the other tool; the former one's rules are removed after the new ones are in place."""
        self._rules.close()
        self._rules, self._other = rules, other
        self._rules.watch(self.wake)
        self.wake("other tool")

    async def run(self, resync_s: float) -> None:
        """Keep rules right, for ever."""
        self._rules.watch(self.wake)
        cleaned: TrafficManager | None = None
        timeout_s = 0.0
        try:
            while True:
                reasons = await self.wake.wait(timeout_s)
                if (held_s := self._held_back_s(reasons)) > 0:
                    timeout_s = held_s
                    continue
                well = await self._ensure(reasons)
                if well and cleaned is not self._other:
                    cleaned = self._other
                    await self._clean(cleaned)
                timeout_s = resync_s if well else min(resync_s, RETRY_S)
        finally:
            self._rules.close()

    def _held_back_s(self, reasons: Reasons) -> float:
        """Seconds to leave the rules alone, because another program undoes each repair; 0 = none."""
        now = time.monotonic()
        if self._fights.settle(now):
            self._remark(None)
            log.info("firewall rules are left alone again")
        return self._fights.wait_s(RULES, now) if WANTED.isdisjoint(reasons.names) else 0.0

    async def _ensure(self, reasons: Reasons) -> bool:
        try:
            changes = await self._rules.ensure(self._wanted())
        except (KernelError, ConfigError) as exc:
            if str(exc) != self._failing:
                log.error("firewall rules are not in place, trying again: %s", exc)
            self._failing = str(exc)
            self._problem(f"firewall rules: {exc}")
            return False
        for change in changes:
            log.info("%s, reason=%s", change, " ".join(reasons.names) or "check")
        if changes and self._were_right and WANTED.isdisjoint(reasons.names):
            self._note_repair(changes, time.monotonic() - reasons.since)
        if self._failing:
            log.info("firewall rules are in place again")
        self._failing = ""
        self._were_right = True
        self._problem(None)
        return True

    def _note_repair(self, changes: Sequence[str], after_s: float) -> None:
        """What was put back had been changed by somebody else."""
        for change in changes:
            self._repaired("rules", change, after_s)
        before = self._fights.is_fight(RULES)
        self._fights.may_repair(RULES, time.monotonic())
        if self._fights.is_fight(RULES) and not before:
            sentence = (
                f"another program changes our {self._rules.name} rules again and again, so they are put right every "
                f"{FIGHT_S:.0f} to {GAP_S[1]:.0f} s: have it leave rules and chains alone that it has not made"
            )
            log.warning("%s", sentence)
            self._remark(sentence)

    async def _clean(self, other: TrafficManager) -> None:
        """Remove what the other tool left (contract 8.20); its absence or failure harms nothing."""
        try:
            for change in await other.remove():
                log.info("%s", change)
        except (KernelError, ConfigError) as exc:
            log.warning("rules made by %s may be left over: %s", other.name, exc)
