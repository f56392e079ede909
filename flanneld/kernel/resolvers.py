"""Which name servers this host asks, as its C library and systemd-resolved are told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flanneld.model.addr import IP, parse_ip

FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second one has the servers behind systemd-resolved, where the first names only 127.0.0.53."""

MOST_BYTES = 1 << 16


def name_servers(files: Iterable[Path] = FILES) -> dict[IP, str]:
    """The servers, and in which file each stands; files that cannot be read and lines that make no sense count for
    nothing, as they do for the C library.

    Source: resolv.conf(5). A zone id (``fe80::1%eth0``) is of a link-local address, which no network of ours contains.
    """
    found: dict[IP, str] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(MOST_BYTES).decode(errors="replace")
        except OSError:
            continue
        for words in map(str.split, text.splitlines()):
            if len(words) > 1 and words[0] == "nameserver":
                try:
                    found.setdefault(parse_ip(words[1]), str(path))
                except ValueError:
                    continue
    return found
