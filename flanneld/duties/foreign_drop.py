"""Names rules of other programs that drop what the overlay forwards (failure F08). Tells only: they are not ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from flanneld.contracts import DataPath
from flanneld.errors import KernelError
from flanneld.kernel import nft
from flanneld.kernel.nft_events import NftEvents
from flanneld.model.addr import Family
from flanneld.plan.foreign_drop import Walk, certain_drops, forward_tables, walks
from flanneld.problems import Notices, Remarks
from flanneld.startup import Standing
from flanneld.wake import heard

log = logging.getLogger("flanneld")

SETTLE_S = 1.0
"""Between a change and the look, and between two looks that have to agree: a reload passes through states like these,
and so do repairs of our own rules."""
GAPS_S = (1.0, 60.0)
"""Shortest and longest time between two looks, each of which starts a few processes: it doubles while rules keep
changing, as kube-proxy's do, and is short again after the longest one without a change."""


class DropWatch:
    """Looks after each change of nftables rules, iptables' own in that form included; legacy tables are not seen.

    Args:
        packets: what this host forwards, as of now.
        remark: what to say in the status.
    """

    def __init__(self, packets: Callable[[], Sequence[Walk]], remark: Remarks) -> None:
        self._packets, self._notices = packets, Notices(log, remark)
        self._told: list[str] = []

    async def run(self, ready: asyncio.Event) -> None:
        """Look for ever, from when our own rules are in place."""
        await ready.wait()
        changed = asyncio.Event()
        changed.set()
        events = NftEvents(lambda _family, _table, _chain: True)
        gap_s, again_s = GAPS_S[0], None
        with contextlib.closing(events):
            while True:
                since = time.monotonic()
                await heard(changed, again_s)
                gap_s = GAPS_S[0] if time.monotonic() - since > GAPS_S[1] else min(2 * gap_s, GAPS_S[1])
                changed.clear()
                again_s = None
                try:
                    events.watch(lambda _reason: changed.set())
                    for family in Family:
                        events.version(family)  # what changes from here on is news
                    await self._look()
                except KernelError as exc:
                    log.debug("rules of others cannot be read cause=%s", exc)
                    again_s = GAPS_S[1]  # no change will tell that they can be
                await asyncio.sleep(gap_s)

    async def _look(self) -> None:
        await asyncio.sleep(SETTLE_S)
        found = await self._find()
        if found != self._told:
            await asyncio.sleep(SETTLE_S)
            found = [sentence for sentence in await self._find() if sentence in found]
        self._told = found
        self._notices.say(found)

    async def _find(self) -> list[str]:
        found: list[str] = []
        for name in forward_tables(await nft.list_chains()):
            listing = await nft.list_rules(name)
            if listing is not None:
                found += certain_drops(listing, self._packets())
        return found


def forwarded(standing: Standing, path: DataPath) -> list[Walk]:
    """What this host forwards for the overlay; nothing is known of a backend without devices and routes."""
    if standing.conf.backend_type == "alloc":
        return []
    devices = path.own.devices
    if not devices or path.watches_routes:  # some peers, or all, are reached without a tunnel
        devices |= {standing.ext.name}
    return [
        walk
        for family, subnet in standing.subnets.items()
        if (part := standing.conf.family(family))
        for walk in walks(part.network, subnet, devices)
    ]
