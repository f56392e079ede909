"""TUN devices: make one, or adopt the one that a former daemon left.

A TUN lives as long as somebody holds its descriptor, unless it is persistent: then packets that a tc program
redirects keep flowing while the daemon is away, and the next daemon opens the same device again. Addresses, MTU
and routes belong to the reconcile loop, not here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from flanneld.errors import KernelError

# include/uapi/linux/if_tun.h
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
IFNAMSIZ = 16

CLONE_DEVICE = "/dev/net/tun"
_IFREQ = struct.Struct("=16sH22x")  # struct ifreq: ifr_name, ifr_flags, rest of the union

_REMEDIES = {
    errno.ENOENT: f"{CLONE_DEVICE} is missing: load the tun module, or mount the device into the container",
    errno.EPERM: "needs CAP_NET_ADMIN, and a container that may use /dev/net/tun",
    errno.EACCES: "the container may not use /dev/net/tun: run it privileged",
    errno.EBUSY: "another process holds it: is a second flanneld running?",
    errno.EINVAL: "a device of that name exists and is not a TUN: remove it",
}


def open_tun(name: str) -> int:
    """Open the TUN device of a name, making it if there is none; packets are bare IP.

    Args:
        name: device name, 1 to 15 bytes; taken as it is, without ``%d``.

    Returns:
        A non-blocking descriptor; each read gives one packet. Closing it removes the device unless it is persistent.

    Raises:
        KernelError: no TUN driver, no permission, another process holds the device, or it is not a TUN.
    """
    what = f"open TUN {name}"
    if not 0 < len(name.encode()) < IFNAMSIZ or "%" in name:
        raise KernelError(what, errno.EINVAL, "a device name has 1 to 15 bytes and no %")
    try:
        fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise _refused(what, exc) from exc
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as exc:
        os.close(fd)
        raise _refused(what, exc) from exc
    return fd


def set_persist(fd: int, persist: bool) -> None:
    """Say whether the device stays when its descriptor is closed.

    Raises:
        KernelError: the descriptor is not an open TUN.
    """
    try:
        fcntl.ioctl(fd, TUNSETPERSIST, int(persist))
    except OSError as exc:
        raise _refused("make the TUN persistent" if persist else "make the TUN go with its owner", exc) from exc


def _refused(what: str, exc: OSError) -> KernelError:
    return KernelError(what, exc.errno or 0, _REMEDIES.get(exc.errno or 0, ""))
