"""Kubernetes as the store of leases: the ``Store`` of ``contracts.py``.

A lease is a node: its pod CIDRs, given by a controller, and annotations, written by its flanneld. Following the
peers stands here; our own node is ``kube_keeper.py``'s. ``EVENT_QUEUE_DEPTH`` and ``CONT_WHEN_CACHE_NOT_READY`` are
accepted and mean nothing: nothing here waits in a queue, and nobody waits for a cache (contract 9.11, 9.13).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from flanneld.errors import PeerDataError, Unavailable
from flanneld.flood import Flood
from flanneld.model.addr import IP
from flanneld.model.lease import Changed, Claim, Lease, LeaseAttrs, LeaseTable, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.node_codec import Node
from flanneld.model.node_lease import Annotations, lease_of, operator_addresses
from flanneld.retry import backoff
from flanneld.sources.kube_file import ConfigFile
from flanneld.sources.kube_http import KubeHttp, pause
from flanneld.sources.kube_keeper import CHECK_S, KubeKeeper
from flanneld.sources.kube_node import OwnNode
from flanneld.sources.kube_watch import Batch, Expired, NodeFeed, Pace, revision_of
from flanneld.sources.outage import Outage

log = logging.getLogger("flanneld.kube")

GRACE_S = 300.0
"""How long peers that an older state of the cluster does not know are kept, so that they can come back: as long as
with etcd (failure F16)."""


class KubeStore:
    """Leases on the nodes of a cluster, the configuration in a file.

    Args:
        http: the way to the API server; closed with the store.
        environ: tells which node is ours, see ``OwnNode``.
        names: of the annotations.
        config_path: ``--net-config-path``.
        sets_condition: ``--set-node-network-unavailable``.
        check_s: see ``kube_keeper.CHECK_S``.
        grace_s: see ``GRACE_S``.
        pace: of lists and watches.

    Raises:
        ConfigError: it is not known which node this is.
    """

    allocates = False

    def __init__(
        self,
        http: KubeHttp,
        environ: Mapping[str, str],
        names: Annotations,
        config_path: str,
        *,
        sets_condition: bool = True,
        check_s: float = CHECK_S,
        grace_s: float = GRACE_S,
        pace: Pace = Pace(),  # noqa: B008 - immutable
    ) -> None:
        self._http = http
        self._names = names
        self._file = ConfigFile(config_path)
        self._node = OwnNode(http, environ)
        self._keeper = KubeKeeper(self._node, names, sets_condition=sets_condition, check_s=check_s)
        self._grace_s = grace_s
        self._grace_until = 0.0
        self._revision = 0
        """The latest seen of the whole store, by us or an earlier run."""
        self._pace = pace
        self._only_own = False
        self._tell: Callable[[str | None], None] = lambda _: None
        self._noted: dict[str, str] = {}
        """By node, what was said about it that could not be used."""
        self._flood = Flood(log, "nodes that are no leases")

    @property
    def own(self) -> OwnLease | None:
        """Our lease as last confirmed by the API server."""
        return self._keeper.confirmed

    @property
    def mark(self) -> str:
        """See ``contracts.Store``."""
        return str(self._revision)

    def expect(self, mark: str) -> None:
        """See ``contracts.Store``."""
        self._revision = max(self._revision, revision_of(mark))

    def tell_trouble(self, tell: Callable[[str | None], None]) -> None:
        """See ``contracts.Store``."""
        self._tell = tell

    async def read_config(self) -> bytes:
        """See ``contracts.Store``."""
        return self._file.read()

    async def follow_config(self, changed: Callable[[bytes], None]) -> None:
        """See ``contracts.Store``."""
        await self._file.follow(changed)

    async def operator_addresses(self) -> tuple[IP | None, IP | None]:
        """See ``contracts.Store``; ``Unavailable`` also when one is no address, until it is corrected."""
        try:
            return operator_addresses(await self._node.get(), self._names)
        except PeerDataError as error:
            raise Unavailable(str(error)) from error

    async def acquire(self, conf: NetConf, claim: Claim) -> OwnLease:
        """See ``contracts.Store``; what the claim says of earlier subnets does not count."""
        self._only_own = conf.backend_type == "alloc"  # which has no peers (contract 9.12)
        return await self._keeper.acquire(conf, claim.attrs, self._feed)

    async def keep(self, changed: Changed) -> None:
        """See ``contracts.Store``; hears of our node through ``follow``."""
        await self._keeper.keep(changed)

    async def publish(self, attrs: LeaseAttrs) -> None:
        """See ``contracts.Store``."""
        await self._keeper.publish(attrs)

    async def network_is_up(self) -> None:
        """See ``contracts.Store``."""
        await self._keeper.network_is_up()

    async def catch_up(self, table: LeaseTable) -> bool:
        """See ``contracts.Store``; a list is too much to ask for now, and a watch is milliseconds behind."""
        return False

    def reload(self) -> None:
        """See ``contracts.Store``."""
        self._http.close()  # a kept connection has the old client certificate
        self._http.access.reload()

    async def close(self) -> None:
        """See ``contracts.Store``."""
        self._http.close()

    async def follow(self, table: LeaseTable, changed: Changed) -> None:
        """See ``contracts.Store``: one list, then the watch."""
        feed = self._feed(await self._own_name() if self._only_own else "")
        delays = backoff()
        while True:
            revision = await self._list(feed, table, changed)
            grace_s = self._grace_until - time.monotonic()
            try:
                async with (
                    asyncio.timeout(grace_s if grace_s > 0 else None),
                    contextlib.aclosing(feed.watch(revision)) as batches,
                ):
                    async for batch in batches:
                        delays = backoff()
                        if self._apply(batch, table):
                            changed("leases changed")
            except TimeoutError:  # time to let go of peers that an older state did not know
                pass
            except Expired as error:
                log.info("listing all nodes again reason=%s", error)
                await asyncio.sleep(next(delays))  # a list is dear: not at once again and again

    async def _list(self, feed: NodeFeed, table: LeaseTable, changed: Changed) -> str:
        """Take over a whole list, however long it takes to come; returns the revision to watch from."""
        outage = Outage(
            log, "nodes cannot be listed, what we know stays in use", "nodes can be listed again", tell=self._tell
        )
        delays = backoff()
        while True:
            try:
                leases, revision = await self._read_all(feed)
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))
                continue
            outage.over()
            if table.usable and revision_of(revision) < self._revision:
                self._grace_until = time.monotonic() + self._grace_s
            self._revision = revision_of(revision)
            if time.monotonic() < self._grace_until:
                leases = self._with_absent(leases, table)
            if table.replace_all(leases, revision_of(revision)):
                changed("leases listed")
            return revision

    async def _read_all(self, feed: NodeFeed) -> tuple[dict[str, Lease], str]:
        leases: dict[str, Lease] = {}
        revision, own_seen = "", False
        async with contextlib.aclosing(feed.nodes()) as pages:
            async for page in pages:
                revision = page.revision
                for name in page.gone:
                    leases.pop(name, None)
                for node in page.nodes:
                    name = node.metadata.name
                    if lease := self._lease(node):
                        leases[name] = lease
                    else:
                        leases.pop(name, None)
                    if name == self._node.known_name:
                        own_seen = True
                        self._keeper.seen(node)
        if not own_seen:
            self._keeper.seen(None)
        return leases, revision

    def _apply(self, batch: Batch, table: LeaseTable) -> bool:
        """Take over news; tells whether peers can notice. Most are heartbeats, which change nothing of ours."""
        differs = False
        for event in batch.events:
            name, gone = event.object.metadata.name, event.type == "DELETED"
            lease = None if gone else self._lease(event.object)
            if lease:
                differs |= table.put(name, lease)
            elif table.get(name):
                differs |= table.drop(name)
            if gone:
                self._noted.pop(name, None)
            if name == self._node.known_name:
                self._keeper.seen(None if gone else event.object)
        self._revision = table.revision = revision_of(batch.revision)
        return differs

    def _lease(self, node: Node) -> Lease | None:
        """A node as a lease; None, and one log line, for one that cannot be used."""
        name = node.metadata.name
        try:
            lease = lease_of(node, self._names, revision_of(node.metadata.resource_version))
        except PeerDataError as error:
            if self._noted.get(name) != str(error):
                self._noted[name] = str(error)
                self._flood.line("node skipped, other peers are not affected node=%s reason=%s", name, error)
            return None
        if self._noted:
            self._noted.pop(name, None)
        return lease

    def _with_absent(self, leases: dict[str, Lease], table: LeaseTable) -> dict[str, Lease]:
        """Add the peers that an older state does not know; their data paths work as before."""
        absent = {name: lease for name, lease in table.items() if name not in leases}
        log.warning(
            "the API server's data are older than before, keeping peers it does not know for now "
            "known=%d absent=%d for_s=%.0f",
            len(leases),
            len(absent),
            self._grace_s,
        )
        return {**leases, **absent}

    async def _own_name(self) -> str:
        outage, delays = Outage(log, "our node is not known yet", "our node is known"), backoff()
        while True:
            try:
                return await self._node.name()
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))

    def _feed(self, name: str) -> NodeFeed:
        return NodeFeed(self._http, name, self._pace)
