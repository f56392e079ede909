"""host-gw: each peer's subnet is routed through the peer's own address (contract section 6C). Pure.

No device, no encapsulation; works only among hosts that share a layer 2 segment. A peer beyond a router
is refused with a sentence and harms nobody else: a route through a gateway that is not on-link would send
its packets to a router that knows nothing of them.

What stays when the daemon ends: all routes, and pods keep talking (contract 6.28). The next daemon knows them
by their protocol number (``plan/ownership.py``) and removes those whose lease went meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.routes import direct_route
from backends.unpaged import UnpagedNetwork
from flanneld.contracts import DataPath, Surroundings
from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import IP, Family, format_ip
from flanneld.model.host import ExtIface
from flanneld.model.lease import LeaseAttrs
from flanneld.model.netconf import NetConf
from flanneld.model.objects import KernelObject
from flanneld.plan.fold import Remote

TYPE = "host-gw"


class HostGwNetwork(UnpagedNetwork):
    """One route for each peer."""

    watches_routes = True
    """The kernel's routes decide which peers are on-link."""

    def check(self, conf: NetConf, ext: ExtIface) -> None:
        """Peers route to the advertised address, so it has to be the interface's own (contract 5.13)."""
        if conf.v4 and ext.public_ip != ext.ip:
            public, own = (format_ip(ip) if ip else "none" for ip in (ext.public_ip, ext.ip))
            raise ConfigError(
                f"host-gw would advertise {public}, but {ext.name} has {own}: leave --public-ip out, or use vxlan "
                "behind NAT"
            )

    def reach(self, family: Family, remote: Remote, direct: Mapping[IP, str]) -> tuple[KernelObject, ...]:
        """The peer's route."""
        device = direct.get(remote.public_ip)
        if device is None:
            raise PeerDataError(
                f"lease {remote.subnet} is at {format_ip(remote.public_ip)}, which shares no segment with this host, "
                "as host-gw needs: no route (vxlan with DirectRouting crosses routers)"
            )
        return (direct_route(family, remote.subnet, remote.public_ip, device),)


class HostGwBackend:
    """See ``contracts.Backend``."""

    def __init__(self, conf: NetConf) -> None:
        self.conf = conf

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """Addresses only: the backend has no data of its own (contract 3.17)."""
        conf = self.conf
        return LeaseAttrs(
            ext.public_ip if conf.v4 else None, ext.public_ip6 if conf.v6 else None, TYPE, identity=identity
        )

    def mtu(self, ext: ExtIface) -> int:
        """Nothing is added to a packet (contract 6.2)."""
        return ext.mtu

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host."""
        return HostGwNetwork(self.conf, around, TYPE)

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Take a changed network configuration while running."""
        if not isinstance(path, HostGwNetwork):
            raise TypeError("a host-gw backend reconfigures its own data path only")
        path.reconfigure(conf, path.ext)
        self.conf = conf
