"""Our lease on our node: wait for the pod CIDR, announce ourselves, put it back when somebody changes it.

Each turn reads the node, compares and patches what differs; so a lost answer, an overwritten annotation, a node
that was deleted and made anew are all one case. The subnet itself is never ours to choose (contract 9.15).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from flanneld.errors import ConfigError, LeaseLost, LeaseMoved, PeerDataError, Unavailable
from flanneld.model.addr import Family, Prefix
from flanneld.model.lease import Changed, Lease, LeaseAttrs, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.node_codec import Node
from flanneld.model.node_lease import CONDITION, CONDITION_REASON, Annotations, bad_overwrites, changes
from flanneld.retry import backoff
from flanneld.sources.kube_http import pause
from flanneld.sources.kube_node import OwnNode
from flanneld.sources.kube_watch import Expired, NodeFeed, revision_of
from flanneld.sources.outage import Outage

log = logging.getLogger("flanneld.lease")

CHECK_S = 300.0
"""How often our node is read without a reason. News of it come with everybody's; this is for what they miss."""

_MAX_RESTORES = 3
"""How often between two checks annotations are put back before we give in to the other writer."""

Subnets = tuple[Prefix | None, Prefix | None]


class KubeKeeper:
    """Guards what our node says about us.

    Args:
        node: ours.
        names: of the annotations.
        sets_condition: ``--set-node-network-unavailable``.
        check_s: see ``CHECK_S``.
    """

    def __init__(self, node: OwnNode, names: Annotations, *, sets_condition: bool, check_s: float = CHECK_S) -> None:
        self._node = node
        self._names = names
        self._sets_condition = sets_condition
        self._check_s = check_s
        self._wanted = LeaseAttrs(None)
        self._families: tuple[Family, ...] = ()
        self._is_up = False
        self._condition_told = False
        self._restores = 0
        self._overwrites: tuple[str | None, ...] = (None, None)
        self._awaited = ""
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self.confirmed: OwnLease | None = None
        """Our lease as last seen."""

    async def acquire(self, conf: NetConf, attrs: LeaseAttrs, feed_of: Callable[[str], NodeFeed]) -> OwnLease:
        """See ``contracts.Store.acquire``; waits for the node and its pod CIDRs (contract 9.14, 11.31).

        Args:
            conf: tells which families are wanted, and where our subnet must lie.
            attrs: what we announce.
            feed_of: makes a feed of one node, by its name.
        """
        self._families, self._wanted = conf.families(), attrs
        outage = Outage(log, "waiting for our subnet", "no longer waiting for our subnet")
        delays = backoff()
        while True:
            try:
                name = await self._node.name()
                subnets = await self._await_subnets(feed_of(name))
                _check_inside(name, subnets, conf)
                self.confirmed = OwnLease(name, Lease(*subnets, attrs), None)
                await self._settle(is_ours=True)
            except LeaseMoved:  # since we looked
                continue
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))
            else:
                outage.over()
                return self.confirmed

    async def keep(self, changed: Changed) -> None:
        """See ``contracts.Store.keep``."""
        outage = Outage(log, "own node cannot be looked after", "own node is looked after again")
        delays = backoff()
        while True:
            is_check = await self._wait_reason()
            if is_check:
                self._restores = 0
            try:
                if await self._settle(is_ours=False):
                    changed("own node")
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))
                self._wake.set()
            else:
                outage.over()
                delays = backoff()

    async def publish(self, attrs: LeaseAttrs) -> None:
        """See ``contracts.Store.publish``."""
        self._wanted = attrs
        if self.confirmed:
            await self._settle_for_ever("publish our lease")

    async def network_is_up(self) -> None:
        """See ``contracts.Store.network_is_up`` (contract 9.22, 11.21)."""
        self._is_up = True
        if self._sets_condition:
            await self._settle_for_ever("tell that the network is up")

    def seen(self, node: Node | None) -> None:
        """News of our node, None = gone. Cheap: a node says something new every few seconds."""
        if node is None or self._lacks(node):
            self._wake.set()

    def _lacks(self, node: Node) -> bool:
        """Whether a node wants our attention."""
        try:
            moved = self.confirmed is not None and self._subnets_of(node) != self.confirmed.lease[:2]
        except (PeerDataError, Unavailable):
            moved = True
        return moved or bool(changes(self._wanted, node.annotations, self._names)) or self._lacks_condition(node)

    def _lacks_condition(self, node: Node) -> bool:
        if not (self._is_up and self._sets_condition):
            return False
        condition = node.condition(CONDITION)
        if not self._condition_told:  # with our reason once (contract 13.14); later any reason for False will do
            return condition != ("False", CONDITION_REASON)
        return condition is None or condition[0] != "False"

    async def _await_subnets(self, feed: NodeFeed) -> Subnets:
        """Wait until our node has a pod CIDR of each family that is wanted, saying once what is awaited."""
        delays = backoff()
        while True:
            revision, nodes = "", 0
            async with contextlib.aclosing(feed.nodes()) as pages:
                async for page in pages:
                    revision, nodes = page.revision, nodes + len(page.nodes)
                    for node in page.nodes:
                        if subnets := self._complete(node):
                            return subnets
            if not nodes:
                self._say(f"there is no node {self._node.known_name} yet: its kubelet registers it")
            with contextlib.suppress(Expired):
                async with contextlib.aclosing(feed.watch(revision)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            if event.type != "DELETED" and (subnets := self._complete(event.object)):
                                return subnets
            await asyncio.sleep(next(delays))

    def _complete(self, node: Node) -> Subnets | None:
        try:
            return self._subnets_of(node)
        except (PeerDataError, Unavailable) as error:
            self._say(str(error))
            return None

    def _say(self, awaited: str) -> None:
        if awaited != self._awaited:
            log.warning("waiting for our subnet: %s", awaited)
            self._awaited = awaited

    def _subnets_of(self, node: Node) -> Subnets:
        """The node's pod CIDRs of the families that are enabled (contract 9.15).

        Raises:
            PeerDataError: they cannot be read.
            Unavailable: one is not there yet.
        """
        subnets = [
            subnet if family in self._families else None
            for family, subnet in zip(Family, node.pod_cidrs(), strict=True)
        ]
        for family in self._families:
            if not any(subnet and subnet.family is family for subnet in subnets):
                raise Unavailable(
                    f"node {node.metadata.name} has no {family.label} pod CIDR yet: kube-controller-manager gives it "
                    "one with --allocate-node-cidrs and --cluster-cidr"
                )
        return subnets[0], subnets[1]

    async def _settle_for_ever(self, what: str) -> None:
        outage, delays = Outage(log, f"waiting to {what}", f"no longer waiting to {what}"), backoff()
        while True:
            try:
                await self._settle(is_ours=True)
            except Unavailable as error:
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))
            except LeaseLost:
                self._wake.set()  # the keeper tells
                raise
            else:
                outage.over()
                return

    async def _settle(self, *, is_ours: bool) -> bool:
        """Make our node say what it should; tells whether that took a write.

        Args:
            is_ours: the reason lies with us, so that what differs is nobody's interference.

        Raises:
            LeaseMoved: the node has another subnet.
            Unavailable: it cannot be read or written, or has none.
        """
        async with self._writing:
            node = await self._node.get()
            patch: Mapping[str, str] = {}
            if self.confirmed:
                self._check_moved(node, self.confirmed)
                self._note_overwrites(node)
                patch = changes(self._wanted, node.annotations, self._names)
            condition = self._lacks_condition(node)
            if patch and not is_ours and not self._may_restore(patch):
                patch = {}
            if patch or condition:
                node = await self._node.patch(patch, condition=condition)
            if condition:
                log.info("node condition set NetworkUnavailable=False node=%s", node.metadata.name)
            self._condition_told = self._is_up
            if self.confirmed:
                lease = Lease(*self.confirmed.lease[:2], self._wanted, revision_of(node.metadata.resource_version))
                self.confirmed = OwnLease(self.confirmed.key, lease, None)
            return bool(patch or condition)

    def _check_moved(self, node: Node, own: OwnLease) -> None:
        try:
            subnets = self._subnets_of(node)
        except PeerDataError as error:
            raise Unavailable(str(error)) from error
        if subnets != own.lease[:2]:
            now = "+".join(str(subnet) for subnet in subnets if subnet)
            raise LeaseMoved(f"our subnet is {now} now instead of {own.lease.name()}, says node {own.key}")

    def _note_overwrites(self, node: Node) -> None:
        """An operator who sets another address to be told is no rival; one that is none is told once."""
        names = (self._names.overwrite, self._names.overwrite6)
        present = tuple(node.annotations.get(name) for name in names)
        if present == self._overwrites:
            return
        self._overwrites = present
        self._restores = 0
        for sentence in bad_overwrites(node.annotations, self._names):
            log.warning("%s node=%s", sentence, node.metadata.name)

    def _may_restore(self, patch: Mapping[str, str]) -> bool:
        """Count one more difference that is none of our doing; tells whether to put our values back once more."""
        if self._restores > _MAX_RESTORES:
            return False
        self._restores += 1
        if self._restores <= _MAX_RESTORES:
            log.info("annotations of our node differ, putting them back annotations=%s", ",".join(sorted(patch)))
            return True
        log.warning(
            "annotations of our node are overwritten again and again, leaving them until the next check; "
            "stop the other flanneld on this node check_s=%.0f annotations=%s",
            self._check_s,
            ",".join(sorted(patch)),
        )
        return False

    async def _wait_reason(self) -> bool:
        """Wait for news or the next check; tells whether it is the check."""
        try:
            async with asyncio.timeout(self._check_s):
                await self._wake.wait()
        except TimeoutError:
            return True
        self._wake.clear()
        return False


def _check_inside(name: str, subnets: Subnets, conf: NetConf) -> None:
    """Refuse a subnet that peers would refuse (contract 9.15); equal to the network is allowed."""
    for subnet in subnets:
        part = conf.family(subnet.family) if subnet else None
        if subnet and part and not part.network.covers(subnet):
            raise ConfigError(
                f"node {name} has the pod CIDR {subnet}, which lies outside {part.network} of the network "
                "configuration: make Network what kube-controller-manager has as --cluster-cidr"
            )
