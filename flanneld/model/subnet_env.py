"""The text of ``subnet.env``: exact bytes out (contract 4.1), a forgiving reader in (contract 3.41, 4.7).

The CNI plugin splits each line at the first ``=`` and takes the rest as it stands (contract 10.12), shells
source the file, systemd reads it as an EnvironmentFile: so no quotes, no blanks, no ``export``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flanneld.model.addr import Family, Prefix, format_ip


class SubnetEnv(NamedTuple):
    """What the file says; a family that is not enabled is None in both its fields."""

    network: Prefix | None
    subnet: Prefix | None
    """Our subnet as leased; the file shows its first host address."""
    network6: Prefix | None
    subnet6: Prefix | None
    mtu: int
    """Bytes that a container may send: the backend's MTU (contract 4.2)."""
    ip_masq: bool

    def render(self) -> bytes:
        """The file, byte for byte as flannel writes it (contract 4.1, 4.8)."""
        lines: list[str] = []
        for network, subnet, infix in ((self.network, self.subnet, ""), (self.network6, self.subnet6, "IPV6_")):
            if network and subnet:
                lines.append(f"FLANNEL_{infix}NETWORK={network}")
                lines.append(f"FLANNEL_{infix}SUBNET={format_ip(subnet.host(1))}/{subnet.length}")
        lines.append(f"FLANNEL_MTU={self.mtu}")
        lines.append(f"FLANNEL_IPMASQ={'true' if self.ip_masq else 'false'}")
        return "".join(line + "\n" for line in lines).encode()


class PreviousEnv(NamedTuple):
    """What an earlier run left in the file; None = absent, unreadable or ambiguous."""

    network: Prefix | None = None
    """C of the rules to recycle (contract 8.11)."""
    subnet: Prefix | None = None
    """Host bits cleared: ``10.5.72.1/24`` in the file is ``10.5.72.0/24`` here."""
    network6: Prefix | None = None
    subnet6: Prefix | None = None


# KEY=value or "KEY: value", perhaps exported: what the dotenv reader in flannel takes (contract 4.7)
_LINE = re.compile(r"(?:export\s+)?([A-Za-z0-9_.]+)\s*[=:]\s*(.*)")
_QUOTED = re.compile(r"""(["'])(.*?)\1\s*(?:#.*)?""")


def parse(raw: bytes) -> PreviousEnv:
    """Read an old file of whatever origin; never raises.

    One malformed line makes the whole file count as absent (contract 4.7): half a file after a crash
    must not give half an answer.
    """
    values = _dotenv(raw)
    if values is None:
        return PreviousEnv()
    return PreviousEnv(
        _only_cidr(values.get("FLANNEL_NETWORK"), Family.V4),
        _only_cidr(values.get("FLANNEL_SUBNET"), Family.V4),
        _only_cidr(values.get("FLANNEL_IPV6_NETWORK"), Family.V6),
        _only_cidr(values.get("FLANNEL_IPV6_SUBNET"), Family.V6),
    )


def _dotenv(raw: bytes) -> dict[str, str] | None:
    """Keys and values; None when a line is neither blank, comment nor assignment."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        # a file system replayed its journal after a power cut: right length, no content
        return None
    values: dict[str, str] = {}
    for line in (line.strip() for line in text.split("\n")):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        values[match[1]] = _unquoted(match[2])
    return values


def _unquoted(text: str) -> str:
    quoted = _QUOTED.fullmatch(text)
    return quoted[2] if quoted else text.partition(" #")[0].rstrip()


def _only_cidr(text: str | None, family: Family) -> Prefix | None:
    """The one good entry of a comma list, masked; None when there are none or several (contract 3.41)."""
    good: list[Prefix] = []
    for entry in (text or "").split(","):
        try:
            prefix = Prefix.parse(entry)
        except ValueError:
            continue
        if prefix.family is family:
            good.append(prefix.masked())
    return good[0] if len(good) == 1 else None
