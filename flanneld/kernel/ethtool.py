"""Offloads of a device: what it leaves to the network card, and what the kernel finishes in software.

The two switches that this daemon needs are as old as ethtool itself, so the ioctl is used and not ethtool's netlink
family, which came with Linux 5.6. A change is announced as one of the link (``NETDEV_FEAT_CHANGE``).

Source: include/uapi/linux/{ethtool,sockios}.h; net/core/dev_ioctl.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

from flanneld.errors import KernelError

SIOCETHTOOL = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM, ETHTOOL_STSO = 0x16, 0x17, 0x1F


def tx_checksums(name: str) -> bool:
    """Whether a device takes packets whose checksums are still to be filled in (``tx-checksum-ip-generic``).

    Raises:
        KernelError: no such device, or one that cannot be asked.
    """
    return bool(_ask(name, ETHTOOL_GTXCSUM, 0, "read transmit offloads"))


def set_tx_checksums(name: str, on: bool) -> None:
    """Have checksums left to the card, or filled in before the device sees a packet, as ``ethtool -K NAME tx off``.

    Without checksums there is no segmentation by the card either: the kernel turns both off, and on again.

    Raises:
        KernelError: refused.
    """
    _ask(name, ETHTOOL_STXCSUM, on, "set transmit offloads")


def finish_in_software(name: str) -> None:
    """Have all packets of a device segmented and their checksums filled in before it sees them.

    Raises:
        KernelError: refused.
    """
    for command in (ETHTOOL_STXCSUM, ETHTOOL_STSO):
        _ask(name, command, 0, "turn off transmit offloads")


def _ask(name: str, command: int, value: int, what: str) -> int:
    """One ioctl: ``struct ifreq`` with the device's name and a pointer to ``struct ethtool_value``."""
    answer = ctypes.create_string_buffer(struct.pack("=II", command, value), 8)
    request = struct.pack("=16sQ16x", name.encode(), ctypes.addressof(answer))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            fcntl.ioctl(sock, SIOCETHTOOL, request)
    except OSError as exc:
        raise KernelError(f"{what} of {name}", exc.errno or 0) from exc
    found: int = struct.unpack_from("=I", answer.raw, 4)[0]
    return found
