"""vxlan as the daemon sees it: settings and MACs in, lease data, MTU and data path out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from shlex import quote

from backends import vxlan
from backends.vxlan_net import VxlanNetwork
from flanneld.contracts import DataPath, Surroundings
from flanneld.errors import ConfigError
from flanneld.model.addr import MAC, Family
from flanneld.model.host import ExtIface
from flanneld.model.identity import mac_for
from flanneld.model.lease import LeaseAttrs
from flanneld.model.netconf import NetConf
from flanneld.model.objects import Link

log = logging.getLogger("flanneld.vxlan")

RESTART_KEYS = (("vni", "VNI"), ("port", "Port"), ("gbp", "GBP"))
"""Settings that a device cannot change while it lives, and that peers must share."""

ALIAS_MARK = "flanneld "
"""How the ``ifalias`` of a device of ours begins, whatever its network."""


class VxlanBackend:
    """See ``contracts.Backend``."""

    def __init__(self, conf: NetConf, links: Mapping[str, Link], identity: str) -> None:
        self._conf, self._links = conf, links
        self._settings = _settings(conf)
        self._macs = {family: self._mac(links, family, identity) for family in conf.families()}

    def _mac(self, links: Mapping[str, Link], family: Family, identity: str) -> MAC:
        """A surviving device keeps its MAC, whoever made it: peers have it in their tables (contract 6.11, 13.8)."""
        name = vxlan.DEVICE_NAME[family].format(self._settings.vni)
        there = links.get(name)
        if (
            there is not None
            and there.vxlan is not None
            and there.vxlan.vni == self._settings.vni
            and len(there.mac) == 6
        ):
            return there.mac
        return mac_for(identity, name)

    def lease_attrs(self, ext: ExtIface, identity: str) -> LeaseAttrs:
        """What this host publishes."""
        return vxlan.lease_attrs(self._conf, self._settings, ext, self._macs, identity)

    def mtu(self, ext: ExtIface) -> int:
        """MTU for containers: what every enabled family's device takes."""
        return min(vxlan.family_mtu(self._settings, ext, family) for family in self._conf.families())

    def data_path(self, around: Surroundings) -> DataPath:
        """Begin work on this host.

        Raises:
            ConfigError: too small an MTU, no address, or the device is another network's (failures F21).
        """
        for family in self._conf.families():
            name = vxlan.DEVICE_NAME[family].format(self._settings.vni)
            alias = self._links[name].alias if name in self._links else ""
            if alias.startswith(ALIAS_MARK) and alias != around.alias:
                raise ConfigError(
                    f'device {name} belongs to "{alias}", this daemon is "{around.alias}": two networks on one host '
                    f"need different values of Backend.VNI; if that network is gone: {_cleanup_of(alias)}, with its "
                    "--subnet-file if it had one of its own"
                )
        return VxlanNetwork(self._conf, self._settings, self._macs, around)

    def reconfigure(self, conf: NetConf, path: DataPath) -> None:
        """Take a changed network configuration while running."""
        settings = _settings(conf)
        for field, key in RESTART_KEYS:
            old, new = getattr(self._settings, field), getattr(settings, field)
            if old != new:
                raise ConfigError(f"Backend.{key} changed from {old} to {new}, which needs a restart of every flanneld")
        if not isinstance(path, VxlanNetwork):
            raise TypeError("a vxlan backend reconfigures its own data path only")
        path.reconfigure(conf, settings, path.ext)
        self._conf, self._settings = conf, settings


def _cleanup_of(alias: str) -> str:
    """The command that removes all that the network of a device's mark has left on this host."""
    network = alias.removeprefix(ALIAS_MARK)
    prefix = network.removeprefix("kubernetes ")
    flags = ["--kube-subnet-mgr", f"--kube-annotation-prefix={quote(prefix)}"]
    return " ".join(("flannelctl cleanup", *(flags if prefix != network else [f"--etcd-prefix={quote(network)}"])))


def _settings(conf: NetConf) -> vxlan.VxlanConf:
    settings, unknown = vxlan.parse_conf(conf)
    if unknown:
        log.warning("unknown keys in Backend are ignored: %s", ", ".join(unknown))
    return settings
