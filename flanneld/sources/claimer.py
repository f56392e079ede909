"""Come to a lease in etcd, however long it takes.

Carries out what ``flanneld/plan/claim.py`` decides, one step a look: each step compares first, and
after each that came to nothing all leases are read anew.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from flanneld.errors import LeaseLost, Unavailable
from flanneld.model.lease import Claim, Lease, OwnLease
from flanneld.model.lease_codec import render_key
from flanneld.model.netconf import NetConf
from flanneld.plan.allocate import Below, Subnets
from flanneld.plan.claim import Create, Remove, Take, doubles, is_displaced, next_step, occupant, subnets_of
from flanneld.plan.guard import beaten
from flanneld.retry import backoff
from flanneld.sources.outage import Outage
from flanneld.sources.own_key import OwnKey

log = logging.getLogger("flanneld.lease")


class Claimer:
    """Acquires the lease of this host.

    Args:
        key: our key, nothing known of it yet.
        below: source of random choices.
        settle_s: how long nothing new is leased in a store that has lost what it held: every host that runs has looked
            after its key by then, and made it again.
    """

    def __init__(self, key: OwnKey, *, below: Below = secrets.randbelow, settle_s: float = 60.0) -> None:
        self._key = key
        self._below = below
        self._settle_s = settle_s
        self._replaced, self._settled_at = 0, 0.0
        self._doubles: dict[str, str] = {}

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """See ``contracts.Store.acquire``."""
        self._key.confirmed, self._key.conf = None, conf
        self._key.want(claim.attrs)
        # as they are compared; subnet.env holds the first address of the subnet, not its base (contract 3.41)
        previous = Subnets(*(block and block.masked() for block in claim.previous))
        outage, delays = Outage(log, "waiting for a lease", "no longer waiting for a lease"), backoff()
        races = backoff(0.005, 1.0)  # a boot storm spreads itself out (failure F25)
        while True:
            try:
                previous, done = await self._attempt(conf, claim._replace(previous=previous))
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(next(delays))
                continue
            outage.over()
            if done and self._key.confirmed:
                return self._key.confirmed
            await asyncio.sleep(next(races))

    async def _attempt(self, conf: NetConf, claim: Claim) -> tuple[Subnets, bool]:
        """One look and one step.

        Returns:
            The previous subnets for the next attempt, and whether the lease is there now.
        """
        key, previous = self._key, Subnets(*claim.previous)
        listing = await key.history.list(key.keys.subnets.encode())
        if self._replaced != key.history.replaced:
            self._replaced, self._settled_at = key.history.replaced, key.clock() + self._settle_s
        leases, unreadable = await key.reader.snapshot(listing.kvs)
        self._warn_of_doubles(leases)
        match self._decide(leases, unreadable, conf, claim):
            case Take() as step:
                return previous, await self._take(step)
            case Create() as step:
                if step.subnets != previous:
                    self._refuse_unsettled()
                return previous, await self._create(step)
            case Remove(name, lease):
                if await key.remove(name, lease.revision):
                    log.info("own lease removed, the network configuration has changed subnet=%s", lease.name())
                # keep what can be kept, such as the IPv4 subnet when the network gains IPv6
                return (previous if any(previous) else subnets_of(lease)), False

    def _refuse_unsettled(self) -> None:
        """Let hosts that run go first where every subnet looks free; whoever had one claims it without waiting."""
        if self._key.clock() < self._settled_at:
            raise Unavailable(
                "etcd was replaced by another or older store: hosts that run write their leases again, "
                f"then, {self._settle_s:.0f} s after the replacement, new ones are made"
            )

    def _decide(
        self, leases: dict[str, Lease], unreadable: list[Subnets], conf: NetConf, claim: Claim
    ) -> Take | Remove | Create:
        """The next step; ``LeaseLost`` instead of one that would leave the subnets that containers use."""
        before = Subnets(*claim.previous)
        try:
            step = next_step(leases, unreadable, conf, claim, self._key.lost | claim.lost, self._below)
        except Unavailable as error:
            if claim.in_use:  # or ours would have been among the free ones
                raise LeaseLost(f"our subnet {before} was leased to {occupant(leases, before)}; {error}") from error
            raise
        if is_displaced(step, claim):
            raise LeaseLost(
                f"our subnet {before} was leased to {occupant(leases, before)} while we could not renew it; "
                "leasing another one"
            )
        return step

    async def _take(self, step: Take) -> bool:
        key, lease = self._key, step.lease
        # without an etcd lease it is a reservation and stays one (contract 3.40)
        grant = await key.grants.fresh() if lease.ttl_id else 0
        if not await key.write(step.key, subnets_of(lease), grant, over=lease.revision):
            return False
        if lease.ttl_id and lease.attrs.identity:
            # Only where our identity stands: what Go flanneld or an operator granted may hold other keys too.
            key.grants.inherit(lease.ttl_id)
            await key.grants.settle_on(grant)
        if await self._is_beaten(step.key, subnets_of(lease)):  # an earlier run may have died before it asked
            return False
        kind = "lease" if grant else "reservation"
        log.info("lease taken over subnet=%s kind=%s reason=%s", lease.name(), kind, step.why)
        return True

    async def _create(self, step: Create) -> bool:
        key, name = self._key, render_key(*step.subnets)
        grant = await key.grants.fresh()
        if not await key.write(name, step.subnets, grant, over=0):
            log.info("another host was faster, choosing again subnet=%s", step.subnets)
            return False
        if await self._is_beaten(name, step.subnets):
            return False
        log.info("lease acquired subnet=%s reason=%s", step.subnets, step.why)
        return True

    async def _is_beaten(self, name: str, subnets: Subnets) -> bool:
        """Whether an older lease overlaps the one just made; then ours is removed again.

        In a dual-stack network two hosts may choose the same IPv4 subnet and different IPv6 ones: these
        are different keys, so both transactions succeed. The older key wins.
        """
        own = self._key.confirmed
        if own is None or not all(subnets):
            return False
        other = beaten(await self._key.stakes(), name, subnets, own.lease.revision)
        if other is None:
            return False
        log.info("another host was faster, choosing again subnet=%s key=%r", subnets, other)
        await self._key.remove(name, own.lease.revision)
        self._key.confirmed = None
        return True

    def _warn_of_doubles(self, leases: dict[str, Lease]) -> None:
        found = doubles(leases, self._key.wanted)
        for name, sentence in found.items():
            if self._doubles.get(name) != sentence:
                log.warning("public address used twice: %s key=%r", sentence, name)
        self._doubles = found
