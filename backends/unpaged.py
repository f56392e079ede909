"""What backends have in common that keep every peer in the tables: leases in, desired objects out. Pure.

A backend of this kind says what one peer needs (``reach``); this file keeps ``desired`` current, lease by
lease, and turns what a peer got wrong into a note that costs nobody else anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from backends.routes import closed
from flanneld.contracts import Runner, Surroundings
from flanneld.errors import PeerDataError
from flanneld.model.addr import IP, MAC, Family, Prefix
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease
from flanneld.model.netconf import NetConf
from flanneld.model.objects import METRIC_BLACKHOLE, PROTO_OURS, KernelObject, Neighbour, Route, RouteKind
from flanneld.model.state import Desired, State
from flanneld.plan.diff import Op
from flanneld.plan.fold import Fold, Remote, Self
from flanneld.plan.ownership import Ownership


class UnpagedNetwork:
    """Implements ``contracts.DataPath``; a backend overrides what its peers need.

    Args:
        conf: the network configuration.
        around: what the data path is built on.
        backend_type: ``BackendType`` of the leases that count (contract 6.3).
    """

    devices: frozenset[str] = frozenset()
    """Names of devices that belong to the backend."""
    watches_routes = False
    runner: Runner | None = None

    def __init__(self, conf: NetConf, around: Surroundings, backend_type: str) -> None:
        self.desired = Desired()
        self.around = around
        self._type = backend_type
        self._folds = {family: Fold(family) for family in conf.families()}
        self._peers: dict[Prefix, tuple[KernelObject, ...]] = {}
        self._refused: dict[Prefix, str] = {}
        self._base: tuple[KernelObject, ...] = ()
        self._isolated = False
        self.reconfigure(conf, around.ext)

    # ---- for the backend to say ---------------------------------------------------------------

    def check(self, conf: NetConf, ext: ExtIface) -> None:
        """Refuse an interface that cannot work.

        Raises:
            ConfigError: why, and what to do.
        """

    def base_objects(self) -> Iterator[KernelObject]:
        """What is needed whoever the peers are."""
        return iter(())

    def reach(self, family: Family, remote: Remote, direct: Mapping[IP, str]) -> tuple[KernelObject, ...]:
        """What one peer needs, in writing order.

        Raises:
            PeerDataError: it cannot be reached; why.
        """
        return ()

    def forget(self, subnet: Prefix) -> None:
        """The peer of a subnet is gone, or is another now."""

    # ---- configuration ------------------------------------------------------------------------

    def configure(self, ext: ExtIface) -> None:
        """Take an external interface that changed."""
        self.reconfigure(self.conf, ext)

    def reconfigure(self, conf: NetConf, ext: ExtIface) -> None:
        """Take another configuration too; raises ``ConfigError`` before anything is changed."""
        self.check(conf, ext)
        self.conf, self.ext = conf, ext
        self.is_settled = False
        networks = tuple(part.network for family in conf.families() if (part := conf.family(family)))
        self.own = Ownership(
            devices=self.devices,
            alias=self.around.alias,
            networks=(*networks, *self.around.previous_networks),
            lease_lengths=frozenset(subnet.length for subnet in self.around.subnets.values()),
            underlay=ext.name,
        )
        base = (*self.base_objects(), *(self._blackholes() if self.around.blackhole else ()))
        if self._isolated:
            base = tuple(closed(base, networks))
        for obj in self._base:
            if obj not in base:
                self.desired.discard(obj)
        for obj in base:
            self.desired.add(obj)
        self._base = base

    def _blackholes(self) -> Iterator[Route]:
        for subnet in self.around.subnets.values():
            yield Route(subnet.masked(), "", kind=RouteKind.BLACKHOLE, proto=PROTO_OURS, metric=METRIC_BLACKHOLE)

    def isolate(self, on: bool) -> None:
        """See ``contracts.DataPath``."""
        self._isolated = on
        self.reconfigure(self.conf, self.ext)

    # ---- leases -------------------------------------------------------------------------------

    def public_addresses(self, leases: Iterable[Lease]) -> Sequence[IP]:
        """Peers' addresses, where the kernel's routes to them decide something."""
        if not self.watches_routes:
            return ()
        return sorted({ip for lease in leases for ip in (lease.attrs.public_ip, lease.attrs.public_ip6) if ip})

    def settle(
        self, leases: Mapping[str, Lease], observed: State, direct: Mapping[IP, str], *, fill: bool
    ) -> dict[str, str]:
        """Take all leases into ``desired``."""
        leases = {} if self._isolated else leases
        gone = {subnet for fold in self._folds.values() for subnet in fold.remotes}
        self._folds = {family: Fold(family) for family in self._folds}
        for family, fold in self._folds.items():
            touched = fold.update(leases, self.conf, self._me(), self._type)
            gone -= touched
            for subnet in touched:
                self._settle_peer(family, subnet, direct)
        for subnet in gone:
            self.forget(subnet)
            self._take_out(subnet)
        self.is_settled = True
        return self._notes()

    def update(self, changes: Mapping[str, Lease | None], direct: Mapping[IP, str]) -> dict[str, str]:
        """Take changed leases into ``desired``."""
        if self._isolated:
            return {}
        for family, fold in self._folds.items():
            for subnet in fold.update(changes, self.conf, self._me(), self._type):
                self._settle_peer(family, subnet, direct)
        return self._notes()

    def _settle_peer(self, family: Family, subnet: Prefix, direct: Mapping[IP, str]) -> None:
        self._refused.pop(subnet, None)
        self.forget(subnet)
        remote = self._folds[family].remotes.get(subnet)
        objects: tuple[KernelObject, ...] = ()
        if remote is not None:
            try:
                objects = self.reach(family, remote, direct)
            except PeerDataError as exc:
                self._refused[subnet] = str(exc)
        if objects == self._peers.get(subnet, ()):
            return
        self._take_out(subnet)
        if objects:
            self._peers[subnet] = objects
            for obj in objects:
                self.desired.add(obj)

    def _take_out(self, subnet: Prefix) -> None:
        self._refused.pop(subnet, None)
        for obj in reversed(self._peers.pop(subnet, ())):
            self.desired.discard(obj)

    def _me(self) -> Self:
        return Self.on(self.ext, self.around.subnets)

    def _notes(self) -> dict[str, str]:
        notes = {str(subnet): why for subnet, why in self._refused.items()}
        for fold in self._folds.values():
            notes.update(fold.notes)
        return notes

    # ---- nothing is paged ---------------------------------------------------------------------

    def is_unknown(self, device: str, ip: IP | None) -> bool:
        """The kernel asks nothing."""
        return False

    def answer(self, asked: Iterable[tuple[str, IP | None, MAC | None]]) -> list[Op]:
        """The kernel asks nothing that is not in its tables."""
        return []

    def answer_is_right(self, entry: Neighbour) -> bool:
        """Neighbours are not ours."""
        return True

    def wants_page_out(self) -> Sequence[str]:
        """No device holds too many."""
        return ()

    def page_out(self, device: str, idle_s: Mapping[MAC, float], answered: Iterable[Neighbour]) -> list[Op]:
        """Nobody is taken out."""
        return []
