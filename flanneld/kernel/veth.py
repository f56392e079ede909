"""A pair of virtual devices through which packets are sent to be finished in software.

Transmit offloads are off, so whatever goes in at one end comes out at the other as single packets with their
checksums filled in: the kernel does what it would do for a simple network card. Nothing else ever uses the pair.

Sources: include/uapi/linux/{veth,if_link,sockios}.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import struct

from flanneld.errors import KernelError
from flanneld.kernel import link_codec, nlmsg
from flanneld.kernel.ethtool import finish_in_software, tx_checksums
from flanneld.kernel.nlsocket import Socket

SIOCGIFHWADDR = 0x8927
IFLA_AF_SPEC, IFLA_GSO_MAX_SEGS = 26, 40
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
VETH_INFO_PEER = 1
_LINK_HEADERS = {1: 14, 772: 14, 512: 0, 519: 0, 768: 0, 778: 0, 0xFFFE: 0}
"""Bytes by ARPHRD_*: Ethernet, loopback; PPP, raw IP, IPIP, GRE and none (TUN, WireGuard) show bare IP to tc."""
_IFINFO = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change

MTU = 65535
"""The most a veth takes, so that the overlay's MTU may change without the pair."""
GONE = (0, errno.ENODEV)


def ensure_pair(sock: Socket, left: str, right: str, mtu: int = MTU) -> tuple[int, int]:
    """Make the pair, or adopt the one of these names; both ends come out up and without offloads.

    Args:
        sock: where to make it.
        left: one end's name, at most 15 bytes.
        right: the other's.
        mtu: in bytes, of a pair that is made.

    Returns:
        Interface indexes of both ends.

    Raises:
        KernelError: no veth in this kernel, no permission, or a device of such a name is something else.
    """
    try:
        indexes = _indexes(left, right)
    except OSError:
        _remove_half(sock, left, right)
        _create(sock, left, right, mtu)
        indexes = _indexes(left, right)
    for name, ifindex in zip((left, right), indexes, strict=True):
        finish_in_software(name)
        _settle(sock, name, ifindex, mtu)
    return indexes


def is_as_made(sock: Socket, left: str, right: str, mtu: int = MTU) -> bool:
    """Whether a pair is there and as ``ensure_pair`` leaves it.

    Raises:
        KernelError: the kernel cannot be asked.
    """
    try:
        answers = sock.ask([link_codec.get_link(ifindex) for ifindex in _indexes(left, right)])
    except OSError:
        return False
    return all(body is not None and _is_settled(body, mtu) for body in answers) and not any(
        map(tx_checksums, (left, right))
    )


def remove_pair(sock: Socket, left: str) -> None:
    """Remove both ends, with what is attached to them.

    Raises:
        KernelError: refused; a pair that is gone already is fine.
    """
    try:
        ifindex = socket.if_nametoindex(left)
    except OSError:
        return
    ((code, text),) = sock.batch([link_codec.link_delete(ifindex)])
    if code not in GONE:
        raise KernelError(f"remove device {left}", code, text)


def link_header_bytes(name: str) -> int:
    """Length of the link-layer header of packets on a device: 14 with Ethernet, 0 for one that carries bare IP.

    Raises:
        KernelError: no such device, or one with a header that we do not know.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            answer = fcntl.ioctl(sock, SIOCGIFHWADDR, struct.pack("=16s24x", name.encode()))
        except OSError as exc:
            raise KernelError(f"look at device {name}", exc.errno or 0) from exc
    (kind,) = struct.unpack_from("=H", answer, 16)
    if kind not in _LINK_HEADERS:
        raise KernelError(f"look at device {name}", errno.EPROTOTYPE, f"its link type {kind} is unknown to us")
    return _LINK_HEADERS[kind]


def _indexes(left: str, right: str) -> tuple[int, int]:
    return socket.if_nametoindex(left), socket.if_nametoindex(right)


def _remove_half(sock: Socket, left: str, right: str) -> None:
    """Remove the end that has kept its name, when the other one was renamed or moved, which goes with it."""
    for name in (left, right):
        with contextlib.suppress(OSError):
            [body] = sock.ask([link_codec.get_link(socket.if_nametoindex(name))])
            if body is not None and link_codec.kind_of(body) == "veth":
                remove_pair(sock, name)


def _is_settled(body: memoryview, mtu: int) -> bool:
    _index, end = link_codec.decode_link(body)
    segments = nlmsg.u32(nlmsg.attrs(body, _IFINFO.size).get(IFLA_GSO_MAX_SEGS))
    return end.up and end.mtu == mtu and not end.extra and segments == 1


def _create(sock: Socket, left: str, right: str, mtu: int) -> None:
    head = _IFINFO.pack(0, 0, 0, 0, 0)
    peer = nlmsg.attr(VETH_INFO_PEER | nlmsg.NLA_F_NESTED, head + _named(right, mtu))
    info = nlmsg.attr(link_codec.IFLA_INFO_KIND, b"veth\0") + nlmsg.attr(
        link_codec.IFLA_INFO_DATA | nlmsg.NLA_F_NESTED, peer
    )
    body = head + _named(left, mtu) + nlmsg.attr(link_codec.IFLA_LINKINFO | nlmsg.NLA_F_NESTED, info)
    ((code, text),) = sock.batch([nlmsg.message(nlmsg.RTM_NEWLINK, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_EXCL, body)])
    if code == errno.EOPNOTSUPP:
        text = "this kernel was built without CONFIG_VETH, or the module veth is missing"
    if code == errno.EEXIST:
        text = f"a device {left} or {right} exists and is not our pair: remove it"
    if code:
        raise KernelError(f"make the pair {left} and {right}", code, text)


def _named(name: str, mtu: int) -> bytes:
    return nlmsg.attr(link_codec.IFLA_IFNAME, name.encode() + b"\0") + nlmsg.attr(
        link_codec.IFLA_MTU, struct.pack("=I", mtu)
    )


def _settle(sock: Socket, name: str, ifindex: int, mtu: int) -> None:
    """One segment a packet, in no bridge, no IPv6 address of its own (so no router solicitations), up."""
    none = nlmsg.attr(IFLA_INET6_ADDR_GEN_MODE, bytes((IN6_ADDR_GEN_MODE_NONE,)))
    ipv6 = nlmsg.attr(IFLA_AF_SPEC | nlmsg.NLA_F_NESTED, nlmsg.attr(socket.AF_INET6 | nlmsg.NLA_F_NESTED, none))
    still = _IFINFO.pack(0, 0, ifindex, 0, 0)
    up = _IFINFO.pack(0, 0, ifindex, link_codec.IFF_UP, link_codec.IFF_UP)
    settings = nlmsg.put_u32(IFLA_GSO_MAX_SEGS, 1) + nlmsg.put_u32(link_codec.IFLA_MTU, mtu)
    settings += nlmsg.put_u32(link_codec.IFLA_MASTER, 0)
    _quiet, (code, text) = sock.batch(  # without IPv6 in the kernel the first is refused, and not needed
        [nlmsg.message(nlmsg.RTM_NEWLINK, 0, still + ipv6), nlmsg.message(nlmsg.RTM_NEWLINK, 0, up + settings)]
    )
    if code:
        raise KernelError(f"bring up device {name}", code, text)
