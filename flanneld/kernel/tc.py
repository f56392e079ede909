"""Hang eBPF programs on a device by traffic control, beside whatever others hung there.

Our filters are known by their name. Their priority is far behind the usual ones, so that other programs see every
packet first. The ``clsact`` qdisc is shared: it is made when it is missing and stays, because removing it removes
everybody's filters; only cleanup takes away one on which nothing but ours hangs.

Sources: include/uapi/linux/{rtnetlink,pkt_sched,pkt_cls}.h; net/sched/{cls_api,cls_bpf}.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from flanneld.errors import KernelError
from flanneld.kernel import nlmsg
from flanneld.kernel.nlsocket import Socket

RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 36, 37, 44, 45, 46
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS, TCA_BPF_ID = 6, 7, 8, 11
TCA_BPF_FLAG_ACT_DIRECT = 1
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info

PRIORITY: Final = 8285
"""Of our filters; the port's number, so that it is easy to recognise in ``tc filter show``."""
PRIORITIES: Final = frozenset({PRIORITY - 1, PRIORITY})
_PROTOCOL: Final = socket.htons(0x0800)  # ETH_P_IP: other protocols never reach our programs
_HANDLE_BY_KERNEL: Final = 0


class Direction(IntEnum):
    """Which packets of a device: those it receives or those it is about to send. The value is a filter's parent."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


class Filter(NamedTuple):
    """One eBPF filter on a device."""

    priority: int
    handle: int
    name: str
    program_id: int


def ensure_clsact(sock: Socket, ifindex: int) -> None:
    """Give a device the qdisc on which programs hang, if it has none.

    Raises:
        KernelError: no such device, no permission, or the kernel was built without it.
    """
    body = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + nlmsg.attr(TCA_KIND, b"clsact\0")
    ((code, text),) = sock.batch([nlmsg.message(RTM_NEWQDISC, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_EXCL, body)])
    if code == errno.ENOENT:
        text = "this kernel was built without CONFIG_NET_SCH_INGRESS, or the module sch_ingress is missing"
    if code not in (0, errno.EEXIST):
        raise KernelError(f"add qdisc clsact to device {ifindex}", code, text)


def is_idle(sock: Socket, ifindex: int, but: str) -> bool:
    """Whether nobody's filter, of whatever kind, hangs on a device, but for the eBPF filter of one name."""
    for direction in Direction:
        request = nlmsg.message(RTM_GETTFILTER, nlmsg.NLM_F_DUMP, _TCMSG.pack(0, ifindex, 0, direction, 0))
        for part in sock.dump(request):
            for kind, body in part:
                if kind != RTM_NEWTFILTER or not _TCMSG.unpack_from(body)[2]:
                    continue  # the head of a priority
                one = _decode(body)
                if one is None or one.name != but:
                    return False
    return True


def remove_clsact(sock: Socket, ifindex: int) -> None:
    """Take the qdisc away, with every filter on it: only after ``is_idle``.

    Raises:
        KernelError: refused; one that is gone already is fine.
    """
    body = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + nlmsg.attr(TCA_KIND, b"clsact\0")
    ((code, text),) = sock.batch([nlmsg.message(RTM_DELQDISC, 0, body)])
    if code not in (0, errno.ENOENT, errno.EINVAL, errno.ENODEV):
        raise KernelError(f"remove qdisc clsact from device {ifindex}", code, text)


def attach(
    sock: Socket, ifindex: int, direction: Direction, program_fd: int, name: str, priority: int = PRIORITY
) -> None:
    """Hang a program on a device; the filter that has the name already is swapped in place, without a gap.

    Args:
        sock: where the device is.
        ifindex: of the device.
        direction: of the packets.
        program_fd: what to hang there.
        name: of the filter.
        priority: 1 to 65535; filters with lower numbers see packets first.

    Raises:
        KernelError: refused; the kernel's own message is in it.
    """
    present = find(sock, ifindex, direction, name)
    options = (
        nlmsg.put_u32(TCA_BPF_FD, program_fd)
        + nlmsg.attr(TCA_BPF_NAME, name.encode() + b"\0")
        + nlmsg.put_u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
    )
    one = present or Filter(priority, _HANDLE_BY_KERNEL, name, 0)
    request = _request(RTM_NEWTFILTER, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_REPLACE, ifindex, direction, one, options)
    ((code, text),) = sock.batch([request])
    if code == errno.ENOENT:
        text = "this kernel was built without CONFIG_NET_CLS_BPF, or the module cls_bpf is missing"
    if code:
        raise KernelError(f"attach {name} to device {ifindex}", code, text)


def detach(sock: Socket, ifindex: int, direction: Direction, name: str) -> bool:
    """Take the filter of a name off a device; tells whether it was there. Nobody else's is touched.

    Raises:
        KernelError: refused.
    """
    present = find(sock, ifindex, direction, name)
    if present is None:
        return False
    ((code, text),) = sock.batch([_request(RTM_DELTFILTER, 0, ifindex, direction, present, b"")])
    if code not in (0, errno.ENOENT, errno.ENODEV):
        raise KernelError(f"detach {name} from device {ifindex}", code, text)
    return code == 0


def find(sock: Socket, ifindex: int, direction: Direction, name: str) -> Filter | None:
    """Our filter of a name on a device, or None."""
    return next((one for one in filters(sock, ifindex, direction) if one.name == name), None)


def filters(sock: Socket, ifindex: int, direction: Direction) -> list[Filter]:
    """All eBPF filters of a device in one direction, whoever's; none where there is no such device or qdisc."""
    request = nlmsg.message(RTM_GETTFILTER, nlmsg.NLM_F_DUMP, _TCMSG.pack(0, ifindex, 0, direction, 0))
    found = []
    for part in sock.dump(request):
        for kind, body in part:
            if kind == RTM_NEWTFILTER and (one := _decode(body)):
                found.append(one)
    return found


def _request(kind: int, flags: int, ifindex: int, direction: Direction, one: Filter, options: bytes) -> bytes:
    info = one.priority << 16 | _PROTOCOL
    body = _TCMSG.pack(0, ifindex, one.handle, direction, info) + nlmsg.attr(TCA_KIND, b"bpf\0")
    return nlmsg.message(kind, flags, body + (nlmsg.attr(TCA_OPTIONS, options) if options else b""))


def _decode(body: memoryview) -> Filter | None:
    """None for a filter of another kind, and for the head of a priority, which is listed too, with handle 0."""
    _family, _ifindex, handle, _parent, info = _TCMSG.unpack_from(body)
    found = nlmsg.attrs(body, _TCMSG.size)
    if found.get(TCA_KIND, b"").rstrip(b"\0") != b"bpf" or not handle or TCA_OPTIONS not in found:
        return None
    options = nlmsg.attrs(found[TCA_OPTIONS], 0)
    name = options.get(TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
    return Filter(info >> 16, handle, name, nlmsg.u32(options.get(TCA_BPF_ID)))
