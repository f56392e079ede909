"""Keep our lease in etcd: renew it, guard its key, change what it says.

Every wake-up reads the key, judges whose it is and swaps; so a lost answer, a second writer, a long
outage and a store restored from a backup are all the same case. Never writes over another host's
lease (failure F18).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from flanneld.errors import ConfigError, LeaseLost, PeerDataError, Unavailable
from flanneld.model.lease import Changed, LeaseAttrs, OwnLease
from flanneld.model.lease_codec import decode_attrs
from flanneld.plan.claim import Holder, holder, subnets_of
from flanneld.plan.guard import MAX_RESTORES, Act, Found, Loss, beaten, look, overlapped, rival
from flanneld.retry import backoff
from flanneld.sources.clones import REMEDY, Clones
from flanneld.sources.etcd_client import KV, Compacted, EtcdClient
from flanneld.sources.outage import Outage
from flanneld.sources.own_key import OwnKey
from flanneld.wake import heard

log = logging.getLogger("flanneld.lease")

CHECK_S = 60.0
"""How often our key is read without a reason: it finds what no event announces, such as a store that was
replaced by an empty one, and bounds how long a suspended machine's clock can deceive us (failures F16, F23)."""

LOSSES = {
    Loss.STOLEN: "subnet {subnet} was taken by {other}, {us}; delete that key to get the subnet back, or restart "
    "flanneld to take another one",
    Loss.TAKEN: "our lease of {subnet} was gone for a while and {other} leased it meanwhile, {us}; leasing another one",
    Loss.CLONED: "subnet {subnet} was taken by {other}, {us}; " + REMEDY,
    Loss.DOUBLED: "subnet {subnet} was taken by another flanneld at our public address, {other}, {us}; give each host "
    "its own --public-ip, or stop the other one and delete that key",
}
"""What to tell the operator, and what to do about it."""


class Keeper:
    """Guards the lease that ``Claimer`` has acquired.

    Args:
        client: for the watch.
        key: our key.
        check_s: seconds between two reads without a reason.
    """

    def __init__(self, client: EtcdClient, key: OwnKey, *, check_s: float = CHECK_S) -> None:
        self._client = client
        self._key = key
        self._check_s = check_s
        self._restores = 0
        self._unchecked = False
        """Whether our key may have been made anew and nobody has looked for an older one: answers get lost."""
        self._clones = Clones(key)
        self.must_move = False
        """Whether our subnet is another host's for good, so that we need another one."""
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()

    async def keep(self, changed: Changed) -> None:
        """See ``contracts.Store.keep``; tells ``changed`` as soon as our lease is known to be ours."""
        own = self._own()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(self._key.keys.lease(own.key)))
                group.create_task(self._guard(changed))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def publish(self, attrs: LeaseAttrs) -> None:
        """See ``contracts.Store.publish``; waits for etcd as long as it takes.

        Raises:
            LeaseLost: another host holds our subnet now; ``keep`` raises it too.
        """
        self._key.want(attrs)
        outage, delays = (
            Outage(log, "waiting to publish our lease", "no longer waiting to publish our lease"),
            backoff(),
        )
        while self._key.confirmed:
            try:
                await self._settle(put=False)
            except (Unavailable, ConfigError) as error:  # a role may be taken and given back while we run
                outage.failed(error)
                await asyncio.sleep(next(delays))
            else:
                outage.over()
                return

    def saw(self, name: str, attrs: LeaseAttrs) -> None:
        """A lease was written just now, whosesoever."""
        if self._clones.saw(name, attrs):
            self._wake.set()

    async def _watch(self, key: bytes) -> None:
        """Wake the guard whenever our key changes by another hand."""
        delays = backoff()
        while True:
            try:
                listing = await self._key.history.get(key)
            except (Unavailable, ConfigError):  # the guard reads too and says so
                await asyncio.sleep(next(delays))
                continue
            delays = backoff()
            self._wake.set()  # for all that happened before this listing
            with contextlib.suppress(Compacted):
                async with self._key.history.watching():
                    async for batch in self._client.watch(key, prefix=False, start_revision=listing.revision + 1):
                        known = self._own().lease.revision
                        if any(event.deleted or event.kv.mod_revision > known for event in batch.events):
                            self._wake.set()

    async def _guard(self, changed: Changed) -> None:
        outage = Outage(log, "own lease cannot be looked after", "own lease is looked after again")
        delays = backoff()
        before: OwnLease | None = None
        while True:
            due = await self._wait_reason()
            try:
                await self._settle(put=due)
            except (Unavailable, ConfigError) as error:  # a role may be taken and given back while we run
                outage.failed(error)
                await asyncio.sleep(next(delays))
                self._wake.set()
                continue
            outage.over()
            delays = backoff()
            if self._own() != before:
                before = self._own()
                changed("own lease")

    async def _wait_reason(self) -> bool:
        """Wait for a change, a renewal or the next check; tells whether a renewal is due."""
        wait_s = min(self._key.renew_at - self._key.clock(), self._check_s)
        await heard(self._wake, max(wait_s, 0.0))
        self._wake.clear()
        return self._key.clock() >= self._key.renew_at

    async def _settle(self, *, put: bool) -> None:
        """Make our key hold what we want, whatever it holds now.

        Args:
            put: write even when nothing differs: to renew.

        Raises:
            LeaseLost: another host holds our subnet.
            Unavailable: etcd does not answer; what it holds is unknown.
        """
        async with self._writing:
            while not await self._try_settle(self._own(), put):
                pass  # somebody wrote between our look and our swap

    async def _try_settle(self, own: OwnLease, put: bool) -> bool:
        key, subnets = self._key, subnets_of(own.lease)
        listing = await key.history.get(key.keys.lease(own.key))
        kv = listing.kvs[0] if listing.kvs else None
        found = Found(_decode(kv), kv.mod_revision, kv.create_revision) if kv else None
        act = look(
            found,
            own,
            key.wanted,
            granted=kv is None or kv.lease == 0 or key.grants.expires(kv.lease) is not None,
            due=put,
            restores=self._restores,
            same_store=key.is_same_store,
        )
        if isinstance(act, Loss):
            raise self._lost(own, act, found and found.attrs)
        if kv is None or found is None:
            return await self._create_again(own)
        if self._unchecked:
            await self._check_beaten(own, kv.mod_revision)
        if await self._clones.face(kv.create_revision):
            act = Act.WRITE
        if act is Act.CONFIRM:
            await key.confirm(own.key, subnets, kv.mod_revision, kv.lease, written=False)
            return True
        self._count(act, own, kv, due=put)
        if act is Act.LEAVE:
            return True
        return await key.write(own.key, subnets, await self._grant(own, kv, put), over=kv.mod_revision)

    async def _grant(self, own: OwnLease, kv: KV, put: bool) -> int:
        """The etcd lease for the next write."""
        if kv.lease == 0:
            return 0  # a reservation stays one (contract 3.40)
        expires = self._key.grants.expires(own.lease.ttl_id)
        if put or expires is None or self._key.clock() >= expires:
            return await self._key.grants.fresh()
        return own.lease.ttl_id

    async def _create_again(self, own: OwnLease) -> bool:
        """Our key is gone: expired, deleted, or the whole store is another one. Containers still use the subnet."""
        key, subnets = self._key, subnets_of(own.lease)
        stakes = await key.stakes()
        if other := rival(stakes, own.key, subnets):
            raise self._lost(own, overlapped(same_store=key.is_same_store), None, other)
        same_store, self._unchecked = key.is_same_store, all(subnets)
        if not await key.write(own.key, subnets, await key.grants.fresh(), over=0):
            return False
        if self._unchecked:
            await self._check_beaten(own, self._own().lease.revision)
        log.warning("own lease had vanished from etcd, created again subnet=%s", own.lease.name())
        if not same_store:
            await self._give_back(own)
        return True

    async def _check_beaten(self, own: OwnLease, written: int) -> None:
        """Give our key up again if an older one overlaps it.

        Raises:
            LeaseLost: one does.
        """
        key = self._key
        if other := beaten(await key.stakes(), own.key, subnets_of(own.lease), written):
            await key.remove(own.key, written)
            raise self._lost(own, Loss.TAKEN, None, other)
        self._unchecked = False

    async def _give_back(self, own: OwnLease) -> None:
        """Delete leases that a store restored from a backup remembers of us: others may use those subnets by now."""
        key = self._key
        listing = await key.history.list(key.keys.subnets.encode())
        for kv in listing.kvs:
            name = key.keys.name(kv.key)
            if name == own.key or key.wanted.identity.encode() not in kv.value:
                continue  # not worth decoding
            found = _decode(kv)
            if found and holder(found, key.wanted) is Holder.OURS and await key.remove(name, kv.mod_revision):
                log.info("an old lease of ours was given back key=%r", name)

    def _count(self, act: Act, own: OwnLease, kv: KV, *, due: bool) -> None:
        """Note one more write of somebody else over ours, or that a renewal makes up for them."""
        if due:
            self._restores = 0
        elif act is Act.RESTORE:
            self._restores += 1
            log.info(
                "own lease was overwritten, putting it back subnet=%s revision=%d", own.lease.name(), kv.mod_revision
            )
        elif act is Act.LEAVE and self._restores == MAX_RESTORES:
            self._restores += 1  # told
            log.warning(
                "own lease is overwritten again and again, leaving it until the next renewal; "
                "stop the other flanneld that uses our public address subnet=%s address=%s",
                own.lease.name(),
                self._key.wanted.where(),
            )

    def _lost(self, own: OwnLease, loss: Loss, found: LeaseAttrs | None, other: str = "") -> LeaseLost:
        """Another host has our subnet."""
        self._key.lost.add(own.key)
        self.must_move = loss is Loss.TAKEN
        ours = self._key.wanted
        who = f"machine {found.identity or '(no identity)'} at {found.where()}" if found else f"key {other}"
        us = f"we are machine {ours.identity or '(no identity)'} at {ours.where()}"
        return LeaseLost(LOSSES[loss].format(subnet=own.lease.name(), other=who, us=us))

    def _own(self) -> OwnLease:
        if self._key.confirmed is None:
            raise LeaseLost("there is no lease to keep: acquire one first")
        return self._key.confirmed


def _decode(kv: KV) -> LeaseAttrs | None:
    try:
        return decode_attrs(kv.value)
    except PeerDataError:
        return None
