"""What the lab measures: pings between pods, full-size packets, and what the outside world sees."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

from flanneld.lab.lab import Lab
from flanneld.lab.netns import run_in
from flanneld.lab.node import Node
from flanneld.lab.spec import OUTSIDE
from flanneld.model.addr import Family

_REPLY = re.compile(r"icmp_seq=(\d+) .*time=([\d.]+) ms")
_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
_COMPLAINT = re.compile(r"^From \S+ icmp_seq=\d+ (.+)$", re.MULTILINE)
IP_HEADER_BYTES = {Family.V4: 20, Family.V6: 40}
ICMP_HEADER_BYTES = 8
EGRESS_PORT = 8472
EGRESS_TIMEOUT_S = 2.0


class Ping(NamedTuple):
    """Outcome of one ``ping``."""

    sent: int
    received: int
    first_ms: float | None
    """Round trip of the first packet; None when it was lost."""
    complaint: str = ""
    """What was answered instead, such as ``Destination Host Unreachable``; empty for silence."""

    @property
    def lost(self) -> int:
        """Packets without an answer."""
        return self.sent - self.received


def ping(source: Node, target: str, count: int = 1, size: int = 56, whole: bool = False) -> Ping:
    """Ping an address from a node.

    Args:
        source: where it is sent.
        target: an address.
        count: packets, 10 ms apart.
        size: ICMP payload in bytes.
        whole: forbid fragments on the way.
    """
    options = ["-M", "do"] if whole else []
    argv = ["ping", "-n", "-c", str(count), "-i", "0.01", "-W", "1", "-s", str(size), *options, target]
    done = source.run(*argv, check=False)
    summary = _SUMMARY.search(done.stdout)
    if summary is None:  # ping could not even send: no route, packet too big for the device
        return Ping(count, 0, None, done.stderr.strip() or f"ping ended with status {done.returncode}")
    replies = {int(sequence): float(ms) for sequence, ms in _REPLY.findall(done.stdout)}
    complaint = _COMPLAINT.search(done.stdout)
    return Ping(int(summary[1]), int(summary[2]), replies.get(1), complaint[1] if complaint else "")


Matrix = dict[tuple[int, int], Ping]
"""By number of the sending and of the receiving host."""


def ping_matrix(lab: Lab, family: Family, count: int = 1) -> Matrix:
    """Ping from every pod to every other, one pair after the other so that latencies mean something."""
    addresses = {host.number: host.pod_address(family) for host in lab.hosts}
    return {
        (host.number, peer): ping(host.pod, address, count)
        for host in lab.hosts
        for peer, address in addresses.items()
        if peer != host.number
    }


def full_size_ping(lab: Lab, source: int, target: int, family: Family) -> tuple[int, Ping]:
    """Ping with the largest packet that ``FLANNEL_MTU`` promises, unfragmented.

    Returns:
        The packet's size in bytes, and the outcome.
    """
    mtu = int(lab.host(source).subnet_env()["FLANNEL_MTU"])
    payload = mtu - IP_HEADER_BYTES[family] - ICMP_HEADER_BYTES
    return mtu, ping(lab.host(source).pod, lab.host(target).pod_address(family), size=payload, whole=True)


def egress_source(lab: Lab, number: int, family: Family) -> str | None:
    """Connect from a pod to the outside host; the address that the outside host sees, None without connection."""
    address = OUTSIDE[family]

    def listen() -> socket.socket:
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, EGRESS_PORT))
        server.listen()
        server.settimeout(EGRESS_TIMEOUT_S)
        return server

    def connect() -> socket.socket:
        return socket.create_connection((address, EGRESS_PORT), timeout=EGRESS_TIMEOUT_S)

    # a socket belongs to the namespace it was made in, whoever uses it later: no helper program is needed
    with run_in(lab.outside.netns, listen) as server:
        try:
            with run_in(lab.host(number).pod.netns, connect):
                accepted, peer = server.accept()
                accepted.close()
                return str(peer[0])
        except OSError:
            return None
