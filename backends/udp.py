"""udp: every packet in a UDP datagram of its own, bare, as flannel sends it (contract section 6G). Pure.

What moves the packets is ``udp_runner.py``'s choice among data paths; here stands what this host publishes,
who its peers are, and what address and route the TUN device has.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from backends.udp_packet import OVERHEAD, UdpPeer
from backends.udp_runner import UdpRunner
from backends.unpaged import UnpagedNetwork
from flanneld.contracts import DataPath, Surroundings
from flanneld.errors import ConfigError
from flanneld.model.addr import IP, MAC, Family, Prefix
from flanneld.model.backend_conf import BackendConf
from flanneld.model.host import ExtIface
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.model.mtu import WireMTU, tunnel_mtu
from flanneld.model.netconf import NetConf
from flanneld.model.objects import Address, KernelObject, Link, Route
from flanneld.plan.fold import Remote

log = logging.getLogger("flanneld.udp")

DEVICE = "flannel0"
"""Go flanneld asks for ``flannel%d`` and gets this one (contract 6.48)."""
DEFAULT_PORT = 8285  # contract 6.47
NO_TYPE = ""
"""udp leases carry no BackendType (contract 3.17)."""
DATA_PATHS = ("auto", "kernel", "gso", "basic")


class UdpConf(NamedTuple):
    """``Backend`` of the network configuration, validated."""

    port: int = DEFAULT_PORT
    """UDP port of every host; leases carry none (contract 13.10)."""
    data_path: str = "auto"
    """One of ``DATA_PATHS``; auto takes the first that works."""
    any_source: bool = False
    """Take datagrams from senders without a lease, as Go flanneld does (contract 6.50)."""
    compat_always: bool = False
    """Finish checksums in software towards all peers, for network cards that get them wrong."""
    hash_source_port: bool = False
    """Spread flows over source ports; firewalls may expect the one port."""
    beside_ipsec: bool = False
    """Use the kernel path although IPsec policies exist, which it goes around."""


def parse_conf(conf: NetConf) -> tuple[UdpConf, tuple[str, ...]]:
    """Validate the backend's part of the configuration; returns the settings and the unknown keys.

    Raises:
        ConfigError: names key, value and remedy.
    """
    if conf.v6 is not None:
        raise ConfigError("EnableIPv6 is true, but the udp backend carries IPv4 only: use vxlan or host-gw for IPv6")
    raw = BackendConf(conf.backend)
    data_path = raw.text("DataPath", "auto").lower()
    if data_path not in DATA_PATHS:
        raise ConfigError(f'Backend.DataPath is "{data_path}": use one of {", ".join(DATA_PATHS)}')
    settings = UdpConf(
        port=raw.integer("Port", DEFAULT_PORT, 1, 65535),
        data_path=data_path,
        any_source=raw.boolean("AnySource", False),
        compat_always=raw.boolean("CompatAlways", False),
        hash_source_port=raw.boolean("HashSourcePort", False),
        beside_ipsec=raw.boolean("BesideIPsec", False),
    )
    return settings, raw.unknown()


class _Announcement(msgspec.Struct):
    """What our nodes add to their lease; Go flanneld neither writes nor reads it."""

    KernelRx: bool = False


def takes_unfinished_checksums(data: bytes) -> bool:
    """Whether a peer announced a kernel receive path, which alone understands checksums left to hardware."""
    try:
        return bool(data) and msgspec.json.decode(data, type=_Announcement).KernelRx
    except (ValueError, RecursionError):
        return False  # whatever it is, it is no promise


class UdpNetwork(UnpagedNetwork):
    """The TUN's address and route; the peers are the runner's."""

    devices = frozenset({DEVICE})
    watches_routes = True
    """The kernel path sends by one interface; a peer that is routed through another is the pump's."""

    def __init__(self, conf: NetConf, around: Surroundings, settings: UdpConf, *, announced: bool) -> None:
        self.peers: dict[Prefix, UdpPeer] = {}
        self._settings = settings
        super().__init__(conf, around, NO_TYPE)
        self.engine = UdpRunner(self, settings, around, announced=announced)
        self.runner = self.engine

    @property
    def subnet(self) -> Prefix:
        """Our own."""
        return self.around.subnets[Family.V4].masked()

    @property
    def mtu(self) -> int:
        """Of the TUN, in bytes."""
        return tun_mtu(self.ext)

    def public_addresses(self, leases: Iterable[Lease]) -> Sequence[IP]:
        """None whose routes decide about objects; the data path asks for itself."""
        return ()

    def check(self, conf: NetConf, ext: ExtIface) -> None:
        """The interface must have an IPv4 address and leave room for packets."""
        if ext.ip is None:
            raise ConfigError(f"interface {ext.name} has no IPv4 address, which the udp backend sends from")
        tun_mtu(ext)

    def base_objects(self) -> Iterator[KernelObject]:
        """The TUN as contract 6.48 has it; the runner makes it."""
        yield Link(DEVICE, MAC(b""), self.mtu, True, self.around.alias, None)
        yield Address(DEVICE, self.subnet.host(0), 32)
        if self.conf.v4 is not None:
            yield Route(self.conf.v4.network, DEVICE)

    def reach(self, family: Family, remote: Remote, direct: Mapping[IP, str]) -> tuple[KernelObject, ...]:
        """Nothing in the tables: one route leads all packets into the TUN."""
        port = self._settings.port
        self.peers[remote.subnet] = UdpPeer(remote.public_ip, port, takes_unfinished_checksums(remote.data))
        return ()

    def forget(self, subnet: Prefix) -> None:
        """The peer of a subnet is gone."""
        self.peers.pop(subnet, None)


def tun_mtu(ext: ExtIface) -> int:
    """MTU for containers and TUN: the interface's less an IPv4 and a UDP header (contract 6.2)."""
    return tunnel_mtu(WireMTU(ext.mtu), OVERHEAD, Family.V4)


class UdpBackend:
    """See ``contracts.Backend``."""

    def __init__(self, conf: NetConf, links: Mapping[str, Link]) -> None:
        self._conf = conf
        self._settings, unknown = parse_conf(conf)
        if unknown:
            log.warning("unknown keys in Backend are ignored: %s", ", ".join(unknown))
        self._path: UdpNetwork | None = None
        # Only the kernel path's TUN outlives its daemon. It still receives, so the announcement is not taken back
        # for the second that a restart takes: every peer would change its way of sending, twice.
        self._still_receives = DEVICE in links and self._settings.data_path in ("auto", "kernel")

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """The address, and whether our kernel receives; without that, as Go flanneld writes it."""
        kernel_rx = self._path.engine.kernel_rx if self._path else self._still_receives
        data = b'{"KernelRx":true}' if kernel_rx else b""
        return LeaseAttrs(ext.public_ip, None, NO_TYPE, data, identity=identity)

    def mtu(self, ext: ExtIface) -> int:
        """MTU for containers."""
        return tun_mtu(ext)

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host."""
        self._path = UdpNetwork(self._conf, around, self._settings, announced=self._still_receives)
        return self._path

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Take a changed network configuration while running."""
        if not isinstance(path, UdpNetwork):
            raise TypeError("a udp backend reconfigures its own data path only")
        settings, _unknown = parse_conf(conf)
        if settings != self._settings:
            raise ConfigError("Backend changed, and the udp backend takes its settings at start: restart flanneld")
        path.reconfigure(conf, path.ext)
        self._conf = conf
