"""What the Kubernetes API says, as far as we read it: nodes, pages of them, events, refusals.

Decodes only the fields named here: of a node's tens of KiB (managed fields, images) nothing else is ever an object.
What a node means as a lease is ``node_lease.py``.
"""

from __future__ import annotations

import msgspec

from flanneld.errors import PeerDataError
from flanneld.model.addr import Family, Prefix

_TOO_DEEP = "nested too deeply"


class Meta(msgspec.Struct, frozen=True):
    """``metadata`` of a node, a page or an event's object."""

    name: str = ""
    uid: str = ""
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    made: str | None = msgspec.field(default=None, name="creationTimestamp")
    """When the server made it, ``2026-11-21T10:12:35Z``."""
    annotations: dict[str, str] | None = None
    next_page: str = msgspec.field(default="", name="continue")


class _Spec(msgspec.Struct, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    node_name: str = msgspec.field(default="", name="nodeName")


class _Condition(msgspec.Struct, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""


class _Conditions(msgspec.Struct, frozen=True):
    conditions: list[_Condition] | None = None


class Node(msgspec.Struct, frozen=True):
    """A node; also a pod, a bookmark and a Status, which have the same outline.

    ``status`` of a node is an object, that of a Status a word, hence undecoded.
    """

    metadata: Meta = Meta()
    spec: _Spec = _Spec()
    status: msgspec.Raw = msgspec.Raw()
    code: int = 0
    """Of a Status: the HTTP status."""
    reason: str = ""
    """Of a Status: ``Expired``, ``Forbidden``."""
    message: str = ""
    """Of a Status: for people."""

    @property
    def annotations(self) -> dict[str, str]:
        """Its annotations, by full name."""
        return self.metadata.annotations or {}

    def pod_cidrs(self) -> tuple[Prefix | None, Prefix | None]:
        """The IPv4 and IPv6 subnets that the cluster gave this node (contract 9.9, 9.15).

        Raises:
            PeerDataError: not a CIDR, or several of one family.
        """
        texts = self.spec.pod_cidrs or ([self.spec.pod_cidr] if self.spec.pod_cidr else [])
        found: dict[Family, Prefix] = {}
        for text in texts:
            try:
                subnet = Prefix.parse(text)
            except ValueError as error:
                raise PeerDataError(f"node {self.metadata.name} has an unusable pod CIDR: {error}") from error
            if found.setdefault(subnet.family, subnet) != subnet:
                raise PeerDataError(
                    f"node {self.metadata.name} has two {subnet.family.label} pod CIDRs, "
                    f"{found[subnet.family]} and {subnet}: one for each family can be used"
                )
        return found.get(Family.V4), found.get(Family.V6)

    def condition(self, name: str) -> tuple[str, str] | None:
        """Status and reason of a condition; None when the node has none of that name."""
        try:
            conditions = _decode_conditions(self.status).conditions if self.status else None
        except msgspec.MsgspecError:
            return None
        return next(((c.status, c.reason) for c in conditions or () if c.type == name), None)


class Event(msgspec.Struct, frozen=True):
    """One line of a watch."""

    type: str = ""
    """``ADDED``, ``MODIFIED``, ``DELETED``, ``BOOKMARK`` or ``ERROR``."""
    object: Node = Node()
    """A node; in a bookmark only its revision is set; in an error a Status."""


class Page(msgspec.Struct, frozen=True):
    """Part of a list of nodes; each is decoded by itself, so that a bad one costs only itself."""

    metadata: Meta = Meta()
    items: list[msgspec.Raw] | None = None


_decode_conditions = msgspec.json.Decoder(_Conditions).decode
_decode_node = msgspec.json.Decoder(Node).decode
_decode_event = msgspec.json.Decoder(Event).decode
_decode_page = msgspec.json.Decoder(Page).decode


def decode_node(raw: bytes | msgspec.Raw) -> Node:
    """Decode a node, a pod or a Status.

    Raises:
        ValueError: not such an object.
    """
    try:
        return _decode_node(raw)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def decode_event(line: bytes) -> Event:
    """Decode one line of a watch.

    Raises:
        ValueError: half a line, or something else.
    """
    try:
        return _decode_event(line)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def decode_page(raw: bytes | bytearray) -> Page:
    """Decode part of a list; ``null`` for no items is fine.

    Raises:
        ValueError: not a list.
    """
    try:
        return _decode_page(raw)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
