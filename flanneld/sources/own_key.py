"""Our key in etcd: what we want it to hold, what it is known to hold, and the one way to write it.

Every write compares first (contract 11.14). Decides nothing about whose the key is.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from flanneld.model.lease import Lease, LeaseAttrs, OwnLease
from flanneld.model.lease_codec import decode_attrs, encode_attrs
from flanneld.model.netconf import NetConf
from flanneld.plan.allocate import Subnets, counts
from flanneld.plan.guard import Stake
from flanneld.sources.etcd_client import EtcdClient, LeaseGone
from flanneld.sources.etcd_history import History
from flanneld.sources.etcd_leases import Keys, LeaseReader
from flanneld.sources.grants import Grants, boottime

TTL_S = 86400
"""Life of a lease. Source: contract 3.19, 13.4."""


class OwnKey:
    """The key of this host's lease.

    Args:
        client: for writes.
        history: for reads.
        keys: where leases lie.
        reader: decodes what others wrote.
        ttl_s: life of a lease in seconds.
        renew_margin_s: how long before its end it is to be renewed; more than half of its life is cut.
        clock: seconds that go on while the machine is suspended.
    """

    def __init__(
        self,
        client: EtcdClient,
        history: History,
        keys: Keys,
        reader: LeaseReader,
        *,
        ttl_s: int = TTL_S,
        renew_margin_s: float = 3600.0,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.confirmed: OwnLease | None = None
        """Our lease as last seen in etcd."""
        self.wanted = LeaseAttrs(None)
        """The value it should have."""
        self.conf: NetConf | None = None
        """What it is acquired for."""
        self.lost: set[str] = set()
        """Keys that other hosts took from us."""
        self.store_age = 0
        """``History.replaced`` when our lease was last confirmed: later revisions of another store do not compare."""
        self.renew_at = 0.0
        """When to write it again, on ``clock``. A PUT now and then also heals Go peers (contract 13.4)."""
        self.history = history
        self.keys = keys
        self.reader = reader
        self.clock = clock
        self.grants = Grants(client, ttl_s, clock)
        self._client = client
        self._ttl_s = ttl_s
        self._margin_s = min(renew_margin_s, ttl_s / 2)

    def want(self, attrs: LeaseAttrs) -> None:
        """Set the value that the key should have, in the form in which it will be read back."""
        self.wanted = decode_attrs(encode_attrs(attrs))

    async def write(self, name: str, subnets: Subnets, grant: int, *, over: int) -> bool:
        """Write what we want if the key is still as we read it.

        Args:
            name: last element of the key.
            subnets: what it stands for.
            grant: etcd lease to attach it to; 0 = none.
            over: revision of the key when it was read; 0 = it did not exist.

        Returns:
            Whether it was; if not, look again.

        Raises:
            Unavailable: the answer got lost, the write may have been done.
        """
        key = self.keys.lease(name)
        try:
            result = await self._client.put_if(key, encode_attrs(self.wanted), grant, mod_revision=over)
        except LeaseGone:
            self.grants.gone(grant)
            raise
        if result.succeeded:
            await self.confirm(name, subnets, result.revision, grant, written=True)
        return result.succeeded

    async def confirm(self, name: str, subnets: Subnets, revision: int, grant: int, *, written: bool) -> None:
        """Note that the key is known to hold what we want."""
        before = self.confirmed
        expires = self.grants.expires(grant) if grant else None
        self.confirmed = OwnLease(name, Lease(*subnets, self.wanted, revision, grant), expires)
        self.store_age = self.history.replaced
        self.lost.discard(name)
        if written or before is None or before.lease.ttl_id != grant:
            # jitter, for hosts that started together would renew together for ever
            early_s = self._margin_s * random.uniform(1.0, 1.1)  # noqa: S311
            self.renew_at = (expires or self.clock() + self._ttl_s) - early_s
        await self.grants.settle_on(grant)

    @property
    def is_same_store(self) -> bool:
        """Whether the store has the history that our lease was confirmed in."""
        return self.store_age == self.history.replaced

    async def remove(self, name: str, revision: int) -> bool:
        """Delete a key if it is still as we read it."""
        result = await self._client.delete_if(self.keys.lease(name), mod_revision=revision)
        return result.succeeded

    async def stakes(self) -> list[Stake]:
        """Every key that claims a subnet of our network, whatever its value."""
        listing = await self.history.list(self.keys.subnets.encode())
        return [
            Stake(self.keys.name(kv.key), counts(subnets, self.conf) if self.conf else subnets, kv.create_revision)
            for kv in listing.kvs
            if (subnets := self.reader.subnets(kv))
        ]
