"""How a lease is shown to people and to programs. Pure: no etcd, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from flanneld.errors import PeerDataError
from flanneld.model.addr import IP, Prefix, format_ip
from flanneld.model.lease import LeaseAttrs
from flanneld.model.lease_codec import decode_attrs, parse_key
from flanneld.model.plain import plain
from flanneld.report.table import render_table

TTL_S = 86400
"""What every flanneld asks for when it renews (contract 3.19); the age of a renewal is what is missing from it."""


class View(NamedTuple):
    """One key below ``subnets/``, readable or not."""

    name: str
    """The key's last element."""
    subnets: tuple[Prefix | None, Prefix | None]
    attrs: LeaseAttrs
    ttl_id: int
    revision: int
    problem: str
    """Why flanneld cannot use it; empty when it can."""
    ttl_s: int | None = None
    """Seconds left; None = never asked, or a reservation, which does not expire."""
    is_own: bool = False
    is_late: bool = False
    """Whether its host should have renewed it by now."""
    node: str = ""
    """With Kubernetes, the node that the lease is on; there it neither expires nor is it a reservation."""

    @staticmethod
    def of(name: str, value: bytes, ttl_id: int = 0, revision: int = 0) -> View:
        """Read a key and its value; a bad one is shown too, with the reason."""
        subnets: tuple[Prefix | None, Prefix | None] = (None, None)
        attrs, problem = LeaseAttrs(None), ""
        try:
            subnets = parse_key(name.encode())
            attrs = decode_attrs(value)
        except PeerDataError as error:
            problem = str(error)
        return View(name, subnets, attrs, ttl_id, revision, problem)

    def subnet_text(self) -> str:
        """Subnets in words; the key itself when it names none."""
        return " ".join(str(subnet) for subnet in self.subnets if subnet) or self.name

    def holds(self, what: Prefix | IP) -> bool:
        """Whether the lease is about this subnet or address: its own, one of its pods', or its host's."""
        if self.is_leased_to(what):
            return True
        return not isinstance(what, Prefix) and any(subnet and what in subnet for subnet in self.subnets)

    def is_leased_to(self, what: Prefix | IP) -> bool:
        """Whether the lease is this subnet's, or this host's by its public address."""
        if isinstance(what, Prefix):
            return any(subnet and subnet.masked() == what.masked() for subnet in self.subnets)
        return what in (self.attrs.public_ip, self.attrs.public_ip6)

    def mac(self) -> str:
        """MAC of the host's vxlan device, of IPv4's if it has two; empty for other backends."""
        return _field(self.attrs.data, "vtepmac") or _field(self.attrs.data6, "vtepmac")


def mark_own(view: View, is_local: Callable[[IP], bool], identity: str) -> View:
    """Tell whether a lease is this machine's: by the identity in it, else by its public address.

    Args:
        view: the lease.
        is_local: whether an address is configured on this machine.
        identity: this machine's, empty when not known.
    """
    if view.attrs.identity and identity:
        return view._replace(is_own=view.attrs.identity == identity)
    addresses = [ip for ip in (view.attrs.public_ip, view.attrs.public_ip6) if ip]
    return view._replace(is_own=any(is_local(ip) for ip in addresses))


LATE_S = 300
"""How much later than it should a host may renew its lease before somebody wonders."""


def mark_late(view: View, margin_s: float) -> View:
    """Tell whether a lease should have been renewed by now.

    Args:
        view: the lease, with its time to live.
        margin_s: how long before its end hosts renew theirs, in seconds; never earlier than half of its life.
    """
    return view._replace(is_late=view.ttl_s is not None and view.ttl_s < min(margin_s, TTL_S / 2) - LATE_S)


def late_line(view: View) -> str:
    """A sentence about a lease that is late."""
    return (
        f"{view.subnet_text()} of {view.attrs.where()} was not renewed in time, {_ttl(view)} left: is that host gone?"
    )


HEAD = ("", "SUBNET", "PUBLIC IP", "BACKEND", "MAC", "TTL", "AGE")
HEAD_NODES = (*HEAD[:5], "NODE")


def table(views: list[View]) -> str:
    """Leases for people; ours has a star."""
    if any(view.node for view in views):
        return render_table(HEAD_NODES, [[*row[:5], view.node] for row, view in zip(_rows(views), views, strict=True)])
    return render_table(HEAD, _rows(views))


def _rows(views: list[View]) -> list[list[str]]:
    rows = []
    for view in views:
        if view.problem:
            rows.append(["!", view.subnet_text(), "unusable", "-", "-", _ttl(view), _age(view)])
        else:
            public = view.attrs.where().replace("+", " ")
            kind = view.attrs.backend_type or "udp/alloc"
            mark = "*" if view.is_own else "?" if view.is_late else ""
            rows.append([mark, view.subnet_text(), public, kind, view.mac() or "-", _ttl(view), _age(view)])
    return rows


def details(view: View) -> str:
    """All that is known of one lease, a line each."""
    attrs = view.attrs
    lines = [
        ("subnet", view.subnet_text()),
        ("node", view.node),
        ("key", view.name if not view.node else ""),
        ("problem", view.problem),
        ("public IP", attrs.where().replace("+", " ") if not view.problem else ""),
        ("this machine", "yes" if view.is_own else "no"),
        ("backend", attrs.backend_type or ("" if view.problem else "none named (udp or alloc)")),
        ("data", attrs.data.decode(errors="replace")),
        ("data, IPv6", attrs.data6.decode(errors="replace")),
        ("identity", attrs.identity or ("" if view.problem or view.node else "none (written by Go flanneld)")),
        ("time to live", _ttl(view) if not view.node else ""),
        ("last renewed", f"{_age(view)} ago" if view.ttl_s is not None else ""),
        ("etcd lease", _etcd_lease(view)),
        ("revision", str(view.revision)),
    ]
    return "\n".join(f"{name + ':':<14}{plain(text)}" for name, text in lines if text)


def as_json(view: View) -> dict[str, object]:
    """For programs; fields are only ever added."""
    attrs = view.attrs
    subnet, subnet6 = view.subnets
    return {
        "key": view.name,
        "node": view.node or None,
        "subnet": str(subnet) if subnet else None,
        "subnet6": str(subnet6) if subnet6 else None,
        "public_ip": format_ip(attrs.public_ip) if attrs.public_ip else None,
        "public_ip6": format_ip(attrs.public_ip6) if attrs.public_ip6 else None,
        "backend_type": attrs.backend_type or None,
        "backend_data": _loads(attrs.data),
        "backend_data6": _loads(attrs.data6),
        "mac": view.mac() or None,
        "identity": attrs.identity or None,
        "own": view.is_own,
        "reservation": view.ttl_id == 0 and not view.node,
        "ttl_s": view.ttl_s,
        "age_s": None if view.ttl_s is None or not 0 <= view.ttl_s <= TTL_S else TTL_S - view.ttl_s,
        "late": view.is_late,
        "revision": view.revision,
        "problem": view.problem or None,
    }


def order(view: View) -> tuple[int, int, str]:
    """Sort key: by address, IPv4 first; what has no subnet comes last."""
    for rank, subnet in enumerate(view.subnets):
        if subnet:
            return rank, subnet.first, view.name
    return len(view.subnets), 0, view.name


def duration(seconds: int) -> str:
    """``23h59m``, ``4m10s`` or ``9s``."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _etcd_lease(view: View) -> str:
    if view.node:
        return ""
    return f"{view.ttl_id:x}" if view.ttl_id else "none: a reservation, it does not expire"


def _ttl(view: View) -> str:
    if view.node:
        return "-"
    if not view.ttl_id:
        return "reserved"
    if view.ttl_s is None:
        return "-"
    return duration(view.ttl_s) if view.ttl_s >= 0 else "expired"


def _age(view: View) -> str:
    known = view.ttl_s is not None and 0 <= view.ttl_s <= TTL_S
    return duration(TTL_S - view.ttl_s) if known and view.ttl_s is not None else "-"


def _loads(data: bytes) -> object:
    try:
        return msgspec.json.decode(data) if data else None
    except (ValueError, RecursionError):
        return data.decode(errors="replace")


def _field(data: bytes, name: str) -> str:
    fields = _loads(data)
    if not isinstance(fields, dict):
        return ""
    return next((str(value) for key, value in fields.items() if str(key).casefold() == name), "")
