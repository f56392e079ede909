"""Watches for what spoils checksums of tunnel packets (failures F03), on the sending and on the receiving side.

A packet enters the tunnel with checksums that the network card is to fill in, and the kernel computes the outer
checksum as if they were filled in already. When a NAT rule rewrites such a packet on this host, the kernel corrects
the outer checksum wrongly, and the receiver drops the packet. The sender can know: its table of connections shows the
rewriting. The receiver can only count, and say so: who has sent it is not recorded, and no other host is to be slowed
down because one says that something is wrong (design/adr-0013).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence

from flanneld.contracts import DataPath, Tunnel
from flanneld.errors import KernelError
from flanneld.kernel import conntrack, ethtool, udp_counters
from flanneld.model.addr import IP
from flanneld.problems import Problem
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

LOOK_S = 10.0
"""The kernel forgets a flow without answers, as a tunnel's are, after 30 s (nf_conntrack_udp_timeout)."""

LOOK_SHARE = 0.003
"""Longest share of one processor that looks may take: a table of a million connections is walked less often."""

CAN_ASK = (5, 8)
"""Since this Linux the table of connections can be asked for a few. Before 5.7 even packets without checksum suffer."""

CALM_S = 300.0
"""So long without another wrong checksum, and it is over."""

ENOUGH = 3
"""Wrong checksums that are worth a remark; one alone is a broken cable."""


class ChecksumWatch:
    """Has the kernel finish checksums when leaving them to the card spoils them; tells when wrong ones arrive.

    Args:
        path: the data path.
        sources: addresses that our tunnel packets are sent from.
        wake: of the loop.
        remark: where to tell that wrong ones arrive.
        release: of the kernel, major and minor.
    """

    def __init__(
        self,
        path: Tunnel,
        sources: Callable[[], Sequence[IP]],
        wake: Wake,
        remark: Problem,
        release: tuple[int, int] | None = None,
    ) -> None:
        self._path, self._sources, self._wake, self._remark = path, sources, wake, remark
        self._release = release or linux()
        self._arrivals = Arrivals()
        self._cannot_ask = ""

    async def run(self) -> None:
        """Look for ever."""
        while True:
            began = time.monotonic()
            await self.look()
            self._remark(self._arrivals.look(self._path.tunnel_port))
            await asyncio.sleep(max(LOOK_S, (time.monotonic() - began) / LOOK_SHARE))

    async def look(self) -> None:
        """Look at what this host sends once."""
        if self._path.may_distrust_card and (why := await self._why_not()) and self._path.may_distrust_card:
            log.warning("checksums are filled in before packets enter the tunnel, which costs throughput: %s", why)
            self._path.distrust_card()
            self._wake("checksums")

    async def _why_not(self) -> str:
        """Why not to leave checksums to the card; empty when nothing speaks against it."""
        if self._release < CAN_ASK:
            return "Linux before 5.8 spoils them when a NAT rule rewrites the packet"
        port = self._path.tunnel_port
        try:
            for source in self._sources():
                # in a thread: the walk through a large table takes milliseconds, which a miss would wait for
                if found := await asyncio.to_thread(conntrack.rewritten, source, port):
                    return f"a NAT rule of this host rewrites tunnel packets ({found}); exempt UDP port {port} from it"
            self._cannot_ask = ""
        except KernelError as exc:
            if str(exc) != self._cannot_ask:
                self._cannot_ask = str(exc)
                log.info("whether NAT spoils checksums cannot be seen here: %s", exc)
        return ""


class Arrivals:
    """Counts tunnel packets that arrive with a wrong checksum."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._bad: int | None = None
        """Of the whole host as of the last look."""
        self._dropped = 0
        """By the tunnel's socket as of the last look."""
        self._since = self._last = 0.0
        self._count = 0
        """In this streak."""

    def look(self, port: int) -> str | None:
        """Look once; returns what to say of it, or None."""
        bad, now = udp_counters.bad_checksums(), self._now()
        if bad != self._bad:
            self._take(bad, udp_counters.drops(port), now)
        if self._count and now - self._last > CALM_S:
            if self._count >= ENOUGH:
                log.info("no more wrong UDP checksums arrive on port %d, there were %d", port, self._count)
            self._count = 0
        return self._sentence(port) if self._count >= ENOUGH else None

    def _take(self, bad: int, dropped: int, now: float) -> None:
        before, self._bad = self._bad, bad
        # a device made anew has another socket, which begins at 0
        rise = dropped - self._dropped if dropped >= self._dropped else dropped
        self._dropped = dropped
        if before is None or (rise := min(rise, bad - before)) <= 0:
            return
        if not self._count:
            self._since = now
        self._count, self._last = self._count + rise, now

    def _sentence(self, port: int) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self._since))
        return (
            f"wrong UDP checksums arrive on port {port}, {self._count} since {since}: a NAT on a peer or on the way "
            'rewrites tunnel packets; exempt the port from NAT there, or set "TxChecksum": "off" in the Backend'
        )


def look_at_offloads(path: DataPath, wake: Wake) -> None:
    """Wake the loop when an offload is not as it has to be: the kernel says only that something of a device changed."""
    for offload in path.desired.offloads.values():
        with contextlib.suppress(KernelError):  # the device is gone, which is announced too
            if ethtool.tx_checksums(offload.link) is not offload.on:
                wake("offload")


def linux() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdecimal()) or 0)
