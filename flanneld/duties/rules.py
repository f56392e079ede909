"""Keeps the firewall rules in place, whichever tool makes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from flanneld.contracts import TrafficManager, TrafficRules
from flanneld.errors import ConfigError, KernelError
from flanneld.problems import Problem
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

RETRY_S = 2.0
"""After rules could not be put in place."""


class RuleKeeper:
    """Keeps the firewall rules in place: at once when told of a change, and every resync period."""

    def __init__(
        self,
        rules: TrafficManager,
        other: TrafficManager,
        wanted: Callable[[], Sequence[TrafficRules]],
        problem: Problem,
    ) -> None:
        self._rules, self._other = rules, other
        self._wanted = wanted
        self._problem = problem
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
                well = await self._ensure(" ".join(reasons.names) or "check")
                if well and cleaned is not self._other:
                    cleaned = self._other
                    await self._clean(cleaned)
                timeout_s = resync_s if well else min(resync_s, RETRY_S)
        finally:
            self._rules.close()

    async def _ensure(self, why: str) -> bool:
        try:
            changes = await self._rules.ensure(self._wanted())
        except (KernelError, ConfigError) as exc:
            if str(exc) != self._failing:
                log.error("firewall rules are not in place, trying again: %s", exc)
            self._failing = str(exc)
            self._problem(f"firewall rules: {exc}")
            return False
        for change in changes:
            log.info("%s, reason=%s", change, why)
        if self._failing:
            log.info("firewall rules are in place again")
        self._failing = ""
        self._problem(None)
        return True

    async def _clean(self, other: TrafficManager) -> None:
        """Remove what the other tool left (contract 8.20); its absence or failure harms nothing."""
        try:
            for change in await other.remove():
                log.info("%s", change)
        except (KernelError, ConfigError) as exc:
            log.warning("rules made by %s may be left over: %s", other.name, exc)
