"""Routes that several backends make: straight to a peer's own address, and to nowhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flanneld.model.addr import IP, Family, Prefix
from flanneld.model.objects import METRIC_V6, PROTO_OURS, KernelObject, Route, RouteKind


def metric_of(family: Family) -> int:
    """The metric that a route without one has when it is read back (contract 6.1)."""
    return 0 if family is Family.V4 else METRIC_V6


def direct_route(family: Family, subnet: Prefix, gateway: IP, device: str) -> Route:
    """The route to a peer's subnet through its public address (contract 6.19, 6.23).

    Carries our protocol number, because nothing else about it proves that it is ours (design/adr-0004).

    Args:
        family: of the subnet.
        subnet: the peer's.
        gateway: the peer's public address, on-link on the device.
        device: name of the interface that the kernel reaches the gateway through.
    """
    return Route(subnet, device, gateway, proto=PROTO_OURS, metric=metric_of(family))


def closed(base: Iterable[KernelObject], networks: Iterable[Prefix]) -> Iterator[KernelObject]:
    """What is wanted of a host in quarantine: its devices, but the network out of reach.

    Senders are told at once. What has a better route goes on: containers here among each other, and the outside.

    Args:
        base: what is wanted whoever the peers are.
        networks: the cluster's.
    """
    yield from (obj for obj in base if not isinstance(obj, Route) or obj.kind is not RouteKind.UNICAST)
    for network in networks:
        yield Route(network, "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=metric_of(network.family))
