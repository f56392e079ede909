"""Data paths, one file each, chosen by the ``Backend.Type`` of the network configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from flanneld.contracts import Backend
from flanneld.errors import ConfigError
from flanneld.model.netconf import NetConf
from flanneld.model.objects import Link

Create = Callable[[NetConf, Mapping[str, Link], str], Backend]
"""(network configuration, devices of this host by name, machine identity) to a backend."""


def _vxlan(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    from backends.vxlan_backend import VxlanBackend  # imported when chosen: each backend costs start-up time

    return VxlanBackend(conf, links, identity)


def _host_gw(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    from backends.host_gw import HostGwBackend

    return HostGwBackend(conf)


def _alloc(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    from backends.alloc import AllocBackend

    return AllocBackend(conf)


def _udp(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    from backends.udp import UdpBackend

    return UdpBackend(conf, links)


BACKENDS: Mapping[str, Create] = {"vxlan": _vxlan, "host-gw": _host_gw, "alloc": _alloc, "udp": _udp}
"""Every backend of this project by its ``Type``, lower case (contract 2.4)."""

LATER = ("extension", "ipip", "ipsec", "tencent-vpc", "wireguard")
"""Types that Go flanneld knows and this version does not."""

ENTRY_POINTS = "flanneld.backends"
"""Entry point group through which other packages add backends (design/plug-ins.md)."""


def create(conf: NetConf, links: Mapping[str, Link], identity: str) -> Backend:
    """The backend that the configuration asks for.

    Raises:
        ConfigError: unknown type, or its settings are wrong.
    """
    make = BACKENDS.get(conf.backend_type) or _plugged_in(conf.backend_type)
    if make is None:
        known = ", ".join(sorted(BACKENDS))
        why = "is not part of this version yet" if conf.backend_type in LATER else "is unknown"
        raise ConfigError(f'Backend.Type is "{conf.backend_type}", which {why}: use one of {known}')
    return make(conf, links, identity)


def _plugged_in(name: str) -> Create | None:
    """A backend that another installed package offers; a broken one is the operator's error, not a crash."""
    from importlib.metadata import entry_points  # 15 ms that no backend of this project has to wait for

    found = next(iter(entry_points(group=ENTRY_POINTS, name=name)), None) if name else None
    if found is None:
        return None
    try:
        make = found.load()
    except Exception as exc:  # a stranger's code may raise anything while it is imported
        where = found.dist.name if found.dist else "an installed package"
        raise ConfigError(f'backend "{name}" of {where} cannot be loaded: {exc!r}') from exc
    if not callable(make):
        raise ConfigError(f'backend "{name}" is {make!r}, which cannot be called: see design/plug-ins.md')
    return cast(Create, make)
