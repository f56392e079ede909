"""Whether this kernel can run the udp backend's programs: built, loaded, attached and run here, then taken down.

A scratch pair of devices stands for the real ones, so a running data path is not disturbed. The programs run on
packets of which the outcome is known; a kernel that loads them but does something else with a packet is refused too.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from backends import udp_programs as programs
from backends.udp_decap import Decap, decap
from backends.udp_encap import Encap, encap
from backends.udp_packet import UdpPeer, checksum_of, take_hop
from backends.udp_tables import Shape, Tables, make_counters
from flanneld.errors import KernelError
from flanneld.kernel import tc
from flanneld.kernel.bpf import Loaded
from flanneld.kernel.nlsocket import Socket
from flanneld.kernel.tc import Direction
from flanneld.kernel.veth import ensure_pair, link_header_bytes, remove_pair
from flanneld.model.addr import IP, Prefix, parse_ip

_ETHERNET = bytes(12) + b"\x08\x00"
_SUBNET = Prefix.parse("192.0.2.0/24")
"""Stands for a peer's subnet; documentation addresses, for the packets go nowhere."""
TRIAL_BYTES = 1472
"""Of the larger packet that is tried, and the devices' MTU; trial runs take no more than a page."""
_PEER_IP = parse_ip("198.51.100.1")


def try_in_scratch(sock: Socket, stem: str, ext: str, ext_ip: IP, port: int) -> str | None:
    """Do everything once.

    Args:
        sock: where the devices are.
        stem: what the names of the scratch devices begin with.
        ext: external interface; only its kind is looked at.
        ext_ip: its address.
        port: of the datagrams.

    Returns:
        None, or what went otherwise than it should.

    Raises:
        KernelError: the kernel refused a step.
    """
    link_header_bytes(ext)
    with _pair(sock, stem) as (near, far), contextlib.ExitStack() as held:
        tables = held.enter_context(contextlib.closing(Tables(Shape(_SUBNET.length, 16))))
        counters = held.enter_context(contextlib.closing(make_counters()))
        tables.apply({_SUBNET: UdpPeer(_PEER_IP, port, kernel_rx=True)})
        direct = Encap(tables.peers.fd, counters.fd, ext_ip, far, port, _SUBNET.length)
        at_tun = direct._replace(compat_ifindex=near)
        receive = Decap(tables.sources.fd, counters.fd, ext_ip, port, near, programs.ETHERNET)
        direct_program, receiver = encap("flannel_try_tx", direct), decap("flannel_try_rx", receive)
        tun = encap("flannel_try_tun", at_tun)
        written = (direct_program, receiver, tun)
        loaded = [held.enter_context(contextlib.closing(Loaded.load(p.name, p.code()))) for p in written]
        for number, (program, direction) in enumerate(
            zip(loaded, (Direction.INGRESS, Direction.INGRESS, Direction.EGRESS), strict=True)
        ):
            tc.ensure_clsact(sock, far)
            tc.attach(sock, far, direction, program.fd, f"flanneld-udp-trial-{number}")
        return _wrong_outcome(loaded[0], loaded[1], far, ext_ip, port)


def scratch_names(stem: str) -> tuple[str, str]:
    """Names of the pair: always the same ones, so that the next start finds what a killed one has left."""
    return f"{stem}t0", f"{stem}t1"


@contextlib.contextmanager
def _pair(sock: Socket, stem: str) -> Iterator[tuple[int, int]]:
    left, right = scratch_names(stem)
    remove_pair(sock, left)
    try:
        yield ensure_pair(sock, left, right, TRIAL_BYTES)
    finally:
        with contextlib.suppress(KernelError):
            remove_pair(sock, left)


def _wrong_outcome(encap: Loaded, decap: Loaded, ifindex: int, ext_ip: IP, port: int) -> str | None:
    # Encapsulating is tried on a device that takes no larger packet: kernels before 5.12 refuse to grow a packet
    # beyond it, and then every full one would go through the pump. Decapsulating on loopback: its address is zero.
    for size in (programs.IPV4, TRIAL_BYTES):
        inner = _packet(_SUBNET.host(1), size)
        once = _hop(inner)
        outgoing = encap.run(_ETHERNET + inner, ifindex=ifindex)
        if outgoing != (programs.TC_ACT_REDIRECT, _ETHERNET + _datagram(ext_ip, _PEER_IP, port, once)):
            return f"this kernel's eBPF does not encapsulate a packet of {size} bytes as it should"
        incoming = decap.run(_ETHERNET + _datagram(_PEER_IP, ext_ip, port, once))
        if incoming != (programs.TC_ACT_REDIRECT, _ETHERNET + _hop(once)):
            return f"this kernel's eBPF does not take a packet of {size} bytes out of its datagram as it should"
    return None


def _packet(to: IP, size: int, source: IP = _PEER_IP, ttl: int = 64, proto: int = 17, payload: bytes = b"") -> bytes:
    body = payload or bytes(size - programs.IPV4)
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, programs.IPV4 + len(body), 0, 0x4000, ttl, proto, 0, source, to)
    return head[:10] + struct.pack("!H", checksum_of(head)) + head[12:] + body


def _datagram(source: IP, to: IP, port: int, payload: bytes) -> bytes:
    udp = struct.pack("!HHHH", port, port, programs.UDP + len(payload), 0)
    return _packet(to, 0, source, payload=udp + payload)


def _hop(packet: bytes) -> bytes:
    later = bytearray(packet)
    take_hop(later, 0)
    return bytes(later)
