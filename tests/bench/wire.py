"""Packets to hollow peers, and which of them really leave the host, when, and to whom.

A hollow peer cannot answer, so what counts is that its packet leaves the external interface in the right
envelope: for vxlan and udp an outer packet to the peer's public address, for host-gw the packet itself.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterable

from flanneld.lab import netns
from tests.bench.hollow import Peer

RECEIVE_BUFFER_BYTES = 64 << 20
ETH_P_ALL = 0x0003  # include/uapi/linux/if_ether.h
PACKET_OUTGOING = 4  # include/uapi/linux/if_packet.h
DISCARD_PORT = 9
MAGIC = b"flbench1"
_TAIL = struct.Struct("!8sI")
_IP_DST = slice(30, 34)
"""Destination address of an IPv4 packet behind an Ethernet header."""


class Wire:
    """Sends from the host and taps its external interface."""

    def __init__(self, name: str, device: str, tunnelled: bool) -> None:
        self._tunnelled = tunnelled
        self._out = netns.run_in(name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._tap = netns.run_in(
            name,
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETH_P_ALL)),
        )
        self._tap.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._tap.bind((device, 0))
        self._poll = select.poll()
        self._poll.register(self._tap, select.POLLIN)
        self.sent: list[tuple[int, Peer]] = []
        """(``monotonic_ns``, to whom) of each packet, by its number."""
        self.left: dict[int, int] = {}
        """``monotonic_ns`` at which a packet left, by its number."""

    def close(self) -> None:
        """Let go of the sockets."""
        self._out.close()
        self._tap.close()

    def send(self, peer: Peer) -> int:
        """Send a packet to a pod of this peer; returns the packet's number."""
        number = len(self.sent)
        self.sent.append((time.monotonic_ns(), peer))
        with contextlib.suppress(OSError):  # no route, or refused: it never leaves, which is what is counted
            self._out.sendto(_TAIL.pack(MAGIC, number), (peer.pod, DISCARD_PORT))
        return number

    def take(self, timeout_s: float) -> None:
        """Note what leaves, waiting at most ``timeout_s`` for the first."""
        if not self._poll.poll(timeout_s * 1000):
            return
        try:
            while True:
                frame, (_, _, kind, *_) = self._tap.recvfrom(1 << 16)
                if kind == PACKET_OUTGOING and len(frame) >= 54:
                    self._note(frame, time.monotonic_ns())
        except BlockingIOError:
            return

    def _note(self, frame: bytes, now: int) -> None:
        magic, number = _TAIL.unpack(frame[-_TAIL.size :])
        if magic != MAGIC or number in self.left:
            return
        peer = self.sent[number][1]
        expected = peer.public_ip if self._tunnelled else socket.inet_aton(peer.pod)
        if frame[_IP_DST] == expected:
            self.left[number] = now

    def wait_left(self, numbers: Iterable[int], timeout_s: float) -> bool:
        """Wait until all these packets have left; tells whether they have."""
        waiting = set(numbers)
        deadline = time.monotonic() + timeout_s
        while waiting := waiting - self.left.keys():
            if time.monotonic() > deadline:
                return False
            self.take(0.05)
        return True

    def delay_ms(self, number: int) -> float:
        """Time from the system call to the wire, of a packet that has left."""
        return (self.left[number] - self.sent[number][0]) / 1e6
