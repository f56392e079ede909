"""The vxlan data path of this host: all its families, settled against the leases. Pure but for its memory.

What the reconcile loop, the miss listener and the reaper talk to. Keeps ``desired`` current in place;
decides nothing that ``vxlan.py`` and ``vxlan_pages.py`` do not say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from backends import vxlan
from backends.routes import closed
from backends.vxlan_pages import Pages
from flanneld.contracts import Runner, Surroundings
from flanneld.errors import PeerDataError
from flanneld.model.addr import IP, MAC, Family, Prefix, family_of
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease
from flanneld.model.netconf import NetConf
from flanneld.model.objects import METRIC_BLACKHOLE, PROTO_OURS, Neighbour, Offload, Route, RouteKind
from flanneld.model.state import Desired, State
from flanneld.plan.diff import Op
from flanneld.plan.fold import Fold, Self
from flanneld.plan.ownership import Ownership

IDLE_S = 300.0
"""A peer that was used within so many seconds is never taken out of the tables."""


class VxlanNetwork:
    """Desired state of this host, and the answers to the kernel's questions."""

    runner: Runner | None = None
    """The kernel's tables carry the packets."""

    def __init__(
        self,
        conf: NetConf,
        settings: vxlan.VxlanConf,
        macs: Mapping[Family, MAC],
        around: Surroundings,
        idle_limit_s: float = IDLE_S,
    ) -> None:
        self.desired = Desired()
        self.settings = settings
        self._around, self._macs = around, macs
        self._idle_limit_s = idle_limit_s
        self._pages: dict[Family, Pages] = {}
        self._base_routes: dict[Route, None] = {}
        self._folds = {family: Fold(family) for family in conf.families()}
        self._bad_peers: dict[Family, dict[Prefix, str]] = {family: {} for family in conf.families()}
        self._isolated = False
        self._offload: bool | None = None
        """Whether our devices may leave checksums to the card; None = nobody has said, so they stay as found."""
        self.reconfigure(conf, settings, around.ext)

    def configure(self, ext: ExtIface) -> None:
        """Take an external interface that changed; residents stay.

        Raises:
            ConfigError: it cannot work on this interface; nothing was changed.
        """
        self.reconfigure(self.conf, self.settings, ext)

    def reconfigure(self, conf: NetConf, settings: vxlan.VxlanConf, ext: ExtIface) -> None:
        """Take another configuration too; only what can change on a live device may differ."""
        around, before = self._around, self.settings
        halves = vxlan.overlays(conf, settings, ext, around.subnets, self._macs, around.alias)
        self.conf, self.settings, self.ext = conf, settings, ext
        self._choose_offload(before)
        self.is_settled = False
        base = State.of(obj for half in halves for obj in half.base_objects())
        if self._offload is not None:
            base.offloads = {half.device: Offload(half.device, self._offload) for half in halves}
        if around.blackhole:
            for half in halves:
                base.add(Route(half.subnet, "", kind=RouteKind.BLACKHOLE, proto=PROTO_OURS, metric=METRIC_BLACKHOLE))
        if self._isolated:
            base = State.of(closed(base, (half.network for half in halves)))
        desired = self.desired
        desired.links, desired.sysctls, desired.addresses = base.links, base.sysctls, base.addresses
        desired.offloads = base.offloads
        for route in self._base_routes.keys() - base.routes.keys():
            desired.discard(route)
        self._base_routes = base.routes
        for route in base.routes:
            desired.add(route)
        for half in halves:
            self._reload(half)
        self.own = Ownership(
            devices=frozenset(half.device for half in halves),
            alias=around.alias,
            networks=(*(half.network for half in halves), *around.previous_networks),
            lease_lengths=frozenset(half.subnet.length for half in halves),
            underlay=ext.name,
        )

    def _choose_offload(self, before: vxlan.VxlanConf) -> None:
        """Take what the configuration says; where it leaves the choice to us, what was found out stays."""
        chosen = self.settings.tx_checksum
        if chosen != vxlan.AUTO:
            self._offload = chosen == "on"
        elif before.tx_checksum != vxlan.AUTO:
            self._offload = True  # as a device is made; the next fault is noticed again

    @property
    def tunnel_port(self) -> int:
        """See ``contracts.Tunnel``."""
        return self.settings.port

    @property
    def may_distrust_card(self) -> bool:
        """See ``contracts.Tunnel``."""
        return self.settings.tx_checksum == vxlan.AUTO and self._offload is not False

    def distrust_card(self) -> None:
        """See ``contracts.Tunnel``."""
        self._offload = False
        self.reconfigure(self.conf, self.settings, self.ext)

    def isolate(self, on: bool) -> None:
        """See ``contracts.DataPath``."""
        self._isolated = on
        self.reconfigure(self.conf, self.settings, self.ext)

    def _reload(self, half: vxlan.Overlay) -> None:
        pages = self._pages.get(half.family)
        if pages is None:
            self._pages[half.family] = Pages(half, self.desired, self.settings.page_ahead)
        else:
            pages.page_ahead = self.settings.page_ahead
            pages.reload(half)

    @property
    def watches_routes(self) -> bool:
        """Only DirectRouting looks at other people's routes."""
        return self.settings.direct_routing

    @property
    def pages(self) -> Mapping[Family, Pages]:
        """Residents by family."""
        return self._pages

    def public_addresses(self, leases: Iterable[Lease]) -> list[IP]:
        """Addresses whose routes decide between tunnel and direct routing; none when that is off."""
        if not self.settings.direct_routing:
            return []
        found = {ip for lease in leases for ip in (lease.attrs.public_ip, lease.attrs.public_ip6) if ip}
        return sorted(found)

    def settle(
        self, leases: Mapping[str, Lease], observed: State, direct: Mapping[IP, str], *, fill: bool
    ) -> dict[str, str]:
        """Take all present leases into ``desired``; what is in the tables already stays in.

        Args:
            leases: all of them by key, our own included.
            observed: the kernel's state.
            direct: interface by public address that is on-link.
            fill: whether to page in ahead of need.

        Returns:
            By lease, why it is not used.
        """
        leases = {} if self._isolated else leases
        self._folds = {family: Fold(family) for family in self._pages}
        for family, pages in self._pages.items():
            self._folds[family].update(leases, self.conf, self._me(), vxlan.TYPE)
            self._bad_peers[family] = {}
            peers = {s: p for s in self._folds[family].remotes if (p := self._peer(family, s)) is not None}
            pages.settle(peers, self._unserved(family), direct)
            pages.adopt(observed)
            if fill:
                pages.fill()
        self.is_settled = True
        return self._notes()

    def update(self, changes: Mapping[str, Lease | None], direct: Mapping[IP, str]) -> dict[str, str]:
        """Take changed leases (None = gone) into ``desired``, and page in ahead of need.

        Args:
            changes: by key.
            direct: as in ``settle``, for the changed peers only; the others keep their way.
        """
        if self._isolated:
            return {}
        for family, pages in self._pages.items():
            touched = self._folds[family].update(changes, self.conf, self._me(), vxlan.TYPE)
            pages.update({s: self._peer(family, s) for s in touched}, self._unserved(family), pages.direct_with(direct))
            pages.fill()
        return self._notes()

    def _me(self) -> Self:
        return Self.on(self.ext, self._around.subnets)

    def _peer(self, family: Family, subnet: Prefix) -> vxlan.Peer | None:
        """The peer of a subnet; None if there is none or its backend data is unusable."""
        self._bad_peers[family].pop(subnet, None)
        remote = self._folds[family].remotes.get(subnet)
        if remote is None:
            return None
        try:
            return vxlan.parse_peer(remote, self._macs[family])
        except PeerDataError as exc:
            self._bad_peers[family][subnet] = str(exc)
            return None

    def _unserved(self, family: Family) -> Collection[Prefix]:
        return [*self._folds[family].unserved, *self._bad_peers[family]]

    def _notes(self) -> dict[str, str]:
        notes: dict[str, str] = {}
        for family, pages in self._pages.items():
            notes.update(self._folds[family].notes)
            for part in (self._bad_peers[family], pages.notes):
                notes.update((f"{family.label} {subnet}", why) for subnet, why in part.items())
        return notes

    def is_unknown(self, device: str, ip: IP | None) -> bool:
        """Whether an address lies in space that anybody might have leased just now."""
        if ip is None:
            return False
        return any(p.overlay.device == device and p.is_unknown(ip) for p in self._pages.values())

    def answer(self, asked: Iterable[tuple[str, IP | None, MAC | None]]) -> list[Op]:
        """What to write for the kernel's questions (device, address, MAC); duplicates are answered once.

        What the answers add to ``desired`` does not count as changed: the caller writes it now.
        """
        ops: list[Op] = []
        for device, ip, mac in dict.fromkeys(asked):
            for family, pages in self._pages.items():
                if device != pages.overlay.device:
                    continue
                if ip is not None and family_of(ip) is family:
                    ops += pages.answer_ip(ip)
                elif ip is None and mac is not None:
                    ops += pages.answer_mac(mac)
        self.desired.applied(op.obj for op in ops)
        return ops

    def answer_is_right(self, entry: Neighbour) -> bool:
        """Whether a non-permanent neighbour on our device may stay."""
        return any(p.overlay.device == entry.link and p.answer_is_right(entry) for p in self._pages.values())

    def wants_page_out(self) -> list[str]:
        """Devices with more residents than the bound."""
        return [p.overlay.device for p in self._pages.values() if len(p.resident) > p.page_ahead]

    def page_out(self, device: str, idle_s: Mapping[MAC, float], answered: Iterable[Neighbour]) -> list[Op]:
        """Take the longest idle peers of a device out."""
        for pages in self._pages.values():
            if pages.overlay.device == device:
                ops = pages.page_out(idle_s, self._idle_limit_s, answered)
                self.desired.applied(op.obj for op in ops)
                return ops
        return []
