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
    try:
        here = own.stat()
        there = init.stat()
    except OSError:
        return ""  # no permission to look at process 1: a container, whose state directory is its own
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
        return ""
    try:
        for path in sorted(names.iterdir()):
            found = path.stat()
            if (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino):
                return f"netns-{path.name}"
    except OSError:
        pass
    return f"netns-{here.st_ino}"
