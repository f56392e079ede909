"""Leases of hosts that do not exist, in the form each backend's real hosts publish (contract 3.16, 3.17)."""

from __future__ import annotations

import socket
from typing import NamedTuple

NETWORK = "10.0.0.0/8"
SUBNET_LEN = 24
PEERS_NETWORK = "198.19.0.0/16"
"""Public addresses of hollow peers: the second half of the prefix that RFC 2544 sets apart for benchmarks."""
MAX_PEERS = 65_000
SUBNETS_KEY = b"/coreos.com/network/subnets/"

Key = tuple[str, bytes]
"""What the kernel must hold for a peer: ``route`` by destination, ``neigh`` by address, ``fdb`` by MAC."""


class Peer(NamedTuple):
    """One hollow host."""

    subnet: bytes
    public_ip: bytes
    mac: bytes

    @staticmethod
    def number(number: int) -> Peer:
        """Peer number 1 to ``MAX_PEERS``; its subnet, address and MAC follow from the number."""
        low = number.to_bytes(2, "big")
        return Peer(b"\x0a" + low + b"\0", b"\xc6\x13" + low, b"\x02\xbe\x0c\x00" + low)

    @property
    def key(self) -> bytes:
        """Its key in the store."""
        return SUBNETS_KEY + f"{socket.inet_ntoa(self.subnet)}-{SUBNET_LEN}".encode()

    @property
    def pod(self) -> str:
        """Address of a pod there."""
        return socket.inet_ntoa(self.subnet[:3] + b"\x02")

    def value(self, backend: str) -> bytes:
        """What it publishes."""
        fields = [f'"PublicIP":"{socket.inet_ntoa(self.public_ip)}","PublicIPv6":null']
        if backend not in ("udp", "alloc"):  # these two publish no type (contract 3.17)
            fields.append(f'"BackendType":"{backend}"')
        if backend == "vxlan":
            fields.append(f'"BackendData":{{"VNI":1,"VtepMAC":"{self.mac.hex(":")}"}}')
        return ("{" + ",".join(fields) + "}").encode()

    def kernel_keys(self, backend: str) -> list[Key]:
        """What a daemon with this backend must put into the kernel for it; empty where that cannot be seen."""
        if backend == "vxlan":
            return [("route", self.subnet), ("neigh", self.subnet), ("fdb", self.mac)]
        return [("route", self.subnet)] if backend == "host-gw" else []


def peers(first: int, count: int, but: bytes = b"") -> list[Peer]:
    """``count`` peers from number ``first`` on, leaving out the one whose subnet is ``but``."""
    found: list[Peer] = []
    number = first
    while len(found) < count:
        if (peer := Peer.number(number)).subnet != but:
            found.append(peer)
        number += 1
    return found
