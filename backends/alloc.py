"""alloc: a lease and nothing else (contract 6.55). What carries the packets is somebody else's. Pure.

What stays when the daemon ends: the lease until it expires, ``subnet.env``, and the firewall rules that
``--ip-masq`` asked for; devices and routes were never touched.
"""

from __future__ import annotations

from backends.unpaged import UnpagedNetwork
from flanneld.contracts import DataPath, Surroundings
from flanneld.model.host import ExtIface
from flanneld.model.lease import LeaseAttrs
from flanneld.model.netconf import NetConf

NO_PEERS = "alloc"
"""No lease ever carries this type (contract 3.17), so there are no peers."""


class AllocBackend:
    """See ``contracts.Backend``."""

    def __init__(self, conf: NetConf) -> None:
        self.conf = conf

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """Addresses without a type, as Go flanneld writes them (contract 3.17)."""
        conf = self.conf
        return LeaseAttrs(ext.public_ip if conf.v4 else None, ext.public_ip6 if conf.v6 else None, identity=identity)

    def mtu(self, ext: ExtIface) -> int:
        """The interface's (contract 6.2)."""
        return ext.mtu

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host, which is none."""
        return AllocNetwork(self.conf, around, NO_PEERS)

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Take a changed network configuration while running."""
        if not isinstance(path, AllocNetwork):
            raise TypeError("an alloc backend reconfigures its own data path only")
        path.reconfigure(conf, path.ext)
        self.conf = conf


class AllocNetwork(UnpagedNetwork):
    """No peers: leases of whatever kind mean nothing here, not even a note."""

    def isolate(self, on: bool) -> None:
        """There is nothing to take out of harm's way: the data path is somebody else's."""

    def _notes(self) -> dict[str, str]:
        return {}
