"""How many UDP datagrams arrived with a wrong checksum, and how many a tunnel's own socket dropped. Only reads.

The kernel counts the first for the whole host and the second for each socket, whatever the reason. Both together
tell that it was the tunnel's packets: a tunnel's socket drops for hardly any other reason. Datagrams of 76 bytes and
less are checked before their socket is looked up (CHECKSUM_BREAK), so those are in the first number only.

Source: net/ipv4/udp.c, net/ipv4/proc.c, net/ipv6/proc.c.
"""

from __future__ import annotations

from pathlib import Path

PROC_NET = Path("/proc/self/net")


def bad_checksums(root: Path = PROC_NET) -> int:
    """Datagrams of both families with a wrong checksum since the host started (``InCsumErrors``)."""
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


def drops(port: int, root: Path = PROC_NET) -> int:
    """Datagrams that the sockets of a port have dropped since they were opened."""
    end = f":{port:04X}"
    return sum(
        int(words[-1])
        for name in ("udp", "udp6")
        for line in _lines(root / name)
        if len(words := line.split()) > 12 and words[1].endswith(end)
    )


def _lines(path: Path) -> list[str]:
    """Nothing where the family is switched off."""
    try:
        return path.read_text("ascii").splitlines()
    except OSError:
        return []
