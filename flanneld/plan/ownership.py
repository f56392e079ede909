"""How a fresh process knows which kernel objects are ours: by what they are, never by memory.

=============  ======================================================================================
object         ours when
=============  ======================================================================================
link           it has one of our names, or our network's ``ifalias`` (a device of a former VNI)
sysctl         it is a setting of our device; never taken back
offload        it is of our device, and the configuration or a fault says what it has to be; never taken back
address        it is on our device, except IPv6 link-local ones, which the kernel makes
fdb            it is a permanent entry of our device; the others are learned, where that is configured
neighbour      it is on our device: permanent ones are programmed, the others answer one miss
route          it is on our device and not the kernel's own; or it carries our protocol number and
               leads into our network; or it has the shape of Go flanneld's direct routes: protocol boot,
               through a gateway on the external interface, to a block of the lease size in our network
=============  ======================================================================================

Firewall rules are owned by the name of their table or chain, and the networks they are for (``plan/rule_owner.py``).
"""

from __future__ import annotations

from typing import NamedTuple

from flanneld.model.addr import Prefix
from flanneld.model.objects import (
    PROTO_BOOT,
    PROTO_OURS,
    Address,
    Fdb,
    KernelObject,
    Link,
    Neighbour,
    Offload,
    Route,
    Sysctl,
)
from flanneld.model.objects import RouteKind as Kind

RTPROT_KERNEL = 2
LINK_LOCAL6 = b"\xfe\x80"


class Ownership(NamedTuple):
    """What identifies this daemon's objects on this host."""

    devices: frozenset[str]
    """Names of the devices we make now."""
    alias: str
    """``ifalias`` of our devices; tells two networks on one host apart (failures F21)."""
    networks: tuple[Prefix, ...]
    """Cluster networks of both families, present and previous (from subnet.env)."""
    lease_lengths: frozenset[int] = frozenset()
    """Prefix lengths that leases have here."""
    underlay: str = ""
    """Name of the external interface."""

    def owns(self, obj: KernelObject) -> bool:
        """Whether we may change or delete this object."""
        match obj:
            case Link():
                return obj.name in self.devices or bool(self.alias and obj.alias == self.alias)
            case Address():
                return obj.link in self.devices and not (len(obj.ip) == 16 and obj.ip.startswith(LINK_LOCAL6))
            case Fdb():
                return obj.link in self.devices and obj.permanent
            case Neighbour():
                return obj.link in self.devices
            case Route():
                return self._owns_route(obj)
            case Sysctl() | Offload():
                return False

    def _owns_route(self, obj: Route) -> bool:
        if obj.link in self.devices:
            return obj.proto != RTPROT_KERNEL
        if not any(network.covers(obj.dst) for network in self.networks):
            return False
        if obj.proto == PROTO_OURS:
            return True
        return (
            obj.proto == PROTO_BOOT
            and obj.kind is Kind.UNICAST
            and not obj.extra
            and obj.gateway is not None
            and obj.link == self.underlay
            and obj.dst.length in self.lease_lengths
        )
