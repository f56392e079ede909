"""Data sent between pods and compared with what arrived. Knows nothing of backends.

A ping cannot tell whether an overlay carries data: the kernel fills in a ping's checksum itself, but leaves those
of TCP and UDP to hardware that a tunnel may never reach, and sends super-packets that a tunnel has to cut.
"""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections import Counter
from functools import cache
from typing import NamedTuple

from flanneld.lab.lab import Lab
from flanneld.lab.netns import run_in
from flanneld.model.addr import Family

TCP_BYTES = 16 << 20
DATAGRAMS = 2000
DATAGRAM_SIZES = (1, 2, 63, 64, 512, 1200, 1400, 1444, 1472, 4000)
"""Bytes: odd and even, around the MTU of every backend, and one that has to be fragmented."""
AT_ONCE = 20
"""Datagrams under way at a time, so that none is lost to a full queue: that would be no overlay's fault."""
STALLED_S = 5.0


class Transfer(NamedTuple):
    """Outcome of one transfer."""

    sent: int
    """Bytes over TCP, datagrams over UDP."""
    arrived: int
    """Of these, unchanged: over TCP all or, as one sum covers all, none."""
    took_s: float
    complaint: str = ""
    """What went wrong, for people."""

    @property
    def is_intact(self) -> bool:
        """Whether everything arrived as it was sent."""
        return self.arrived == self.sent


def tcp_transfer(lab: Lab, source: int, target: int, family: Family, size: int = TCP_BYTES) -> Transfer:
    """Send random bytes from one host's pod to another's over one connection, in writes of odd sizes."""
    server = _socket(lab, target, family, socket.SOCK_STREAM)
    client = _socket(lab, source, family, socket.SOCK_STREAM)
    payload, begun = _random_bytes(size), time.monotonic()
    with server, client:
        server.listen(1)
        try:
            client.connect(server.getsockname())
            stream, _ = server.accept()
        except OSError as error:
            return Transfer(size, 0, time.monotonic() - begun, f"no connection: {error.strerror or error}")
        sending = threading.Thread(target=_send, args=(client, payload))
        sending.start()
        with stream:
            digest, count, complaint = _receive(stream)
        sending.join()
    took_s = time.monotonic() - begun
    if complaint or count < size:
        return Transfer(size, 0, took_s, complaint or f"ended after {count} of {size} bytes")
    if digest != hashlib.sha256(payload).digest():
        return Transfer(size, 0, took_s, "SHA-256 of what arrived differs from that of what was sent")
    return Transfer(size, size, took_s)


def udp_transfer(lab: Lab, source: int, target: int, family: Family, count: int = DATAGRAMS) -> Transfer:
    """Send datagrams of many sizes from one host's pod to another's, each compared by its SHA-256."""
    begun, arrived = time.monotonic(), 0
    content = memoryview(_random_bytes(1 << 20))
    with (
        _socket(lab, target, family, socket.SOCK_DGRAM) as into,
        _socket(lab, source, family, socket.SOCK_DGRAM) as out,
    ):
        for first in range(0, count, AT_ONCE):
            wanted: Counter[bytes] = Counter()
            for number in range(first, min(first + AT_ONCE, count)):
                at = number * 509  # overlapping windows of random bytes: every datagram is another
                datagram = content[at : at + DATAGRAM_SIZES[number % len(DATAGRAM_SIZES)]]
                wanted[hashlib.sha256(datagram).digest()] += 1
                out.sendto(datagram, into.getsockname())
            try:
                while wanted:
                    digest = hashlib.sha256(into.recv(1 << 16)).digest()
                    if digest in wanted:
                        arrived += 1
                        wanted -= Counter((digest,))
            except TimeoutError:
                complaint = f"{wanted.total()} of datagrams {first} to {first + AT_ONCE - 1} did not arrive intact"
                return Transfer(count, arrived, time.monotonic() - begun, complaint)
    return Transfer(count, arrived, time.monotonic() - begun)


@cache
def _random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)  # noqa: S311  # nobody is to be kept from guessing it


def _socket(lab: Lab, number: int, family: Family, kind: socket.SocketKind) -> socket.socket:
    """A socket on the address of a host's pod; it stays in the pod's namespace, whoever uses it."""
    address = lab.host(number).pod_address(family)

    def bound() -> socket.socket:
        made = socket.socket(family, kind)
        made.bind((address, 0))
        made.settimeout(STALLED_S)
        return made

    return run_in(lab.host(number).pod.netns, bound)


def _send(client: socket.socket, payload: bytes) -> None:
    at, size = 0, 1
    view = memoryview(payload)
    try:
        while at < len(payload):
            client.sendall(view[at : at + size])
            at, size = at + size, size * 7 % 131071 + 1
        client.shutdown(socket.SHUT_WR)
    except OSError:
        client.close()  # the receiver notices and says so


def _receive(stream: socket.socket) -> tuple[bytes, int, str]:
    """SHA-256 and number of bytes until the end, and why it ended early."""
    digest, count = hashlib.sha256(), 0
    stream.settimeout(STALLED_S)
    try:
        while part := stream.recv(1 << 18):
            digest.update(part)
            count += len(part)
    except OSError as error:
        stream.close()  # resets the connection, so that the sender ends too
        return b"", count, f"stalled after {count} bytes: {error}"
    return digest.digest(), count, ""
