"""How many UDP datagrams arrived with a wrong checksum. Only reads.

For whom they were is not recorded: where connections are tracked, and they are wherever there is NAT, the checksum is
looked at before the socket is, and no socket's counter grows (seen on 6.18).

Source: net/ipv4/proc.c, net/ipv6/proc.c.
"""

from __future__ import annotations

from pathlib import Path

PROC_NET = Path("/proc/self/net")


def bad_checksums(root: Path = PROC_NET) -> int:
    """Datagrams of both families that were dropped for their checksum since the host started (``InCsumErrors``)."""
    names: list[str] = []
    total = 0
    for line in _lines(root / "snmp"):
        words = line.split()
        if words[:1] == ["Udp:"]:  # a line of names, then one of values
            total += sum(int(value) for name, value in zip(names, words, strict=False) if name == "InCsumErrors")
            names = words
    for line in _lines(root / "snmp6"):
        if line.startswith("Udp6InCsumErrors"):
            total += int(line.split()[1])
    return total


def _lines(path: Path) -> list[str]:
    """Nothing where the family is switched off."""
    try:
        return path.read_text("ascii").splitlines()
    except OSError:
        return []
