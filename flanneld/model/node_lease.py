"""A Kubernetes node as a lease, and our lease as annotations of our node (contract section 9).

Reads whatever a Go flanneld writes and writes only what it reads. The texts of annotations stand here and nowhere
else; who writes them when is ``sources/kube_keeper.py``'s work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import IP, Family, format_ip, parse_ip
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.model.lease_codec import check_size, word
from flanneld.model.node_codec import Node

MANAGED = "true"
"""Only nodes that carry exactly this in ``kube-subnet-manager`` take part (contract 9.3)."""

CONDITION = "NetworkUnavailable"
CONDITION_REASON = "FlannelIsUp"
CONDITION_MESSAGE = "Flannel is running on this node"
"""Source: contract 9.22, 13.14; the node controller takes the taint away when it sees the status False."""

# searched for, not anchored at the start, as Go flanneld does (contract 9.4)
_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?\Z")


class Annotations(NamedTuple):
    """Full names of the annotations, made by ``of_prefix``."""

    managed: str
    backend_type: str
    data: str
    data6: str
    public_ip: str
    public_ip6: str
    overwrite: str
    overwrite6: str
    node_ip: str
    node_ip6: str

    @staticmethod
    def of_prefix(prefix: str) -> Annotations:
        """The names under a ``--kube-annotation-prefix``: ``org.com`` and ``org.com/two`` are two networks.

        Raises:
            ConfigError: Kubernetes or Go flanneld would not take it.

        Source: contract 9.3, 9.4.
        """
        whole = prefix if "/" in prefix else prefix + "/"
        if not whole.endswith(("/", "-")):
            whole += "-"
        if whole.count("/") > 1 or not _PREFIX.search(whole):
            raise ConfigError(
                f"--kube-annotation-prefix is {prefix[:100]!r}: write a lower-case domain with a dot, and a name after "
                "a slash if you like, such as flannel.example.com or flannel.example.com/second"
            )
        return Annotations(
            *(
                whole + name
                for name in (
                    "kube-subnet-manager",
                    "backend-type",
                    "backend-data",
                    "backend-v6-data",
                    "public-ip",
                    "public-ipv6",
                    "public-ip-overwrite",
                    "public-ipv6-overwrite",
                    "node-public-ip",
                    "node-public-ipv6",
                )
            )
        )


def lease_of(node: Node, names: Annotations, revision: int) -> Lease | None:
    """What a node announces; None for a node that takes no part.

    A family in which it has no address or no pod CIDR is left out, whatever the other one has: a peer that reads
    only whole updates loses dual-stack changes (contract 9.8, 11.13).

    Args:
        node: as the API server tells it.
        names: of the annotations.
        revision: of the node, 0 when unknown.

    Raises:
        PeerDataError: it takes part, and something it says cannot be used.

    Source: contract 9.7 to 9.9.
    """
    given = node.annotations
    if given.get(names.managed) != MANAGED:
        return None
    try:
        public_ip = _address(given, names.public_ip, Family.V4)
        public_ip6 = _address(given, names.public_ip6, Family.V6)
        data, data6 = _data(given, names.data), _data(given, names.data6)
        backend_type = word(given.get(names.backend_type, ""), names.backend_type)
    except ValueError as error:
        raise PeerDataError(f"annotation {error}") from error
    subnet, subnet6 = node.pod_cidrs()
    subnet, subnet6 = (subnet if public_ip else None), (subnet6 if public_ip6 else None)
    if subnet is None and subnet6 is None:
        raise PeerDataError("it has no family with both a pod CIDR and a public address yet")
    attrs = LeaseAttrs(public_ip, public_ip6, backend_type, data, data6)
    return Lease(subnet, subnet6, attrs, revision, created=_in_order(node.metadata.made or ""))


def _in_order(timestamp: str) -> int:
    """A number that grows with the time that a server wrote down; 0 when it is none."""
    digits = "".join(char for char in timestamp if char in "0123456789")
    return int(digits) if len(digits) == len("20261121101235") else 0


def operator_addresses(node: Node, names: Annotations) -> tuple[IP | None, IP | None]:
    """The public addresses that an operator has set on our node; they go before flags (contract 9.3).

    Raises:
        PeerDataError: not an address of that family.
    """
    try:
        return (
            _address(node.annotations, names.node_ip, Family.V4),
            _address(node.annotations, names.node_ip6, Family.V6),
        )
    except ValueError as error:
        raise PeerDataError(
            f"annotation {error}: correct it with kubectl annotate --overwrite node {node.metadata.name}"
        ) from error


def changes(attrs: LeaseAttrs, given: Mapping[str, str], names: Annotations) -> dict[str, str]:
    """Which annotations our node lacks of what it should have; empty when it has all (contract 9.16).

    Args:
        attrs: what we announce.
        given: what the node has.
        names: of the annotations.

    Returns:
        Name to text, for one patch: peers act on each event at once (contract 13.13).
    """
    families = [_of_family(attrs, given, names, family) for family in Family]
    common = {names.managed: MANAGED, names.backend_type: attrs.backend_type}
    differing = [{k: v for k, v in wanted.items() if not _same(given.get(k), v)} for wanted in families]
    if families[0] and families[1] and bool(differing[0]) != bool(differing[1]):
        # Go flanneld hears of a dual-stack peer only when both families say something else (contract 9.8): a
        # blank before JSON means nothing to anybody and is something else
        same, name = (differing[1], names.data6) if differing[0] else (differing[0], names.data)
        text = given[name]
        same[name] = text.lstrip() if text != text.lstrip() else " " + text
    return {
        **{k: v for k, v in common.items() if given.get(k) != v},
        **differing[0],
        **differing[1],
    }


def bad_overwrites(given: Mapping[str, str], names: Annotations) -> list[str]:
    """Sentences about ``public-ip-overwrite`` annotations that are no addresses and so are not followed."""
    found = []
    for name, family in ((names.overwrite, Family.V4), (names.overwrite6, Family.V6)):
        try:
            _address(given, name, family)
        except ValueError as error:
            found.append(f"annotation {error}, it is not followed")
    return found


def _of_family(attrs: LeaseAttrs, given: Mapping[str, str], names: Annotations, family: Family) -> dict[str, str]:
    """What our node should say in one family, nothing where it is not served (contract 9.17)."""
    if family is Family.V4:
        if attrs.backend_type == "vxlan" and not attrs.data:
            return {}
        public = _overwritten(given, names.overwrite, family) or attrs.public_ip
        text = format_ip(public) if public else "0.0.0.0"  # as Go flanneld (contract 9.18)
        return {names.data: attrs.data.decode() or "null", names.public_ip: text}
    # a backend with data for IPv4 and none for IPv6 does not serve IPv6
    if attrs.public_ip6 is None or (attrs.data and not attrs.data6):
        return {}
    public = _overwritten(given, names.overwrite6, family) or attrs.public_ip6
    return {names.data6: attrs.data6.decode() or "null", names.public_ip6: format_ip(public)}


def _overwritten(given: Mapping[str, str], name: str, family: Family) -> IP | None:
    """The address that an operator wants peers to be told instead of ours (contract 9.16, 9.17)."""
    try:
        return _address(given, name, family)
    except ValueError:
        return None


def _same(old: str | None, new: str) -> bool:
    """Whether two texts say the same to a reader of JSON."""
    return old is not None and old.strip() == new


def _address(given: Mapping[str, str], name: str, family: Family) -> IP | None:
    text = given.get(name, "")
    if not text:
        return None
    try:
        ip = parse_ip(text)
    except ValueError:
        ip = None
    if ip is None or len(ip) * 8 != family.bits:
        raise ValueError(f"{name} is {_shown(text)}, which is not an {family.label} address")
    return ip if any(ip) else None


_check_json = msgspec.json.Decoder(msgspec.Raw).decode


def _data(given: Mapping[str, str], name: str) -> bytes:
    """Backend data as JSON; Go flanneld writes ``null`` or nothing where there is none (contract 9.3, 13.5)."""
    text = given.get(name, "").strip()
    if text in ("", "null"):
        return b""
    try:
        raw = text.encode()
        check_size(raw, f"annotation {name}")
        _check_json(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {_shown(text)}, which is not JSON") from error
    return raw


def _shown(text: str) -> str:
    """Foreign text for a sentence: printable, bounded."""
    return repr(text if len(text) <= 80 else text[:80] + "...")
