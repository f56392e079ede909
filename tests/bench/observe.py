"""Watching a host from outside: kernel notifications with the time at which each arrived, and its processes.

Notifications are only stored while the clock runs and decoded afterwards: decoding 15 000 of them takes 60 ms
that the daemon would have to share the machine with.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from flanneld.errors import Unavailable
from flanneld.kernel import neigh_codec, nlmsg, route_codec
from flanneld.kernel.listen import GROUP_NEIGH, GROUP_ROUTE4, SO_RCVBUFFORCE
from flanneld.lab import netns
from flanneld.lab.node import Node
from tests.bench.hollow import Key

RECEIVE_BUFFER_BYTES = 512 << 20
"""150 000 notifications of 50 000 peers, at the 2 KiB or so that each occupies."""
TICKS = os.sysconf("SC_CLK_TCK")


class Watcher:
    """Listens to changes of routes, neighbours and forwarding entries of one namespace."""

    def __init__(self, name: str) -> None:
        self._sock = netns.run_in(
            name, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        )
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._sock.bind((0, GROUP_NEIGH | GROUP_ROUTE4))
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        self.arrived: list[tuple[int, bytes]] = []
        """(``monotonic_ns``, datagram); a notification is a datagram of its own."""

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()

    def clear(self) -> None:
        """Forget what has come so far."""
        self.take(0)
        self.arrived.clear()

    def take(self, timeout_s: float) -> None:
        """Store what comes, waiting at most ``timeout_s`` for the first.

        Raises:
            Unavailable: notifications were lost, so nothing that follows would mean anything.
        """
        if not self._poll.poll(timeout_s * 1000):
            return
        try:
            while True:
                datagram = self._sock.recv(1 << 16)
                self.arrived.append((time.monotonic_ns(), datagram))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise Unavailable("the benchmark cannot keep up with kernel notifications on this machine") from error
            raise


class Goal:
    """A set of entries that must all come, or all go, and the moment when that was so."""

    def __init__(self, keys: Iterable[Key], present: bool = True) -> None:
        self._wanted = frozenset(keys)
        self._missing = set(self._wanted)
        self._present = present
        self._at = 0
        self.reached_ns = 0
        """``monotonic_ns`` of the notification that made it true; 0 while it is not."""

    def look(self, watcher: Watcher) -> bool:
        """Take what the watcher has; tells whether the goal is reached.

        Looks only when enough has come that it may be: before, a look could only cost time.
        """
        if len(watcher.arrived) - self._at >= len(self._missing):
            for at, datagram in watcher.arrived[self._at :]:
                self._decode(at, datagram)
            self._at = len(watcher.arrived)
        return not self._missing

    def _decode(self, at: int, datagram: bytes) -> None:
        for kind, _flags, _seq, _pid, body in nlmsg.messages(datagram):
            found = decode(kind, body)
            if found is None or found[0] not in self._wanted:
                continue
            key, present = found
            if present is not self._present:
                self._missing.add(key)
                self.reached_ns = 0
            elif key in self._missing:
                self._missing.discard(key)
                self.reached_ns = 0 if self._missing else at


def decode(kind: int, body: memoryview) -> tuple[Key, bool] | None:
    """The entry that a notification is about and whether it is there now."""
    if kind in (nlmsg.RTM_NEWROUTE, nlmsg.RTM_DELROUTE):
        found = route_codec.parse_route(body)[1]
        return ("route", found.get(route_codec.RTA_DST, b"")), kind == nlmsg.RTM_NEWROUTE
    if kind in (nlmsg.RTM_NEWNEIGH, nlmsg.RTM_DELNEIGH):
        family, _index, state, found = neigh_codec.parse_neigh(body)
        present = kind == nlmsg.RTM_NEWNEIGH and bool(state & (neigh_codec.NUD_PERMANENT | neigh_codec.NUD_ANSWERED))
        if family == nlmsg.AF_BRIDGE:
            return ("fdb", found.get(neigh_codec.NDA_LLADDR, b"")), present
        return ("neigh", found.get(neigh_codec.NDA_DST, b"")), present
    return None


def wait_for(watcher: Watcher, goal: Goal, timeout_s: float) -> bool:
    """Wait until a goal is reached; tells whether it was."""
    deadline = time.monotonic() + timeout_s
    while not goal.look(watcher):
        if time.monotonic() > deadline:
            return False
        watcher.take(0.1)
    return True


class Entries:
    """Entries for peers that stand in the kernel now, as iproute2 lists them: the check on the notifications."""

    def __init__(self, host: Node) -> None:
        def lines(*argv: str) -> list[list[str]]:
            return [line.split() for line in host.run(*argv, check=False, timeout_s=60).stdout.splitlines()]

        self.routes = sum(words[0].startswith("10.") and words[0].endswith("/24") for words in lines("ip", "route"))
        self.neighbours = sum("PERMANENT" in words for words in lines("ip", "neigh"))
        self.fdb = sum(words[0].startswith("02:be:0c:") and "permanent" in words for words in lines("bridge", "fdb"))

    def most(self) -> int:
        """The largest of the three numbers."""
        return max(self.routes, self.neighbours, self.fdb)


class Usage:
    """What the processes of a namespace have used: one daemon lives there, with its children."""

    def __init__(self, name: str) -> None:
        self.cpu_s = 0.0
        """User and system time, that of ended and reaped children included; ticks of 10 ms."""
        self.fine_cpu_s = 0.0
        """On-CPU time of the threads that live now, in nanoseconds of precision: for differences."""
        self.rss_mib = 0.0
        for pid in netns.pids([name]):
            try:
                fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
                status = Path(f"/proc/{pid}/status").read_text()
                threads = list(Path(f"/proc/{pid}/task").iterdir())
                self.fine_cpu_s += sum(int((t / "schedstat").read_text().split()[0]) for t in threads) / 1e9
            except OSError:
                continue  # ended meanwhile: its parent has reaped it
            # proc_pid_stat(5): utime, stime, cutime, cstime are fields 14 to 17; fields[0] is the third
            self.cpu_s += sum(map(int, fields[11:15])) / TICKS
            self.fine_cpu_s += sum(map(int, fields[13:15])) / TICKS
            rss = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0")
            self.rss_mib += int(rss.split()[1]) / 1024
