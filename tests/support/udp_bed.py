"""Beds for the udp backend's pump: two hosts with pods, and a pump whose TUN is a socket the test holds.

Namespaces begin with ``udpp``. The pumps run in the test's own process.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from backends.udp_packet import PumpConfig, UdpPeer
from backends.udp_pump import Pump
from flanneld.kernel.tun import open_tun
from flanneld.model.addr import IP, Prefix, format_ip, parse_ip
from tests.support.golden_packets import CONFIG, GO_PEER, KERNEL_PEER, MTU, PEERS, POD, PORT, STRANGER
from tests.support.netns import Netns, join


def udp_socket(ip: str, port: int = 0) -> socket.socket:
    """A bound UDP socket; to be made inside a namespace."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((ip, port))
    return sock


class Host:
    """One host with a pod behind it, its TUN, its socket, and after ``start`` its pump."""

    def __init__(self, stack: ExitStack, number: int) -> None:
        self.number = number
        self.ns = stack.enter_context(Netns("udpp-h"))
        self.pod = stack.enter_context(Netns("udpp-p"))
        self.ip, self.pod_ip, self.tun_ip = f"192.0.2.{number}", f"10.5.{number}.9", f"10.5.{number}.0"
        self.ended: list[BaseException] = []
        """Why threads of the pump died."""
        self._stack = stack

    def wire(self) -> None:
        """Pod, forwarding, TUN with address and route (contract 6.48), socket (6.49); the underlay is there."""
        ns, pod, gateway = self.ns, self.pod, f"10.5.{self.number}.1"
        join(ns, "pod", pod, "eth0")
        ns.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        ns.run("ip", "addr", "add", f"{gateway}/24", "dev", "pod")
        pod.run("ip", "addr", "add", f"{self.pod_ip}/24", "dev", "eth0")
        # as CNI plug-ins do, who read the MTU from subnet.env
        pod.run("ip", "link", "set", "eth0", "mtu", str(MTU))
        pod.run("ip", "route", "add", "default", "via", gateway)
        ns.run("ip", "addr", "add", f"{self.ip}/24", "dev", "eth0")
        self.tun_fd = ns.call(open_tun, "flannel0")
        self._stack.callback(os.close, self.tun_fd)
        ns.run("ip", "addr", "add", f"{self.tun_ip}/32", "dev", "flannel0")
        ns.run("ip", "link", "set", "flannel0", "mtu", str(MTU), "up")
        ns.run("ip", "route", "add", "10.5.0.0/16", "dev", "flannel0")
        self.sock = self._stack.enter_context(ns.call(udp_socket, self.ip, PORT))

    def start(self, other: Host, *, gso: bool) -> Pump:
        """Run a pump whose one peer is the other host."""
        cfg = PumpConfig(parse_ip(self.tun_ip), MTU, PORT, any_source=False)
        self.pump = self.ns.call(Pump, self.tun_fd, self.sock, cfg, gso=gso, ended=self.ended.append)
        self._stack.callback(self.pump.stop)
        there = UdpPeer(parse_ip(other.ip), PORT, kernel_rx=False)
        self.pump.apply({Prefix.parse(f"10.5.{other.number}.0/24"): there})
        self.pump.start()
        return self.pump

    def count(self, name: str) -> int:
        """One of the pump's counters."""
        return self.pump.stats()[name]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one link, both wired, no pump started."""
    with ExitStack() as stack:
        a, b = Host(stack, 1), Host(stack, 2)
        join(a.ns, "eth0", b.ns, "eth0")
        for host in (a, b):
            host.wire()
        yield a, b


class Engine:
    """A pump between real sockets of one namespace and a TUN that is the other end of a socket pair.

    So every byte that would go into the TUN can be seen, and everything, valid or not, can come out of it.
    All peers of the golden packets, a stranger and the pod live on ``lo``.
    """

    def __init__(
        self, stack: ExitStack, *, gso: bool, gro: bool = True, cfg: PumpConfig = CONFIG, start: bool = True
    ) -> None:
        ns = stack.enter_context(Netns("udpp-e"))
        here = "192.0.2.1"
        addresses = [here, POD, *(format_ip(ip) for ip in (GO_PEER.ip, KERNEL_PEER.ip, STRANGER))]
        for address in addresses:
            ns.run("ip", "addr", "add", f"{address}/32", "dev", "lo")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.tun = stack.enter_context(near)
        """What the test writes here the pump reads from its TUN, and the reverse."""
        stack.enter_context(far).setblocking(False)
        self.peers = {ip: stack.enter_context(ns.call(udp_socket, format_ip(ip), PORT)) for ip in addresses_of_peers()}
        self.here = (here, PORT)
        self.icmp = stack.enter_context(ns.call(icmp_socket))
        self.ended: list[BaseException] = []
        self.sock = stack.enter_context(ns.call(udp_socket, *self.here))
        self.pump = ns.call(Pump, far.fileno(), self.sock, cfg, gso=gso, gro=gro, ended=self.ended.append)
        stack.callback(self.pump.stop)
        self.pump.apply(PEERS)
        if start:
            self.pump.start()

    def changed(self, before: Mapping[str, int]) -> dict[str, int]:
        """Counters that differ from before, without those of bytes."""
        now = self.pump.stats()
        return {name: now[name] - before[name] for name in now if now[name] != before[name] and "bytes" not in name}


def addresses_of_peers() -> list[IP]:
    """Who sends and receives datagrams."""
    return [GO_PEER.ip, KERNEL_PEER.ip, STRANGER]


def icmp_socket() -> socket.socket:
    """Receives whole ICMP packets; to be made inside a namespace."""
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


def receive(sock: socket.socket, timeout_s: float = 5.0) -> bytes:
    """The next packet or datagram, waited for."""
    assert readable(sock, timeout_s), f"nothing came within {timeout_s} s"
    return sock.recv(70000)


def readable(sock: socket.socket, timeout_s: float = 0.0) -> bool:
    """Whether something is there to read."""
    return bool(select.select([sock], [], [], timeout_s)[0])
