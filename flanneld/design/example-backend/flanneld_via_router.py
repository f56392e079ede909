"""A worked example of a backend from another package: all peers are routed through one router.

For a data centre whose router learns pod subnets by other means. The network configuration reads
``{"Network": "10.5.0.0/16", "Backend": {"Type": "via-router", "Router": "192.0.2.1"}}``.
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.routes import direct_route
from backends.unpaged import UnpagedNetwork
from flanneld.contracts import DataPath, Surroundings
from flanneld.errors import ConfigError
from flanneld.model.addr import IP, Family, family_of, parse_ip
from flanneld.model.backend_conf import BackendConf
from flanneld.model.host import ExtIface
from flanneld.model.lease import LeaseAttrs
from flanneld.model.netconf import NetConf
from flanneld.model.objects import KernelObject, Link
from flanneld.plan.fold import Remote

TYPE = "via-router"


def create(conf: NetConf, links: Mapping[str, Link], identity: str) -> ViaRouter:
    """What the entry point names: configuration in, backend out; raises ConfigError with a sentence."""
    return ViaRouter(conf)


class ViaRouter:
    """See flanneld.contracts.Backend."""

    def __init__(self, conf: NetConf) -> None:
        self.conf = conf
        text = BackendConf(conf.backend).text("Router", "")
        try:
            self.router = parse_ip(text)
        except ValueError as exc:
            raise ConfigError(f'Backend.Router is "{text}": give the address of the router') from exc

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """What this host publishes: its addresses."""
        return LeaseAttrs(ext.public_ip, ext.public_ip6, TYPE, identity=identity)

    def mtu(self, ext: ExtIface) -> int:
        """Nothing is added to a packet."""
        return ext.mtu

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host."""
        path = ViaRouterNetwork(self.conf, around, TYPE)
        path.router = self.router
        return path

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Nothing can change while it runs."""
        raise ConfigError("this backend takes a changed configuration at its next start")


class ViaRouterNetwork(UnpagedNetwork):
    """One route for each peer, all with the same gateway."""

    router: IP

    def reach(self, family: Family, remote: Remote, direct: Mapping[IP, str]) -> tuple[KernelObject, ...]:
        """A route through the router; none in a family that it does not speak."""
        if family is not family_of(self.router):
            return ()
        return (direct_route(family, remote.subnet, self.router, self.ext.name),)
