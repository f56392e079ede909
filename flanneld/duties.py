"""The daemon's smaller long-lived duties, each a class with one ``run``: rules, underlay, idle peers, misses.

None of them decides anything about peers; none runs without being started in ``app.py``'s task group.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from flanneld.contracts import DataPath, TrafficManager, TrafficRules
from flanneld.errors import ConfigError, KernelError, Unavailable
from flanneld.kernel.listen import Hint, Miss
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import IP, MAC, format_ip
from flanneld.model.host import ExtIface, HostNet
from flanneld.model.lease import LeaseTable
from flanneld.plan.drift import Entry, judge
from flanneld.plan.extiface import follow
from flanneld.problems import Problem
from flanneld.startup import Standing
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

REAP_EVERY_S = 30.0
RULES_RETRY_S = 2.0
CONFIRM_S = 0.25
"""Longest wait for the store before an address is refused; senders get "unreachable" after it, or 3 s of silence."""
MAX_OPEN = 4096
"""Addresses waiting to be refused; the kernel's neighbour table holds fewer (gc_thresh3, 1024 by default)."""


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
                timeout_s = resync_s if well else min(resync_s, RULES_RETRY_S)
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


class UnderlayWatch:
    """Follows the external interface's address and MTU (contract 5.12 is what we do better)."""

    def __init__(
        self,
        read: Callable[[], HostNet],
        standing: Standing,
        path: DataPath,
        changed: Callable[[ExtIface], None],
        problem: Problem,
    ) -> None:
        self._read, self._standing, self._path = read, standing, path
        self._changed = changed
        self._problem = problem
        self.wake = Wake()

    async def run(self, then: Wake) -> None:
        """Look whenever something about the underlay changed, then hand the reason on."""
        while True:
            reasons = await self.wake.wait()
            self.look()
            for name in reasons.names:
                then(name)

    def look(self) -> None:
        """Take the interface as it is now."""
        standing = self._standing
        before = standing.ext
        try:
            net = self._read()
            ext = follow(before, net, standing.wish, standing.conf.families())
        except (KernelError, ConfigError) as exc:
            self._problem(f"external interface {before.name}: {exc}")
            return
        if ext is None:
            self._problem(f"external interface {before.name} is away or has no address")
            return
        link = net.link(ext.name)
        self._problem(None if link and link.up else f"external interface {ext.name} is down or has no carrier")
        if ext == before:
            return
        try:
            standing.backend.mtu(ext)
            self._path.configure(ext)
        except ConfigError as exc:
            self._problem(f"external interface {ext.name}: {exc}")
            log.error("external interface changed and cannot be used: %s", exc)
            return
        log.info("external interface changed: %s; it was %s", _brief(ext), _brief(before))
        self._changed(ext)


def _brief(ext: ExtIface) -> str:
    addresses = ",".join(format_ip(ip) for ip in (ext.ip, ext.ip6) if ip)
    public = ",".join(format_ip(ip) for ip in (ext.public_ip, ext.public_ip6) if ip)
    return f"{ext.name} index={ext.ifindex} addresses={addresses} public={public} mtu={ext.mtu}"


class Pager:
    """Answers misses as they come, and takes idle peers out of the tables now and then.

    A peer that we know is answered at once. Before an address is refused the store is asked once whether
    somebody leased it a moment ago: a host's first packet can overtake the news of its lease, and so can the
    answer to it. The kernel keeps the packet meanwhile. All addresses that come up during one question share
    the next one, so a scan costs the store one request at a time.
    """

    def __init__(
        self,
        kernel: Rtnl,
        path: DataPath,
        table: LeaseTable,
        wake: Wake,
        catch_up: Callable[[], Awaitable[bool]],
        take_leases: Callable[[], None],
    ) -> None:
        self._kernel, self._path, self._table, self._wake = kernel, path, table, wake
        self._catch_up, self._take_leases = catch_up, take_leases
        self._open: dict[tuple[str, IP | None, MAC | None], None] = {}
        """Questions that would be refused as far as we know."""
        self._unsure = asyncio.Event()

    def answer(self, misses: Sequence[Miss]) -> None:
        """Answer at once, on this turn of the loop.

        Before the first complete list of leases nothing is answered: the kernel keeps the packets and asks
        again, and the first full cycle looks at what is still open.
        """
        if not self._table.complete:
            return
        devices = self._devices()
        known = []
        for miss in misses:
            if miss.ifindex not in devices:
                continue
            question = (devices[miss.ifindex], miss.ip, miss.mac if miss.ip is None else None)
            if not self._path.is_unknown(*question[:2]):
                known.append(question)
            elif len(self._open) < MAX_OPEN:
                self._open[question] = None
                self._unsure.set()
        self._write(known)

    def _write(self, questions: Iterable[tuple[str, IP | None, MAC | None]]) -> None:
        failures = self._kernel.apply_now(self._path.answer(questions))
        if failures:
            log.debug("an answer failed, looking again: %s", failures[0].error)
            self._wake("answer failed")

    async def refuse(self) -> None:
        """Refuse what nobody has leased, once the store has confirmed it, or does not answer in time; for ever."""
        while True:
            await self._unsure.wait()
            self._unsure.clear()
            questions, self._open = self._open, {}
            try:
                async with asyncio.timeout(CONFIRM_S):
                    if await self._catch_up():
                        self._take_leases()
            except (Unavailable, ConfigError, TimeoutError):
                pass  # the senders wait: as far as we know, nobody has these addresses
            self._write(questions)

    def _devices(self) -> dict[int, str]:
        found = {}
        for device in self._path.own.devices:
            try:
                found[self._kernel.index(device)] = device
            except KernelError:
                continue
        return found

    async def run(self) -> None:
        """Page idle peers out, for ever."""
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            for device in self._path.wants_page_out():
                try:
                    self.reap(device)
                except KernelError as exc:
                    log.warning("idle peers cannot be found now, later: %s", exc)

    def reap(self, device: str) -> None:
        """Take the longest idle peers of one device out of the tables."""
        answered = self._kernel.answered(device)
        ops = self._path.page_out(device, self._kernel.idle_s(device), answered)
        failures = self._kernel.apply_now(ops)
        if ops:
            log.info("paged out idle peers: entries=%d failed=%d", len(ops), len(failures))


class HintFilter:
    """Turns kernel notifications into work, dropping those that agree with what we want."""

    def __init__(self, path: DataPath, damaged: Callable[[Entry], None], wake: Wake, underlay: Wake) -> None:
        self._path, self._damaged, self._wake, self._underlay = path, damaged, wake, underlay

    def __call__(self, hint: Hint) -> None:
        """Judge one notification."""
        found = judge(
            hint.obj,
            new=hint.new,
            desired=self._path.desired,
            own=self._path.own,
            watch_routes=self._path.watches_routes,
        )
        if isinstance(found, str):
            (self._underlay if found.startswith("underlay") else self._wake)(found)
        elif found is not None:
            self._damaged(found)
