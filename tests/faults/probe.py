"""A UDP probe: a thousand packets a second on each of several one-way streams, and what became of each.

Runs as a process of its own, so that nothing the test does delays it, and ahead of other processes where the
machine lets it. Arrivals carry the kernel's own time stamps, so the receiving half may be late without harm.

What a user of the network would notice of an outage is how long he has to go on sending until something gets
through: the *wait* of a packet is the time from its sending to the first arrival of it or of any later one.
That is the round figure for lost packets as well as for those that the kernel keeps for a while.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flanneld.lab.netns import run_in

PERIOD_NS = 1_000_000
LATE_NS = 2_000_000
"""Packets that wait longer are told one by one."""
DRAIN_TICKS = 20
LAST_WAIT_S = 0.05
"""After the last packet was sent, for those on their way."""
RECEIVE_BYTES = 16 << 20
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35
"""Source: include/uapi/asm-generic/socket.h (SO_TIMESTAMPNS_OLD)."""
_STAMP = struct.Struct("=qq")
_PACKET = struct.Struct("=Q40x")
_NOT_ARRIVED = 0


class Route(NamedTuple):
    """One stream."""

    name: str
    source_netns: str
    source: str
    """Address to send from."""
    target_netns: str
    target: str
    """Address to send to."""
    fresh: bool = False
    """Every packet from a new port: to a firewall each is a new connection. One namespace can have such streams."""
    seen_from: str = ""
    """What the receiver must see as the source; empty = anything."""


class Late(NamedTuple):
    """One packet that was lost, or waited long."""

    sent: float
    """Seconds since the epoch."""
    through: float
    """When it or a later one arrived."""
    lost: bool


class Outcome(NamedTuple):
    """What became of one stream."""

    name: str
    sent: int
    skipped: int
    """Packets that could not be sent in time because the probe itself did not get to run."""
    late: tuple[Late, ...]

    def lost(self, since: float = 0.0) -> int:
        """Packets that were sent after a moment and never arrived."""
        return sum(packet.lost for packet in self.late if packet.sent >= since)

    def outage_ms(self, since: float = 0.0) -> float:
        """The longest wait, counted from a moment on; 0 where none was above the threshold of 2 ms."""
        return max(
            ((packet.through - max(packet.sent, since)) * 1000 for packet in self.late if packet.through > since),
            default=0.0,
        )


class Probe:
    """A running probe; a context manager that ends it.

    Args:
        routes: the streams, all sent in step.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        # sockets are made one by one for fresh streams, so the process itself has to live where they are
        home = next((route.source_netns for route in routes if route.fresh), routes[0].source_netns)
        self._child = subprocess.Popen(
            ["ip", "netns", "exec", home, sys.executable, "-m", "tests.faults.probe", json.dumps(routes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        if self._child.stdout.readline() != "running\n":
            self.close()
            raise AssertionError("the probe did not start")

    def end(self) -> list[Outcome]:
        """Stop sending; what became of each stream."""
        text, _ = self._child.communicate(timeout=30)
        return [
            Outcome(name, sent, skipped, tuple(Late(a / 1e9, b / 1e9, bool(c)) for a, b, c in late))
            for name, sent, skipped, late in json.loads(text)
        ]

    def close(self) -> None:
        """End it whatever it does."""
        self._child.kill()
        self._child.communicate()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream:
    """The sending and the receiving end of one route."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.family = socket.AF_INET6 if ":" in route.target else socket.AF_INET
        self.into = run_in(route.target_netns, self._receiver)
        self.to = self.into.getsockname()[:2]
        self.out = run_in(route.source_netns, self._sender)
        self.sent_at = array.array("q")
        self.arrived_at = array.array("q")
        self.skipped = 0

    def _receiver(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind((self.route.target, 0))
        sock.setblocking(False)
        return sock

    def _sender(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.bind((self.route.source, 0))
        sock.setblocking(False)
        return sock

    def send(self, now: int) -> None:
        """Send the next packet; one that the kernel refuses counts as sent, and lost."""
        packet = _PACKET.pack(len(self.sent_at))
        self.sent_at.append(now)
        self.arrived_at.append(_NOT_ARRIVED)
        if self.route.fresh:
            self.out.close()
            self.out = self._sender()
        with contextlib.suppress(OSError):
            self.out.sendto(packet, self.to)

    def drain(self) -> None:
        """Take what has arrived."""
        wanted = self.route.seen_from
        while True:
            try:
                data, ancillary, _, source = self.into.recvmsg(2048, 64)
            except BlockingIOError:
                return
            if wanted and source[0] != wanted:
                continue  # its answer would not find the way back
            seconds, nanoseconds = _STAMP.unpack(ancillary[0][2])
            [number] = _PACKET.unpack(data)
            if number < len(self.arrived_at) and not self.arrived_at[number]:
                self.arrived_at[number] = seconds * 1_000_000_000 + nanoseconds

    def late(self, end: int) -> Iterator[tuple[int, int, bool]]:
        """Packets whose wait was long, the last first."""
        through = end
        for number in range(len(self.sent_at) - 1, -1, -1):
            sent, arrived = self.sent_at[number], self.arrived_at[number]
            through = min(through, arrived) if arrived else through
            if not arrived or through - sent > LATE_NS:
                yield sent, through, not arrived


def _ahead_of_others() -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def main() -> None:
    """Send until standard input is closed, then tell."""
    streams = [_Stream(Route(*fields)) for fields in json.loads(sys.argv[1])]
    gc.disable()
    _ahead_of_others()
    os.set_blocking(0, False)
    print("running", flush=True)
    begun, ticks = time.monotonic_ns(), 0
    while True:
        ticks += 1
        due = begun + ticks * PERIOD_NS
        now = time.monotonic_ns()
        if now < due:
            time.sleep((due - now) / 1e9)
        elif behind := (now - due) // PERIOD_NS:
            ticks += behind
            for stream in streams:
                stream.skipped += behind
        for stream in streams:
            stream.send(time.time_ns())
        if ticks % DRAIN_TICKS < 1 + len(streams) and ticks % DRAIN_TICKS:
            streams[ticks % DRAIN_TICKS - 1].drain()
        if not ticks % DRAIN_TICKS and _is_over():
            break
    time.sleep(LAST_WAIT_S)
    end = time.time_ns()
    for stream in streams:
        stream.drain()
    report = [[s.route.name, len(s.sent_at), s.skipped, list(s.late(end))[::-1]] for s in streams]
    json.dump(report, sys.stdout)


def _is_over() -> bool:
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


if __name__ == "__main__":
    main()
