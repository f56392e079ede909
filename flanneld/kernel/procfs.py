"""Kernel settings under /proc/sys, by path, and what to warn the operator of.

Paths, never ``sysctl`` syntax: ``flannel.1`` has a dot in its name, and ``net.ipv4.neigh.flannel.1`` means
something else. No check here ends a start: flannel's own exit for want of br_netfilter broke hosts that
did not need it (F37).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from flanneld.errors import KernelError
from flanneld.model.addr import Family

PROC_SYS = Path("/proc/sys")

_REMEDY = {
    errno.EROFS: "/proc/sys is read-only here, as in a container without privileges: "
    "run it privileged or set the value on the host",
    errno.EACCES: "flanneld has to run as root, and a container privileged",
    errno.EPERM: "flanneld has to run as root, and a container privileged",
    errno.ENOENT: "this kernel has no such setting, or the device is gone",
    errno.EINVAL: "the kernel does not take this value",
}


def conf(family: Family, device: str, setting: str, root: Path = PROC_SYS) -> Path:
    """Path of an address family setting of a device, e.g. ``accept_ra``; also ``all`` and ``default``."""
    return root / "net" / _directory(family) / "conf" / device / setting


def read(path: Path) -> str | None:
    """A setting without its newline; None when the kernel has no such setting or device.

    Raises:
        KernelError: it is there and cannot be read.
    """
    try:
        return path.read_text("ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise _refused(f"read {path}", exc) from exc


def look(path: Path) -> str | None:
    """A setting without its newline; None when it cannot be read, for whatever reason."""
    try:
        return read(path)
    except KernelError:
        return None


def write(path: Path, value: str | int) -> None:
    """Set a value; one that is set already is not written, so that a read-only /proc/sys with the right
    values in it is good enough.

    Raises:
        KernelError: the kernel refused; the sentence says what to do.
    """
    if look(path) == str(value):
        return
    try:
        # without O_CREAT, so that a missing setting is ENOENT and not a misleading EPERM
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode("ascii"))
        finally:
            os.close(fd)
    except OSError as exc:
        raise _refused(f"write {value} to {path}", exc) from exc


def warnings(families: Sequence[Family], device: str, *, iptables: bool, root: Path = PROC_SYS) -> list[str]:
    """Everything about the host's settings that will hurt, one sentence each.

    Args:
        families: the enabled ones.
        device: the external interface.
        iptables: whether the iptables rules are in use, which need br_netfilter (contract 0.1 step 11).
        root: of the settings.
    """
    return forwarding_off(families, root=root) + may_hurt(families, device, iptables=iptables, root=root)


def may_hurt(families: Sequence[Family], device: str, *, iptables: bool, root: Path = PROC_SYS) -> list[str]:
    """Those of ``warnings`` that cut nothing off for certain."""
    found = bridge_filter_missing(families, root) if iptables else []
    return found + (reverse_path_strict(device, root) if Family.V4 in families else [])


def forwarding_off(families: Sequence[Family], through: Sequence[str] = (), root: Path = PROC_SYS) -> list[str]:
    """Without forwarding no packet passes between containers and the network.

    For IPv4 the kernel asks the device by which a packet came; ``ip_forward`` is where that begins, and sets all of
    them when it is written. For IPv6 it asks ``all``. Source: Documentation/networking/ip-sysctl.rst.

    Args:
        families: the enabled ones.
        through: devices by which containers' packets come in from other hosts, as far as they are there.
        root: of the settings.
    """
    off = []
    if Family.V4 in families:
        devices = {path: look(path) for path in (conf(Family.V4, name, "forwarding", root) for name in through)}
        there = {path: value for path, value in devices.items() if value is not None}
        off = [(Family.V4, path) for path, value in there.items() if value == "0"]
        everywhere = root / "net/ipv4/ip_forward"
        if (off or not there) and look(everywhere) == "0":
            off = [(Family.V4, everywhere)]
    if Family.V6 in families and look(everywhere := conf(Family.V6, "all", "forwarding", root)) == "0":
        off.append((Family.V6, everywhere))
    return [
        f"{family.label} forwarding is off, so containers reach nothing beyond this host: write 1 to {path}"
        for family, path in off
    ]


def bridge_filter_missing(families: Sequence[Family], root: Path = PROC_SYS) -> list[str]:
    """Without br_netfilter, traffic between containers of one bridge passes iptables by."""
    sentences = []
    for family in families:
        name = "bridge-nf-call-iptables" if family is Family.V4 else "bridge-nf-call-ip6tables"
        path = root / "net" / "bridge" / name
        value = look(path)
        if value != "1":
            remedy = "modprobe br_netfilter" if value is None else f"write 1 to {path}"
            sentences.append(
                f"{family.label} packets between containers of one bridge do not pass iptables, so service "
                f"addresses may fail between containers of this host: {remedy}"
            )
    return sentences


def reverse_path_strict(device: str, root: Path = PROC_SYS) -> list[str]:
    """Strict source validation drops what arrives another way than the answer would leave.

    The kernel takes the larger of the device's value and that of ``all``; 1 is strict, 2 is loose.
    Source: Documentation/networking/ip-sysctl.rst, rp_filter.
    """
    values = [look(conf(Family.V4, name, "rp_filter", root)) for name in ("all", device)]
    if max((int(value) for value in values if value and value.isdecimal()), default=0) != 1:
        return []
    return [
        f"rp_filter is strict on {device}: packets of peers that come in there but are answered through "
        f"another interface are dropped; if this host has several uplinks, "
        f"write 2 to {conf(Family.V4, device, 'rp_filter', root)}"
    ]


def _directory(family: Family) -> str:
    return "ipv4" if family is Family.V4 else "ipv6"


def _refused(what: str, exc: OSError) -> KernelError:
    code = exc.errno or 0
    return KernelError(what, code, _REMEDY.get(code, ""))
