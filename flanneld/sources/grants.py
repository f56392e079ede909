"""The etcd leases that our key is attached to: made when needed, revoked when surely idle.

Go flanneld leaves one orphan behind at each renewal and restart (contract 11.47).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flanneld.errors import Unavailable
from flanneld.sources.etcd_client import EtcdClient

log = logging.getLogger("flanneld.lease")


def boottime() -> float:
    """Seconds since boot, time asleep included: what a lease's age is measured by.

    The wall clock jumps, and ``time.monotonic`` stands still while the machine is suspended and its
    lease runs out (failure F23).
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Grants:
    """Every etcd lease that this daemon answers for.

    Args:
        client: where to ask.
        ttl_s: life of each grant in seconds, at least 1; etcd may grant longer.
        clock: see ``boottime``.
    """

    def __init__(self, client: EtcdClient, ttl_s: int, clock: Callable[[], float]) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._clock = clock
        self._expires: dict[int, float] = {}
        self._unused = 0

    async def fresh(self) -> int:
        """A grant with nearly its whole life before it; the same one until a write with it is confirmed.

        Raises:
            Unavailable: etcd cannot grant now.
        """
        asked = self._clock()  # before the request: never believe in more time than there is
        if asked > self._expires.get(self._unused, 0.0) - self._ttl_s * 0.9:
            self._unused = await self._client.grant(self._ttl_s)
            self._expires[self._unused] = asked + self._ttl_s
        return self._unused

    def inherit(self, lease: int) -> None:
        """Answer for the grant of an earlier run: it goes when another one has taken its place."""
        self._expires.setdefault(lease, 0.0)

    def gone(self, lease: int) -> None:
        """Etcd says that there is no such lease."""
        self._expires.pop(lease, None)

    def expires(self, lease: int) -> float | None:
        """When a grant of ours runs out on our clock; None for one that we did not make."""
        return self._expires.get(lease) or None

    async def settle_on(self, lease: int) -> None:
        """Our key is known to be attached to ``lease`` (0 = none): revoke all others.

        Not before that is known: a write whose answer got lost may have attached the key to any of them,
        and revoking deletes it. What etcd does not answer is tried again next time, or runs out by itself.
        """
        if lease == self._unused:
            self._unused = 0
        for idle in [grant for grant in self._expires if grant not in (lease, self._unused)]:
            try:
                await self._client.revoke(idle)
            except Unavailable as error:
                log.debug("idle etcd lease not revoked yet lease=%x reason=%s", idle, error)
                return
            self.gone(idle)
