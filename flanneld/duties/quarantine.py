"""Keeps our lease for as long as the daemon runs, and what happens while another host has it: quarantine.

The loser of a subnet takes itself out of harm's way: no peers, and nothing gets into the network from here, for
replies would go to the winner and disturb what it has going on there. Local containers keep running, and reach
each other and the outside. Nothing of the winner's is touched (design/lease-protocol.md; failures F18, F19).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from flanneld.contracts import DataPath, Store
from flanneld.errors import LeaseLost, LeaseMoved
from flanneld.model.lease import Lease, LeaseTable
from flanneld.problems import Problem
from flanneld.retry import backoff
from flanneld.wake import heard

log = logging.getLogger("flanneld.lease")

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
"""How often the key is looked at again during quarantine; sooner when the list of leases tells of a change."""

FASTEST_S = 0.1
"""Between two looks, however often somebody writes."""


class LeaseGuard:
    """See above.

    Args:
        store: where the lease is.
        path: what moves packets on this host.
        table: everybody's leases, for news of our key.
        wake: the reconcile loop.
        problem: what keeps this host from being ready.

    Attributes:
        confirmed: set once the store has said that the lease is ours.
    """

    def __init__(
        self, store: Store, path: DataPath, table: LeaseTable, wake: Callable[[str], None], problem: Problem
    ) -> None:
        self._store, self._path, self._table, self._wake, self._problem = store, path, table, wake, problem
        self._news = asyncio.Event()
        self._seen: Lease | None = None
        self._told = ""
        self.in_quarantine = False
        self.confirmed = asyncio.Event()

    async def run(self) -> None:
        """Keep the lease, for ever.

        Raises:
            LeaseMoved: we have another subnet; the daemon has to begin anew with it.
        """
        delays = backoff(FIRST_RETRY_S, LAST_RETRY_S)
        while True:
            try:
                await self._store.keep(self._held)
            except LeaseMoved:
                raise
            except LeaseLost as exc:
                if not self.in_quarantine:
                    delays = backoff(FIRST_RETRY_S, LAST_RETRY_S)
                self._enter(str(exc))
            await self._news_or(next(delays))

    def leases_changed(self) -> None:
        """To be called when the list of leases changed."""
        if self.in_quarantine and self._ours() != self._seen:
            self._news.set()

    def _held(self, _reason: str) -> None:
        """The store says that our lease is ours."""
        if self.in_quarantine:
            self.in_quarantine, self._told = False, ""
            self._path.isolate(False)
            self._wake("quarantine is over")
            log.warning("our subnet is ours again, quarantine is over")
        self._problem(None)
        self.confirmed.set()

    def _enter(self, why: str) -> None:
        if why != self._told:
            log.error("lease lost, this host goes into quarantine, its containers reach no other host: %s", why)
        self._told = why
        self._problem(f"quarantine: {why}")
        if not self.in_quarantine:
            self.in_quarantine = True
            self._path.isolate(True)
            self._wake("quarantine")

    async def _news_or(self, delay_s: float) -> None:
        """Wait until our key changed, as far as the list of leases tells, or until it is time to look anyway."""
        self._seen = self._ours()
        self._news.clear()
        await asyncio.sleep(FASTEST_S)
        await heard(self._news, delay_s)

    def _ours(self) -> Lease | None:
        own = self._store.own
        return self._table.get(own.key) if own else None
