"""One measured host: a lab with etcd and hollow leases, and a daemon that can be started there.

Every measurement that begins with a start gets a new stage: no table, file or history of an earlier one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import count
from types import TracebackType
from typing import NamedTuple

from flanneld.errors import Unavailable
from flanneld.lab import Lab, LabSpec, netns
from flanneld.lab.etcd import CLIENT_PORT
from flanneld.lab.spec import underlay
from flanneld.model.addr import Family
from tests.bench.hollow import NETWORK, PEERS_NETWORK, SUBNET_LEN, SUBNETS_KEY, Peer, peers
from tests.bench.observe import Entries, Goal, Usage, Watcher, wait_for
from tests.bench.store import Store
from tests.bench.wire import Wire

_numbers = count(1)
POLL_S = 0.001
"""How exactly the appearance of a file is timed."""
READY_POLL_S = 0.01
LOOK_S = 0.5
"""How often we look whether the daemon still lives."""
DEFAULT_PAGE_AHEAD = 8192
SPARE_LEASES = 2000
"""Leases that a case may add to those present at the start."""


class Command(NamedTuple):
    """A flanneld to be measured."""

    label: str
    argv: tuple[str, ...]
    """Empty = the one of this installation."""


class Start(NamedTuple):
    """What a start took, in seconds; None for what did not come in time or cannot be seen."""

    env_s: float | None
    ready_s: float | None
    programmed_s: float | None
    cpu_s: float


def lab_name() -> str:
    """A new name for a lab of this process."""
    return f"b{os.getpid():x}x{next(_numbers):x}"[-10:]


class Stage:
    """A context manager; inside it the lab is up, without a daemon."""

    def __init__(self, command: Command, backend: str, size: int, settings: Mapping[str, object] | None = None) -> None:
        self.command, self.backend, self.size = command, backend, size
        conf: dict[str, object] = {"Type": backend}
        if backend == "vxlan" and size + SPARE_LEASES > DEFAULT_PAGE_AHEAD:
            conf["PageAhead"] = size + SPARE_LEASES  # all are to be programmed; Go flanneld ignores the key
        self.lab = Lab(
            LabSpec(
                lab_name(),
                hosts=1,
                backend={**conf, **(settings or {})},
                config={"Network": NETWORK, "SubnetLen": SUBNET_LEN},
                daemon=command.argv,
                ephemeral=True,
            )
        )
        self.host = self.lab.host(1)
        self.peers: list[Peer] = []

    def __enter__(self) -> Stage:
        self.lab.up(daemons=False)
        try:
            self._make_peers_reachable()
            spec = self.lab.spec
            self.store = Store(spec.netns("switch"), spec.member_address(1), CLIENT_PORT)
            self.watcher = Watcher(self.host.netns)
            self.wire = Wire(self.host.netns, "eth0", tunnelled=self.backend in ("vxlan", "udp"))
            self.add(1, self.size)
        except BaseException:
            self.lab.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part in ("store", "watcher", "wire"):
            if hasattr(self, part):
                getattr(self, part).close()
        self.lab.down()

    def _make_peers_reachable(self) -> None:
        """Give the hollow peers' public addresses a way out of eth0, and nothing else.

        A tunnel's outer packets go to the router, which swallows them: if it looked for the peers, its failed
        look-ups would fill the neighbour table, which all namespaces share (gc_thresh3, 1024 entries). host-gw
        needs its peers on the segment, where the router answers for them. Without a default route a packet
        that misses the tunnel cannot leave by accident.
        """
        router = underlay(0, 1, Family.V4)
        self.host.ip("route", "del", "default")
        if self.backend == "host-gw":
            self.host.ip("route", "add", PEERS_NETWORK, "dev", "eth0")
            self.lab.router.ip("route", "add", PEERS_NETWORK, "dev", "out")  # proxy ARP wants a way on
            # at once: proxies otherwise wait up to 0.8 s, to let the true owner answer first
            answer = {"ipv4/conf/seg0/proxy_arp": 1, "ipv4/neigh/seg0/proxy_delay": 0}
            netns.write_sysctls(self.lab.router.netns, answer)
        else:
            self.host.ip("route", "add", PEERS_NETWORK, "via", router)
            self.lab.router.ip("route", "add", "blackhole", PEERS_NETWORK)
        self.host.run("ping", "-c1", "-W2", router)  # the router's MAC is known when the first packet is timed

    # ---- leases ---------------------------------------------------------------------------------

    def add(self, first: int, number: int) -> tuple[list[Peer], int]:
        """Write leases of peers from number ``first`` on, sparing the daemon's own subnet.

        Returns:
            The peers, and the ``monotonic_ns`` at which the first request went out.
        """
        added = peers(first, number, but=self.own_subnet())
        self.peers += added
        return added, self.store.put_all((peer.key, peer.value(self.backend)) for peer in added)

    def delete_all(self) -> tuple[list[Peer], int]:
        """Delete all hollow leases at one revision.

        Returns:
            Their peers, and the ``monotonic_ns`` at which the request went out.
        """
        gone, self.peers = self.peers, []
        end = SUBNETS_KEY[:-1] + b"0"  # "0" follows "/"
        if own := self.own_key():
            return gone, self.store.delete_ranges([(SUBNETS_KEY, own), (own + b"\0", end)])
        return gone, self.store.delete_ranges([(SUBNETS_KEY, end)])

    def delete(self, gone: list[Peer]) -> None:
        """Delete some leases, 128 at a revision."""
        self.peers = [peer for peer in self.peers if peer not in set(gone)]
        self.store.delete(peer.key for peer in gone)

    def own_subnet(self) -> bytes:
        """The subnet that the daemon has leased, packed; empty while there is none."""
        gateway = self.host.subnet_env().get("FLANNEL_SUBNET", "")
        octets = gateway.partition("/")[0].split(".")
        return bytes([*map(int, octets[:3]), 0]) if len(octets) == 4 else b""

    def own_key(self) -> bytes:
        """Key of the daemon's own lease; empty while there is none."""
        subnet = self.own_subnet()
        return Peer(subnet, b"", b"").key if subnet else b""

    def goal(self, of: list[Peer], present: bool = True) -> Goal:
        """All kernel entries of some peers."""
        return Goal((key for peer in of for key in peer.kernel_keys(self.backend)), present)

    # ---- the daemon -----------------------------------------------------------------------------

    def launch(self) -> int:
        """Start the daemon; returns the ``monotonic_ns`` just before."""
        now = time.monotonic_ns()
        self.host.daemon.start()
        return now

    def start(self, timeout_s: float, ready: bool = False, programmed: bool = True) -> Start:
        """Start the daemon and time what becomes visible.

        Args:
            timeout_s: longest wait for all of it.
            ready: also ask ``/readyz``.
            programmed: wait for every peer's kernel entries.

        Raises:
            Unavailable: the daemon ended.
        """
        goal = self.goal(self.peers if programmed else [])
        began = self.launch()
        deadline = time.monotonic() + timeout_s
        env_ns = ready_ns = 0
        next_ask = next_look = 0.0
        while not (env_ns and goal.look(self.watcher) and (ready_ns or not ready)) and time.monotonic() < deadline:
            self.watcher.take(POLL_S)
            if not env_ns and self.host.daemon.subnet_file.exists():
                env_ns = time.monotonic_ns()
            if ready and not ready_ns and env_ns and time.monotonic() >= next_ask:
                status = self.host.daemon.ask("/readyz")[0]
                ready_ns = time.monotonic_ns() if status == 200 else 0
                ready = status != 404  # Go flanneld has no such page
                next_ask = time.monotonic() + READY_POLL_S
            if time.monotonic() >= next_look:
                self._must_run()
                next_look = time.monotonic() + LOOK_S
        cpu_s = self.usage().cpu_s
        return Start(
            _since(began, env_ns),
            _since(began, ready_ns),
            _since(began, goal.reached_ns),
            cpu_s,
        )

    def usage(self) -> Usage:
        """What the daemon and its children have used so far."""
        return Usage(self.host.netns)

    def entries(self) -> Entries:
        """What iproute2 finds in the kernel now."""
        return Entries(self.host)

    def wait(self, goal: Goal, timeout_s: float) -> bool:
        """Wait until a goal is reached; tells whether it was.

        Raises:
            Unavailable: the daemon ended.
        """
        deadline = time.monotonic() + timeout_s
        while not wait_for(self.watcher, goal, LOOK_S):
            self._must_run()
            if time.monotonic() > deadline:
                return False
        return True

    def _must_run(self) -> None:
        if not self.host.daemon.is_running():
            said = self.host.daemon.log().strip().splitlines()[-1:]
            raise Unavailable(f"the daemon ended; it said last: {' '.join(said)}")


def _since(began: int, at: int) -> float | None:
    return (at - began) / 1e9 if at else None
