"""Net unreachable from the udp backend's slow path, in such a way that it reaches who asked (contract 6.53)."""

from __future__ import annotations

import logging
import socket
import time

from backends.udp_packet import PumpConfig, net_unreachable

log = logging.getLogger("flanneld.udp")

ICMP_PER_SECOND = 1000
"""RFC 1812 section 4.3.2.8 wants a limit; the number is Linux's former ``icmp_msgs_per_sec``."""


class Unreachable:
    """Tells senders on this host that nobody holds their destination.

    Go flanneld writes the answer into the TUN. There it carries the TUN's own address as source, and the kernel
    drops it as a martian, so a container waits for its timeout instead. From a raw socket it goes the way of the
    kernel's own ICMP, through conntrack, to the container, without loosening ``accept_local`` for every packet
    that peers send. The kernel chooses the IP id; the rest is as in contract 6.53.
    """

    def __init__(self, cfg: PumpConfig) -> None:
        self._tun_ip = cfg.tun_ip
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        except PermissionError:
            # a courtesy, not worth refusing to forward for
            log.warning(
                "containers that call an address without a lease will wait for their timeout: "
                "flanneld lacks CAP_NET_RAW to tell them at once"
            )
        self._second = 0
        self._left = 0

    def answer(self, packet: bytes) -> bool:
        """Send net unreachable to a packet's source where one is due; tells whether it was sent."""
        reply = net_unreachable(packet, self._tun_ip)
        if reply is None or self._socket is None or not self._may_send():
            return False
        try:
            self._socket.sendto(reply, (socket.inet_ntoa(packet[12:16]), 0))
        except OSError:
            return False  # no way back to such a source, or no memory: the sender has its timeout
        return True

    def close(self) -> None:
        """Let go of the socket; nothing is answered afterwards."""
        if self._socket is not None:
            self._socket.close()

    def _may_send(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._left = second, ICMP_PER_SECOND
        self._left -= 1
        return self._left >= 0
