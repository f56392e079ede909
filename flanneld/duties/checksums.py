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

FIRST_S = 2.0
"""Before the first walk: a start has better things to do."""

LOOK_SHARE = 0.003
"""Longest share of one processor that looks may take, as long as that does not make them rarer than ``RARELY_S``."""

RARELY_S = 30.0

CAN_ASK = (5, 8)
"""Since this Linux the table of connections can be asked for a few. Before 5.7 even packets without checksum suffer."""

CALM_S = 60.0
"""So long without another wrong checksum, and a streak is over."""

ENOUGH = 10
"""Wrong checksums in a streak that are worth a remark; anybody can send a few."""


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
        self._told = False
        self._cannot_ask = ""

    async def run(self) -> None:
        """Look for ever."""
        if self._release < CAN_ASK:
            await self.look()
        await asyncio.sleep(FIRST_S)
        while True:
            began = time.monotonic()
            await self.look()
            self._tell_arrivals()
            await asyncio.sleep(min(max(LOOK_S, (time.monotonic() - began) / LOOK_SHARE), RARELY_S))

    def _tell_arrivals(self) -> None:
        said, was_said = self._arrivals.look(self._path.tunnel_port), self._told
        self._remark(said)
        if said and not was_said:
            log.warning("%s", said)
        if was_said and not said:
            log.info("no more UDP datagrams with wrong checksums")
        self._told = said is not None

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
    """Counts datagrams that arrive with a wrong checksum, in streaks."""

    def __init__(
        self, count: Callable[[], int] = udp_counters.bad_checksums, now: Callable[[], float] = time.time
    ) -> None:
        self._count, self._now = count, now
        self._before = count()
        self._since = self._last = 0.0
        self._streak = 0

    def look(self, port: int) -> str | None:
        """Look once; returns what to say of it, or None."""
        bad, now = self._count(), self._now()
        rise, self._before = bad - self._before, bad
        if rise > 0:
            self._since = self._since if self._streak else now
            self._streak, self._last = self._streak + rise, now
        elif now - self._last > CALM_S:
            self._streak = 0
        return self._sentence(port) if self._streak >= ENOUGH else None

    def _sentence(self, port: int) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self._since))
        return (
            f"UDP datagrams arrive with wrong checksums and are dropped, {self._streak} since {since}: if they are for "
            f"port {port}, NAT on a peer or on the way spoils them; exempt that port there, or set "
            '"TxChecksum": "off" in the Backend'
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
