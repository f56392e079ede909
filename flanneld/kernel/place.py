"""Which host on this machine we are: a network namespace is a host of its own.

Several daemons on one machine, each in a namespace, share file systems and machine id. What identifies
a host must differ all the same, or they would take each other's lease for their own.
"""

from __future__ import annotations

from pathlib import Path

NETNS_DIR = Path("/run/netns")
"""Where ``ip netns add`` puts names (ip-netns(8))."""


def place(own: Path = Path("/proc/self/ns/net"), init: Path = Path("/proc/1/ns/net"), names: Path = NETNS_DIR) -> str:
    """Empty on the machine itself, else ``netns-NAME``, or ``netns-INODE`` for a namespace without a name.

    A name outlives the re-creation of its namespace, which is what makes it the host's.
    """
    here = _identity(own)
    if here is None:
        return ""
    try:
        for path in sorted(names.iterdir()):
            if _identity(path) == here:
                return f"netns-{path.name}"
    except OSError:
        pass  # no namespace on this machine has a name
    machine = _identity(init)
    if machine is None or machine == here:
        return ""  # the machine's own; or process 1 may not be looked at: a container, with a directory of its own
    return f"netns-{here[1]}"


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a namespace file; None if it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
