"""The vxlan data path of this host: all its families, settled against the leases. Pure but for its memory.

What the reconcile loop, the miss listener and the reaper talk to. Keeps ``desired`` current in place;
decides nothing that ``vxlan.py`` and ``vxlan_pages.py`` do not say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from backends import vxlan
from backends.vxlan_pages import Pages
from flanneld.contracts import Surroundings
from flanneld.errors import PeerDataError
from flanneld.model.addr import IP, MAC, Family, family_of
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease
from flanneld.model.netconf import NetConf
from flanneld.model.objects import METRIC_BLACKHOLE, PROTO_OURS, Neighbour, Route, RouteKind
from flanneld.model.state import State
from flanneld.plan.diff import Op
from flanneld.plan.fold import Self, fold
from flanneld.plan.ownership import Ownership

IDLE_S = 300.0
"""A peer that was used within so many seconds is never taken out of the tables."""


class VxlanNetwork:
    """Desired state of this host, and the answers to the kernel's questions."""

    def __init__(
        self, conf: NetConf, settings: vxlan.VxlanConf, macs: Mapping[Family, MAC], around: Surroundings
    ) -> None:
        self.desired = State()
        self._around, self._macs = around, macs
        self._pages: dict[Family, Pages] = {}
        self._base_routes: dict[Route, None] = {}
        self.reconfigure(conf, settings, around.ext)

    def configure(self, ext: ExtIface) -> None:
        """Take an external interface that changed; residents stay.

        Raises:
            ConfigError: it cannot work on this interface; nothing was changed.
        """
        self.reconfigure(self.conf, self.settings, ext)

    def reconfigure(self, conf: NetConf, settings: vxlan.VxlanConf, ext: ExtIface) -> None:
        """Take another configuration too; only what can change on a live device may differ."""
        around = self._around
        halves = vxlan.overlays(conf, settings, ext, around.subnets, self._macs, around.alias)
        self.conf, self.settings, self.ext = conf, settings, ext
        base = State.of(obj for half in halves for obj in half.base_objects())
        if around.blackhole:
            for half in halves:
                base.add(Route(half.subnet, "", kind=RouteKind.BLACKHOLE, proto=PROTO_OURS, metric=METRIC_BLACKHOLE))
        desired = self.desired
        desired.links, desired.sysctls, desired.addresses = base.links, base.sysctls, base.addresses
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
        self, leases: Iterable[Lease], observed: State, direct: Mapping[IP, str], *, fill: bool
    ) -> dict[str, str]:
        """Take the present leases into ``desired``; what is in the tables already stays in.

        Args:
            leases: all of them, our own included.
            observed: the kernel's state.
            direct: interface by public address that is on-link.
            fill: whether to page in ahead of need.

        Returns:
            By lease, why it is not used.
        """
        subnets = self._around.subnets
        me = Self(
            (subnets.get(Family.V4), subnets.get(Family.V6)),
            frozenset(ip for ip in (self.ext.public_ip, self.ext.public_ip6) if ip),
        )
        folded = fold(leases, self.conf, me, vxlan.TYPE)
        notes = folded.notes
        for family, pages in self._pages.items():
            peers, unserved = {}, set(folded.unserved[family])
            for subnet, remote in folded.remotes[family].items():
                try:
                    peers[subnet] = vxlan.parse_peer(remote, self._macs[family])
                except PeerDataError as exc:
                    notes[str(subnet)] = str(exc)
                    unserved.add(subnet)
            for note in pages.settle(peers, unserved, direct):
                notes[note] = note
            pages.adopt(observed)
            if fill:
                pages.fill()
        return notes

    def answer(self, asked: Iterable[tuple[str, IP | None, MAC | None]]) -> list[Op]:
        """What to write for the kernel's questions (device, address, MAC); duplicates are answered once."""
        ops: list[Op] = []
        for device, ip, mac in dict.fromkeys(asked):
            for family, pages in self._pages.items():
                if device != pages.overlay.device:
                    continue
                if ip is not None and family_of(ip) is family:
                    ops += pages.answer_ip(ip)
                elif ip is None and mac is not None:
                    ops += pages.answer_mac(mac)
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
                return pages.page_out(idle_s, IDLE_S, answered)
        return []
