"""Answers the kernel's misses, and takes idle peers out of its tables (design/misses.md)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from flanneld.contracts import DataPath
from flanneld.errors import ConfigError, KernelError, Unavailable
from flanneld.kernel.listen import Miss
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.addr import IP, MAC
from flanneld.model.lease import LeaseTable
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

REAP_EVERY_S = 30.0
"""How often idle peers are looked for, above the bound."""

CONFIRM_S = 0.25
"""Longest wait for the store before an address is refused; senders get "unreachable" after it, or 3 s of silence."""

MAX_OPEN = 4096
"""Addresses waiting to be refused; the kernel's neighbour table holds fewer (gc_thresh3, 1024 by default)."""


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

        Before leases are known nothing is answered: the kernel keeps the packets and asks
        again, and the first full cycle looks at what is still open.
        """
        if not self._table.usable:
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
