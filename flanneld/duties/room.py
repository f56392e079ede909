"""Says in time that the network is running out of subnets (failures F27): whoever finds none is told too late."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from flanneld.model.lease import LeaseTable
from flanneld.model.netconf import NetConf
from flanneld.plan.allocate import Room, room
from flanneld.plan.claim import subnets_of

log = logging.getLogger("flanneld.lease")

FEW = 0.2
"""Share of free subnets from which on it is said, once."""
MANY = 0.3
"""Share of free subnets above which that counts as over."""
LOOK_S = 1.0
"""Shortest time between two looks."""
FIRST_S = 2.0
"""Before the first look: a start has better things to do."""
LOOK_SHARE = 0.005
"""Longest share of one processor that looks may take: one costs 30 ms with 5000 leases, 0.4 s with 50 000."""

REMEDY = "release leases of hosts that are gone (flannelctl leases gc) or enlarge it"


class RoomWatch:
    """See above.

    Args:
        table: everybody's leases.
        conf: the network configuration as it is now; None where others than hosts share out the subnets.
        look_s: see ``LOOK_S``.
    """

    def __init__(self, table: LeaseTable, conf: Callable[[], NetConf | None], *, look_s: float = LOOK_S) -> None:
        self._table, self._conf, self._look_s = table, conf, look_s
        self._news = asyncio.Event()
        self._told_few = self._told_full = False
        self.now: Room | None = None
        """How many subnets are left, as of the last look; None when that cannot be known."""

    def leases_changed(self) -> None:
        """To be called when the list of leases changed."""
        self._news.set()

    async def run(self) -> None:
        """Look after changes, for ever."""
        await self._news.wait()
        await asyncio.sleep(min(FIRST_S, self._look_s))
        while True:
            await self._news.wait()
            self._news.clear()
            began = time.monotonic()
            self.now = await self._look()
            self._tell(self.now)
            await asyncio.sleep(max(self._look_s, (time.monotonic() - began) / LOOK_SHARE))

    async def _look(self) -> Room | None:
        conf, leases = self._conf(), list(self._table)
        if conf is None or not self._table.complete:
            return None
        # in a thread: a miss cannot wait for it
        return await asyncio.to_thread(room, conf, map(subnets_of, leases))

    def _tell(self, left: Room | None) -> None:
        if left is None or left.total == 1 or left.free > left.total * MANY:  # of one: made for this host alone
            self._told_few = self._told_full = False
        elif left.free == 0 and not self._told_full:
            self._told_few = self._told_full = True
            log.warning("the network is full, no other host can join it: %s of=%d", REMEDY, left.total)
        elif left.free <= left.total * FEW and not self._told_few:
            self._told_few = True
            log.warning("the network is running out of subnets: %s free=%d of=%d", REMEDY, left.free, left.total)
