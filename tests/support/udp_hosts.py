"""Hosts of a udp network in namespaces, joined by a veth with default offloads, and transfers between them.

::

    10.5.1.0 flannel0 [host 1] eth0 192.0.2.1 ──veth── 192.0.2.2 eth0 [host 2] flannel0 10.5.2.0

Default offloads matter: nobody fills in a checksum that a sender leaves to hardware (udp_programs says more).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from backends.udp_fast import FastConfig, FastPath
from backends.udp_packet import PumpConfig, UdpPeer
from backends.udp_pump import Pump
from flanneld.kernel.tun import open_tun
from flanneld.model.addr import IP, Prefix, parse_ip
from tests.support.netns import Netns, join

PORT, MTU, TUN = 8285, 1472, "flannel0"
NETWORK = Prefix.parse("10.5.0.0/16")
SOL_UDP, UDP_SEGMENT = 17, 103  # include/uapi/linux/udp.h
SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


def udp_config(number: int, **changes: object) -> FastConfig:
    """Of the kernel rung on a host."""
    here = parse_ip(f"10.5.{number}.0"), "eth0", parse_ip(f"192.0.2.{number}")
    return FastConfig(TUN, *here, PORT, NETWORK, 24, MTU)._replace(**changes)  # type: ignore[arg-type]


def lacking() -> str:
    """Why this machine cannot run the kernel rung; empty when it can."""
    with Netns("flprobe") as space:
        return space.call(FastPath().probe, udp_config(1, ext="lo")) or ""


class Endpoint:
    """Something with an address of the overlay.

    Args:
        label: begins its namespace's name.
        overlay: its address.
    """

    def __init__(self, label: str, overlay: str) -> None:
        self.netns = Netns(label)
        self.overlay = overlay
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.netns.__enter__()
        self._open.callback(self.netns.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def udp(self) -> socket.socket:
        """A datagram socket on the overlay address."""
        sock = self.netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._open.callback(sock.close)
        sock.bind((self.overlay, 0))
        sock.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        return sock

    def tcp(self) -> socket.socket:
        """A stream socket on the overlay address."""
        sock = self.netns.call(socket.socket, socket.AF_INET, socket.SOCK_STREAM)
        self._open.callback(sock.close)
        sock.bind((self.overlay, 0))
        sock.settimeout(10)
        return sock

    def ping(self, other: Endpoint, *, size: int = 56, count: int = 3) -> str:
        """Ping over the overlay; the summary."""
        options = ("-q", "-c", str(count), "-i", "0.02", "-W", "2", "-s", str(size))
        return self.netns.run("ping", *options, other.overlay, check=False)


class Host(Endpoint):
    """One host: a TUN, a socket, and the pump under it; with ``kernel`` also the eBPF data path.

    Args:
        number: 1 or 2; gives its addresses.
        kernel: whether it runs the kernel rung.
    """

    def __init__(self, number: int, *, kernel: bool = True) -> None:
        super().__init__(f"udpfast{number}", f"10.5.{number}.0")
        self.number = number
        self.kernel = kernel
        self.fast = FastPath()
        self.ip = parse_ip(f"192.0.2.{number}")
        self.tun_fd = -1
        self.pump: Pump | None = None
        self.deaths: list[BaseException] = []

    def config(self, **changes: object) -> FastConfig:
        """Of the kernel rung."""
        return udp_config(self.number, **changes)

    def pod(self) -> Endpoint:
        """A container behind this host, which forwards for it."""
        pod = self._open.enter_context(Endpoint(f"udpfastpod{self.number}", f"10.5.{self.number}.7"))
        join(self.netns, "pod", pod.netns, "eth0")
        for space, device in ((self.netns, "pod"), (pod.netns, "eth0")):  # as CNI sets it from subnet.env
            space.run("ip", "link", "set", device, "mtu", str(MTU))
        self.netns.run("ip", "addr", "add", f"10.5.{self.number}.1/24", "dev", "pod")
        self.netns.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        pod.netns.run("ip", "addr", "add", f"{pod.overlay}/24", "dev", "eth0")
        pod.netns.run("ip", "route", "add", "default", "via", f"10.5.{self.number}.1")
        return pod

    def make_tun(self) -> None:
        """Open the TUN and give it what the reconcile loop would."""
        self.tun_fd = self.netns.call(open_tun, TUN)
        self._open.callback(os.close, self.tun_fd)
        self.dress_tun()

    def dress_tun(self) -> None:
        """Address, MTU and route."""
        self.netns.run("sysctl", "-qw", f"net.ipv6.conf.{TUN}.disable_ipv6=1")
        self.netns.run("ip", "addr", "add", f"{self.overlay}/32", "dev", TUN)
        self.netns.run("ip", "link", "set", TUN, "mtu", str(MTU), "up")
        self.netns.run("ip", "route", "add", str(NETWORK), "dev", TUN)

    def start(self, peers: dict[Prefix, UdpPeer], **changes: object) -> None:
        """Begin to forward."""
        self.make_tun()
        sock = self.netns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._open.callback(sock.close)
        sock.bind((f"192.0.2.{self.number}", PORT))
        cfg = PumpConfig(parse_ip(self.overlay), MTU, PORT, any_source=False)
        pump = self.netns.call(
            lambda: Pump(self.tun_fd, sock, cfg, gso=True, gro=not self.kernel, ended=self.deaths.append)
        )
        pump.apply(peers)
        pump.start()
        self._open.callback(pump.stop)
        self.pump = pump
        if self.kernel:
            self.netns.call(self.fast.start, self.config(**changes))
            self._open.callback(lambda: self.netns.call(self.fast.stop, False))
            self.netns.call(self.fast.apply, peers)


@contextlib.contextmanager
def pair(*, kernel: tuple[bool, bool] = (True, True), **changes: object) -> Iterator[tuple[Host, Host]]:
    """Two hosts that forward to each other; each knows whether the other receives in its kernel."""
    with wired(kernel=kernel) as (one, two):
        one.start({Prefix.parse("10.5.2.0/24"): UdpPeer(two.ip, PORT, kernel[1])}, **changes)
        two.start({Prefix.parse("10.5.1.0/24"): UdpPeer(one.ip, PORT, kernel[0])}, **changes)
        yield one, two
        assert not one.deaths + two.deaths


@contextlib.contextmanager
def wired(*, kernel: tuple[bool, bool] = (True, True)) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire, with nothing on top."""
    with Host(1, kernel=kernel[0]) as one, Host(2, kernel=kernel[1]) as two:
        join(one.netns, "eth0", two.netns, "eth0")
        for host in (one, two):
            host.netns.run("ip", "addr", "add", f"192.0.2.{host.number}/24", "dev", "eth0")
        yield one, two


def tcp_digests(sender: Endpoint, receiver: Endpoint, size: int = 8 << 20) -> tuple[str, str]:
    """Send random bytes in writes of odd sizes over TCP; SHA-256 of what was sent and of what came."""
    listener, out = receiver.tcp(), sender.tcp()
    listener.listen(1)
    payload = random.Random(size).randbytes(size)
    got = hashlib.sha256()

    def take() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as stream:
            stream.settimeout(10)
            while part := stream.recv(1 << 16):
                got.update(part)

    taker = threading.Thread(target=take)
    taker.start()
    try:
        out.connect(listener.getsockname())
        at, chunk = 0, 1
        while at < size:
            out.sendall(payload[at : at + chunk])
            at, chunk = at + chunk, chunk * 7 % 131071 + 1
        out.shutdown(socket.SHUT_WR)
    finally:
        taker.join()
    return hashlib.sha256(payload).hexdigest(), got.hexdigest()


def udp_digests(sender: Endpoint, receiver: Endpoint, *, segment: int = 0) -> tuple[list[str], list[str]]:
    """Send datagrams of many sizes (with ``segment``: ten to a super-packet); digests of what was sent and what came.

    What came is sorted like what was sent, because nothing promises order.
    """
    out, into = sender.udp(), receiver.udp()
    source = random.Random(7)
    if segment:
        out.setsockopt(SOL_UDP, UDP_SEGMENT, segment)
        packets = [source.randbytes(segment) for _ in range(200)]
        sends = [b"".join(packets[at : at + 10]) for at in range(0, len(packets), 10)]
    else:
        sends = packets = [source.randbytes(size) for size in (1, 2, 9, 63, 64, 512, 1443, 1444, 1445, 4000, 20000) * 5]
    for one in sends:
        out.sendto(one, into.getsockname())
    came: list[bytes] = []
    with contextlib.suppress(TimeoutError):
        while len(came) < len(packets):
            came.append(into.recv(65535))
    digest = [hashlib.sha256(data).hexdigest() for data in packets]
    return sorted(digest), sorted(hashlib.sha256(data).hexdigest() for data in came)


def peer_of(host: Host, *, kernel_rx: bool | None = None) -> UdpPeer:
    """A host as others know it."""
    return UdpPeer(IP(host.ip), PORT, host.kernel if kernel_rx is None else kernel_rx)
