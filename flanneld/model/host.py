"""What this host looks like to the daemon: its external interface and who it is."""

from __future__ import annotations

from typing import NamedTuple

from flanneld.model.addr import IP, Family


class ExtIface(NamedTuple):
    """The external interface, as selected (contract section 5)."""

    name: str
    ifindex: int
    mtu: int
    """Bytes, as the kernel reports it."""
    ip: IP | None
    """The interface's own IPv4 address; source of tunnel packets."""
    ip6: IP | None
    public_ip: IP | None
    """What peers are told to send to; differs from ``ip`` behind NAT."""
    public_ip6: IP | None

    def local(self, family: Family) -> IP | None:
        """The interface's own address of a family."""
        return self.ip if family is Family.V4 else self.ip6

    def public(self, family: Family) -> IP | None:
        """The advertised address of a family."""
        return self.public_ip if family is Family.V4 else self.public_ip6
