"""Data paths, one file each, chosen by the ``Backend.Type`` of the network configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flanneld.contracts import Backend
from flanneld.errors import ConfigError
from flanneld.model.netconf import NetConf
from flanneld.model.objects import Link

Create = Callable[[NetConf, Mapping[str, Link], str], Backend]
"""(network configuration, devices of this host by name, machine identity) to a backend."""


def _vxlan(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    from backends.vxlan_backend import VxlanBackend  # imported when chosen: each backend costs start-up time

    return VxlanBackend(conf, links, identity)


BACKENDS: Mapping[str, Create] = {"vxlan": _vxlan}
"""Every backend by its ``Type``, lower case (contract 2.4)."""

LATER = ("alloc", "extension", "host-gw", "ipip", "ipsec", "tencent-vpc", "udp", "wireguard")
"""Types that Go flanneld knows and this version does not."""


def create(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    """The backend that the configuration asks for.

    Raises:
        ConfigError: unknown type, or its settings are wrong.
    """
    make = BACKENDS.get(conf.backend_type)
    if make is None:
        known = ", ".join(BACKENDS)
        why = "is not part of this version yet" if conf.backend_type in LATER else "is unknown"
        raise ConfigError(f'Backend.Type is "{conf.backend_type}", which {why}: use one of {known}')
    return make(conf, links, identity)
