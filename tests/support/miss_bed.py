"""One host with everything that answers misses, and a real peer, in two namespaces.

fl-miss-…  eth0 198.18.0.1 ─────veth───── eth0 198.18.0.2  fl-miss-peer-…
           flannel.1: ours                flannel.1: made with iproute2 as any flannel makes it
           10.244.1.0/32                  10.244.2.0/32, and 10.244.2.7 as a container
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from flanneld.duties.hints import HintFilter
from flanneld.duties.pager import Pager
from flanneld.kernel.listen import SO_RCVBUFFORCE, HintListener, MissListener
from flanneld.kernel.rtnl import Rtnl
from flanneld.model.lease import Lease
from tests.scenario.world import Host, peer
from tests.support.netns import Netns, join

SCAN = """
import ipaddress, socket, sys, time
begun = time.monotonic()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for address in ipaddress.ip_network(sys.argv[1]):
        try:
            sock.sendto(b"x", (str(address), 9))
        except OSError:
            continue  # "no route to host", which is the right answer for most
print(time.monotonic() - begun)
"""

CONTAINER = "10.244.2.7"

Scenario = Callable[["Bed"], Coroutine[Any, Any, None]]


class Bed:
    """A reconcile loop with its listeners, on an event loop inside the namespace."""

    def __init__(self, ns: Netns, other: Netns, page_ahead: int, idle_limit_s: float) -> None:
        self.ns, self.other = ns, other
        self.kernel = Rtnl()
        self.fast = self.kernel.sibling()
        index = socket.if_nametoindex("eth0")
        self.host = Host(self.kernel, index, page_ahead=page_ahead, idle_limit_s=idle_limit_s)
        self.path = self.host.path
        self.news: list[Lease] | None = None
        """What the store holds and its watch has not told yet."""
        reconciler = self.host.reconciler
        self.pager = Pager(
            self.fast, self.path, self.host.table, self.host.wake, self._catch_up, reconciler.take_leases
        )
        self.overruns = 0
        self.misses = MissListener(self.pager.answer, self._overrun)
        own_ports = frozenset({self.kernel.port_id, self.fast.port_id})
        self.hints = HintListener(
            HintFilter(self.path, reconciler.damaged, self.host.wake, self.host.wake),
            self._overrun,
            own_ports,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def _catch_up(self) -> bool:
        news, self.news = self.news, None
        if news is not None:
            self.host.lease(news)
        return news is not None

    def _overrun(self) -> None:
        self.overruns += 1
        self.host.wake("overrun")

    def start(self, *, hints: bool = True) -> None:
        """Listen and reconcile from now on."""
        self.misses.start()
        if hints:
            self.hints.start()
        self._tasks = [asyncio.create_task(duty) for duty in (self.host.reconciler.run(), self.pager.refuse())]

    def stop(self) -> None:
        """As a killed daemon: everything stays as it is."""
        for task in self._tasks:
            task.cancel()
        self.misses.close()
        self.hints.close()
        self.kernel.close()
        self.fast.close()

    async def sh(self, command: str, *, where: Netns | None = None) -> str:
        """Run a shell command on our host without blocking the loop; its output, whatever its status."""
        return await asyncio.to_thread((where or self.ns).run, "sh", "-c", command, check=False)

    async def begin(self, leases: list[Lease], *, hints: bool = True) -> None:
        """Take these leases, make the kernel right, then listen."""
        self.host.lease(leases)
        await self.host.settle()
        self.start(hints=hints)

    async def scan(self, network: str) -> float:
        """Send a datagram to every address of a network, as fast as it goes; how long it took, in seconds."""
        took = await asyncio.to_thread(self.ns.run, sys.executable, "-c", SCAN, network)
        return float(took)

    async def ping(self, target: str = CONTAINER, count: int = 1, *more: str) -> str:
        """The output of ping on our host."""
        words = " ".join(("ping -n -i 0.01 -W 1", *more))
        return await self.sh(f"{words} -c {count} {target}")


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[Netns, Netns]]:
    """Our host's and the peer's, connected; the peer has its whole vxlan, ours has nothing yet."""
    with Netns("fl-miss") as ns, Netns("fl-miss-peer") as other:
        join(ns, "eth0", other, "eth0")
        ns.run("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        script = f"""
            ip addr add 198.18.0.2/24 dev eth0
            ip link add flannel.1 type vxlan id 1 dev eth0 local 198.18.0.2 dstport 8472 nolearning
            ip link set flannel.1 address 02:00:00:00:00:02
            ip addr add 10.244.2.0/32 dev flannel.1
            ip addr add {CONTAINER}/32 dev lo
            ip link set flannel.1 mtu 1450 up
            bridge fdb add 02:00:00:00:00:01 dev flannel.1 dst 198.18.0.1
            ip neigh add 10.244.1.0 lladdr 02:00:00:00:00:01 nud permanent dev flannel.1
            ip route add 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink
        """
        other.run("sh", "-e", stdin=script)
        yield ns, other


def play(scenario: Scenario, *, page_ahead: int = 0, idle_limit_s: float = 300.0) -> None:
    """Play a scenario on a fresh bed."""
    with namespaces() as (ns, other):

        async def inside() -> None:
            bed = Bed(ns, other, page_ahead, idle_limit_s)
            try:
                await scenario(bed)
            finally:
                bed.stop()

        ns.exec_async(inside)


def peers(first: int, last: int) -> list[Lease]:
    """Leases of hosts ``first`` to ``last``; only number 2 is really there."""
    return [peer(number) for number in range(first, last + 1)]


def receiver(other: Netns, address: str = CONTAINER, port: int = 9) -> socket.socket:
    """A datagram socket at the peer; what arrives waits in a large buffer until ``received`` takes it."""

    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        sock.setblocking(False)
        sock.bind((address, port))
        return sock

    return other.call(bound)


def received(sock: socket.socket) -> list[int]:
    """The numbers in the datagrams that have arrived."""
    numbers = []
    with contextlib.suppress(BlockingIOError):
        while True:
            numbers.append(int(sock.recv(64)))
    return numbers
