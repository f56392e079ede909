"""Routes through nexthop objects, where there are so many that the kernel's own way gets slow.

Every route with its own gateway makes a ``fib_info``, and all of one device fall into one hash bucket
(the gateway is not hashed, net/ipv4/fib_semantics.c), so adding the n-th costs n steps: 2.4 s for 15 000.
A route that names a nexthop object shares what the object holds and costs the same however many there are
(measured: 76 times less, design/adr-0007-nexthop-objects.md). Dumps still show gateway and device, so
readers of ``ip route`` see what they always saw, with ``nhid`` before it.

Objects are ours by their protocol number. One serves all routes of one gateway and device; it is deleted
after its last route, never before: the kernel would take the routes along.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from flanneld.kernel import nlmsg, route_codec
from flanneld.model.addr import IP, Prefix
from flanneld.model.objects import PROTO_OURS

RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106
NHA_ID, NHA_OIF, NHA_GATEWAY = 1, 5, 6
_NHMSG = struct.Struct("=BBBxI")  # nhmsg: family, scope, protocol, reserved, flags (uapi/linux/nexthop.h)

THRESHOLD = 500
"""Gateway routes on one device above which new ones go through objects."""

FIRST_ID = 0x46_4C_00_00
"""Our ids start here ("FL"), far from the small numbers that routing daemons count from."""


class Hop(NamedTuple):
    """What an object stands for."""

    ifindex: int
    gateway: IP
    onlink: bool


class Nexthops:
    """Our nexthop objects as of the last look at the kernel, kept current by our own writes."""

    def __init__(self) -> None:
        self._ids: dict[Hop, int] = {}
        self._hops: dict[int, Hop] = {}
        self._users: Counter[int] = Counter()
        self._through: dict[Prefix, int] = {}
        """By destination, the object that its route goes through. The kernel finds such a route for deletion
        by the object's id only, not by the gateway that it shows (fib_nh_match)."""
        self._routes: Counter[int] = Counter()
        """Gateway routes by device, of either kind."""
        self._next = FIRST_ID
        self.supported: bool | None = None
        """Whether the kernel has them (Linux 5.3); None = not asked yet."""

    def forget(self) -> None:
        """Begin a new look at the kernel."""
        self._ids.clear()
        self._hops.clear()
        self._users.clear()
        self._through.clear()
        self._routes.clear()

    def retire(self) -> None:
        """Route the classic way from now until the next look; objects go with their last route."""
        self.supported = False
        self._ids.clear()

    def seen_object(self, body: memoryview) -> None:
        """Take one RTM_NEWNEXTHOP of a dump."""
        if len(body) < _NHMSG.size:
            return
        _family, _scope, proto, flags = _NHMSG.unpack_from(body)
        found = nlmsg.attrs(body, _NHMSG.size)
        number, gateway = nlmsg.u32(found.get(NHA_ID)), found.get(NHA_GATEWAY)
        self._next = max(self._next, number + 1) if number >= FIRST_ID else self._next
        if proto == PROTO_OURS and gateway:
            hop = Hop(nlmsg.u32(found.get(NHA_OIF)), IP(gateway), bool(flags & route_codec.RTNH_F_ONLINK))
            self._ids[hop], self._hops[number] = number, hop

    def seen_route(self, dst: Prefix, ifindex: int, number: int) -> None:
        """Take one gateway route of a dump; ``number`` is its object's id, 0 without."""
        self._routes[ifindex] += 1
        if number:
            self._users[number] += 1
            self._through[dst] = number

    def put(self, dst: Prefix, hop: Hop) -> tuple[int, list[bytes], list[bytes]]:
        """How to route to a destination through a gateway.

        Returns:
            The object's id, or 0 to route the classic way; what to send before the route, and what after it.
        """
        known = self._ids.get(hop)
        before: list[bytes] = []
        self._routes[hop.ifindex] += 1
        if known is None and self.supported and self._routes[hop.ifindex] > THRESHOLD and len(hop.gateway) == 4:
            known, self._next = self._next, self._next + 1
            self._ids[hop], self._hops[known] = known, hop
            before.append(_create(known, hop))
        if known is not None:
            self._users[known] += 1
        _number, after = self.drop(dst)
        if known is not None:
            self._through[dst] = known
        return known or 0, before, after

    def drop(self, dst: Prefix) -> tuple[int, list[bytes]]:
        """The object that a route goes through (0 = none), and what to send once the route is gone."""
        number = self._through.pop(dst, 0)
        if not number:
            return 0, []
        self._users[number] -= 1
        if self._users[number] > 0:
            return number, []
        del self._users[number]
        self._ids.pop(self._hops.pop(number), None)
        return number, [_delete(number)]

    def unused(self, devices: Collection[int]) -> list[bytes]:
        """What to send to remove objects that no route uses, left by a crash between two writes.

        Args:
            devices: indexes of those whose routes were all seen; a twin daemon's objects are on others.
        """
        idle = [(h, number) for h, number in self._ids.items() if not self._users[number] and h.ifindex in devices]
        for hop, number in idle:
            del self._ids[hop], self._hops[number]
        return [_delete(number) for _hop, number in idle]


def _create(number: int, hop: Hop) -> bytes:
    family = 2 if len(hop.gateway) == 4 else 10
    flags = route_codec.RTNH_F_ONLINK if hop.onlink else 0
    body = _NHMSG.pack(family, 0, PROTO_OURS, flags) + nlmsg.put_u32(NHA_ID, number)
    body += nlmsg.put_u32(NHA_OIF, hop.ifindex) + nlmsg.attr(NHA_GATEWAY, hop.gateway)
    return nlmsg.message(RTM_NEWNEXTHOP, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_REPLACE, body)


def _delete(number: int) -> bytes:
    return nlmsg.message(RTM_DELNEXTHOP, 0, _NHMSG.pack(0, 0, 0, 0) + nlmsg.put_u32(NHA_ID, number))


def dump() -> bytes:
    """Ask for all nexthop objects."""
    return nlmsg.message(RTM_GETNEXTHOP, nlmsg.NLM_F_DUMP, _NHMSG.pack(0, 0, 0, 0))
