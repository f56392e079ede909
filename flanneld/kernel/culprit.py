"""Who made a change that the kernel announced, as far as it can be told. A hint for people, nothing decides by it.

The announcement carries the netlink port of the asking socket, and the kernel gives a process's first socket its
pid for a port (net/netlink/af_netlink.c, netlink_autobind). A short-lived command has often ended before anybody
looks; a service that keeps changing things is still there.
"""

from __future__ import annotations

import os
from pathlib import Path

INIT_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the machine's own pid namespace. Source: include/linux/proc_ns.h, PROC_PID_INIT_INO."""
_MAX_PID = 1 << 22
"""Source: include/linux/threads.h, PID_MAX_LIMIT. Ports above are the kernel's choice for further sockets."""


def who(port: int, proc: Path = Path("/proc")) -> str:
    """``NetworkManager[812]``, ``pid 4711, which has ended``, ``pid 4711`` where that is hidden from us (hidepid), or
    empty when nothing can be said.

    Args:
        port: netlink port, ``nlmsg_pid`` of the announcement.
        proc: where procfs is.
    """
    if not 0 < port < _MAX_PID:
        return ""
    try:
        if (proc / "self/ns/pid").stat().st_ino != INIT_PID_NAMESPACE:
            return ""  # pids of the machine mean other processes here
        return f"{(proc / str(port) / 'comm').read_text('utf-8', 'replace').strip()}[{port}]"
    except (FileNotFoundError, ProcessLookupError):
        return f"pid {port}" if _lives(port) else f"pid {port}, which has ended"
    except OSError:
        return ""


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
