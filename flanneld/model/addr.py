"""IP addresses and prefixes as packed bytes.

The daemon handles tens of thousands of addresses on its hot paths (lease decode, netlink encode, set
difference), where the stdlib's ``ipaddress`` objects cost several times the time and memory.
Here an address **is** its network-order bytes (4 or 16 of them), exactly what netlink carries, and a
prefix is a named tuple, so equality and hashing run in C. Figures: design/adr-0006-values.md.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, NewType

IP = NewType("IP", bytes)
"""An IPv4 or IPv6 address: 4 or 16 bytes in network order. Its length tells the family."""

MAC = NewType("MAC", bytes)
"""An Ethernet address: 6 bytes."""


class Family(IntEnum):
    """Address family; the value is the kernel's AF_* number (include/linux/socket.h)."""

    V4 = socket.AF_INET
    V6 = socket.AF_INET6

    @property
    def bits(self) -> int:
        """Length of an address in bits."""
        return 32 if self is Family.V4 else 128

    @property
    def label(self) -> str:
        """``IPv4`` or ``IPv6``, for sentences."""
        return "IPv4" if self is Family.V4 else "IPv6"


def family_of(ip: IP) -> Family:
    """The family of an address, told by its length."""
    return Family.V4 if len(ip) == 4 else Family.V6


def parse_ip(text: str) -> IP:
    """Parse the text form of an address of either family.

    Raises:
        ValueError: not an address (leading zeros, zone ids, surrounding blanks are all refused).
    """
    for family in (socket.AF_INET6,) if ":" in text else (socket.AF_INET,):
        try:
            return IP(socket.inet_pton(family, text))
        except (OSError, ValueError):
            # inet_pton raises ValueError for an embedded NUL, UnicodeEncodeError for non-ASCII
            break
    raise ValueError(f"{_shown(text)} is not an IP address")


def _shown(text: str) -> str:
    """What could not be parsed, for a sentence: printable, bounded."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def format_ip(ip: IP) -> str:
    """Text form; IPv6 in lower case with the longest zero run compressed (RFC 5952)."""
    if len(ip) == 4:
        return socket.inet_ntop(socket.AF_INET, ip)
    return socket.inet_ntop(socket.AF_INET6, ip)


def parse_mac(text: str) -> MAC:
    """Parse an Ethernet address in the notations Go's ``net.ParseMAC`` takes for 48 bits.

    ``aa:bb:cc:dd:ee:ff``, ``aa-bb-cc-dd-ee-ff`` and ``aabb.ccdd.eeff``, either case.
    Source: Go ``net/mac.go``; contract 3.18.

    Raises:
        ValueError: anything else.
    """
    for separator, digits, groups in ((":", 2, 6), ("-", 2, 6), (".", 4, 3)):
        parts = text.split(separator)
        if len(parts) == groups and all(len(p) == digits and p.isalnum() and p.isascii() for p in parts):
            try:
                return MAC(bytes.fromhex("".join(parts)))
            except ValueError:
                break
    raise ValueError(f"{_shown(text)} is not a 48-bit MAC address")


def format_mac(mac: MAC) -> str:
    """``aa:bb:cc:dd:ee:ff``, lower case: the form flannel publishes (contract 13.2)."""
    return mac.hex(":")


class Prefix(NamedTuple):
    """An address block. Host bits may be set where a format allows it (contract 3.13)."""

    ip: IP
    length: int

    @staticmethod
    def parse(text: str) -> Prefix:
        """Parse ``address/length``; host bits are kept.

        Raises:
            ValueError: not a CIDR of either family.
        """
        address, slash, length = text.partition("/")
        if not slash or not (length.isascii() and length.isdecimal()) or (len(length) > 1 and length[0] == "0"):
            raise ValueError(f"{_shown(text)} is not a CIDR such as 10.5.0.0/16")
        ip = parse_ip(address)
        if int(length) > len(ip) * 8:
            raise ValueError(f"{_shown(text)} has a prefix length above {len(ip) * 8}")
        return Prefix(ip, int(length))

    @staticmethod
    def of_int(value: int, length: int, family: Family) -> Prefix:
        """Build from the address as an integer."""
        return Prefix(IP(value.to_bytes(family.bits // 8, "big")), length)

    def __str__(self) -> str:
        return f"{format_ip(self.ip)}/{self.length}"

    @property
    def family(self) -> Family:
        """Address family of the block."""
        return Family.V4 if len(self.ip) == 4 else Family.V6

    @property
    def size(self) -> int:
        """Number of addresses in the block."""
        return 1 << (len(self.ip) * 8 - self.length)

    @property
    def first(self) -> int:
        """First address of the block as an integer (host bits cleared)."""
        return int.from_bytes(self.ip, "big") & ~(self.size - 1)

    @property
    def last(self) -> int:
        """Last address of the block as an integer."""
        return int.from_bytes(self.ip, "big") | (self.size - 1)

    def masked(self) -> Prefix:
        """The same block with host bits cleared."""
        return Prefix.of_int(self.first, self.length, self.family)

    def host(self, offset: int) -> IP:
        """The address ``offset`` after the first one of the block.

        Raises:
            ValueError: the offset lies outside the block.
        """
        if not 0 <= offset < self.size:
            raise ValueError(f"{self} has no address number {offset}")
        return IP((self.first + offset).to_bytes(len(self.ip), "big"))

    def covers(self, inner: Prefix | IP) -> bool:
        """Whether an address, or a whole block, lies inside."""
        if isinstance(inner, Prefix):
            return len(inner.ip) == len(self.ip) and inner.length >= self.length and self._covers(inner.ip)
        return len(inner) == len(self.ip) and self._covers(inner)

    def __contains__(self, inner: object) -> bool:
        return isinstance(inner, bytes | Prefix) and self.covers(inner if isinstance(inner, Prefix) else IP(inner))

    def _covers(self, ip: IP) -> bool:
        shift = len(self.ip) * 8 - self.length
        return int.from_bytes(ip, "big") >> shift == int.from_bytes(self.ip, "big") >> shift

    def overlaps(self, other: Prefix) -> bool:
        """Whether the two blocks share an address; never across families."""
        shorter, longer = (self, other) if self.length <= other.length else (other, self)
        return len(self.ip) == len(other.ip) and shorter._covers(longer.ip)

    def subnets(self, length: int) -> Iterator[Prefix]:
        """All blocks of the given length inside this one, in order."""
        step = 1 << (len(self.ip) * 8 - length)
        for value in range(self.first, self.last + 1, step):
            yield Prefix.of_int(value, length, self.family)
