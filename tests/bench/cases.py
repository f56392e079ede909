"""The measurements. Each takes a plan and yields ``(metric, value)``; None = did not happen in time."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

from tests.bench.hollow import Peer
from tests.bench.stage import Command, Stage

Figures = Iterator[tuple[str, float | None]]

VOLLEY_PACKETS, VOLLEY_EVERY_S = 4, 0.01
VOLLEY_PEERS = 800
"""Peers that are sent volleys: each may occupy an entry of the neighbour table, which has room for 1024."""
QUIET_S = 1.0
"""How long no packet may be lost before we believe that none will be any more."""
ACTIVE_PEERS, MISS_SAMPLES, MISS_BURST, BURST = 100, 200, 1000, 1000
MISS_TIMEOUT_S = 5.0


class Settings(NamedTuple):
    """How much is done in one case."""

    timeout_s: float = 120.0
    puts: int = 200
    idle_s: float = 20.0
    settle_s: float = 1.0
    """Between the last entry and the reading of memory: what is only passing may pass."""


class Subject(NamedTuple):
    """What a case measures."""

    command: Command
    backend: str
    size: int
    settings: Settings


def life(subject: Subject) -> Figures:
    """A daemon's life among ``size`` leases: start, rest, one lease, a burst, all gone."""
    with Stage(subject.command, subject.backend, subject.size) as stage:
        yield from _start(stage, subject.settings)
        if not Peer.number(1).kernel_keys(subject.backend):
            yield from _idle(stage, subject.settings)
            return  # what follows cannot be seen from outside
        if subject.settings.idle_s:
            yield from _idle(stage, subject.settings)
        yield from _one_by_one(stage, subject.settings)
        yield from _burst(stage, subject.settings)
        yield from _delete(stage, subject.settings)


def _start(stage: Stage, settings: Settings) -> Figures:
    start = stage.start(settings.timeout_s, ready=stage.size > 10_000)
    yield "env", start.env_s
    if stage.size > 10_000:
        yield "ready", start.ready_s
    if stage.peers[0].kernel_keys(stage.backend):
        yield "programmed", start.programmed_s
        yield "cpu", start.cpu_s if start.programmed_s else None
        found = stage.entries()
        if start.programmed_s and found.routes != len(stage.peers):
            raise AssertionError(f"notifications and iproute2 disagree: {found.routes} of {len(stage.peers)} routes")
    time.sleep(settings.settle_s)
    yield "rss", stage.usage().rss_mib


def _idle(stage: Stage, settings: Settings) -> Figures:
    before, began = stage.usage().fine_cpu_s, time.monotonic()
    time.sleep(settings.idle_s)
    yield "idle", (stage.usage().fine_cpu_s - before) / (time.monotonic() - began) * 100


def _one_by_one(stage: Stage, settings: Settings) -> Figures:
    took_ms: list[float] = []
    first = stage.size + 2  # the daemon's own subnet may be any of the first size + 1
    for number in range(first, first + settings.puts):
        stage.watcher.clear()
        (peer,), sent = stage.add(number, 1)
        goal = stage.goal([peer])
        if not stage.wait(goal, settings.timeout_s):
            yield "one_p50", None
            return
        took_ms.append((goal.reached_ns - sent) / 1e6)
    yield "one_p50", percentile(took_ms, 50)
    yield "one_p99", percentile(took_ms, 99)


def _burst(stage: Stage, settings: Settings) -> Figures:
    stage.watcher.clear()
    added, sent = stage.add(stage.size + 2 + settings.puts, BURST)
    goal = stage.goal(added)
    yield "burst", (goal.reached_ns - sent) / 1e9 if stage.wait(goal, settings.timeout_s) else None


def _delete(stage: Stage, settings: Settings) -> Figures:
    """Delete the leases that were there at the start, after those that came since."""
    later = stage.peers[stage.size :]
    goal = stage.goal(later, present=False)
    stage.watcher.clear()
    stage.delete(later)
    if not stage.wait(goal, settings.timeout_s):
        yield "delete", None
        return
    goal = stage.goal(stage.peers, present=False)
    stage.watcher.clear()
    _, sent = stage.delete_all()
    yield "delete", (goal.reached_ns - sent) / 1e9 if stage.wait(goal, settings.timeout_s) else None


def reach(subject: Subject) -> Figures:
    """From which moment on no first packet is lost: volleys to peers never addressed before, while it starts."""
    with Stage(subject.command, subject.backend, subject.size) as stage:
        order = random.Random(subject.size).sample(stage.peers, min(len(stage.peers), VOLLEY_PEERS))
        wire, at = stage.wire, 0
        began = stage.launch()
        env_ns, good_since = 0, time.monotonic()
        deadline = time.monotonic() + subject.settings.timeout_s
        while not env_ns or time.monotonic() - good_since < QUIET_S:
            if time.monotonic() > deadline:
                yield "reach", None
                return
            volley = [wire.send(order[(at + i) % len(order)]) for i in range(VOLLEY_PACKETS)]
            at += VOLLEY_PACKETS
            wire.take(VOLLEY_EVERY_S)
            if not env_ns and stage.host.daemon.subnet_file.exists():
                env_ns = time.monotonic_ns()
            if not wire.left.keys() >= set(volley):
                good_since = time.monotonic()
            time.sleep(VOLLEY_EVERY_S / 2)
        wire.wait_left(range(len(wire.sent)), 0.5)
        lost = [number for number in range(len(wire.sent)) if number not in wire.left]
        reachable_ns = wire.sent[lost[-1] + 1][0] if lost else began
        yield "reach", (reachable_ns - began) / 1e9
        yield "reach_lag", max(0.0, (reachable_ns - env_ns) / 1e9)


def demand(subject: Subject) -> Figures:
    """Peers on demand: nothing is programmed before a packet asks for it."""
    with Stage(subject.command, subject.backend, subject.size, {"PageAhead": 0}) as stage:
        start = stage.start(subject.settings.timeout_s, ready=True, programmed=False)
        yield "paged_ready", start.ready_s
        time.sleep(subject.settings.settle_s)
        yield "paged_rss", stage.usage().rss_mib
        order = random.Random(1).sample(stage.peers, len(stage.peers))
        active, singles = order[:ACTIVE_PEERS], order[ACTIVE_PEERS : ACTIVE_PEERS + MISS_SAMPLES]
        stage.wire.wait_left([stage.wire.send(peer) for peer in active], MISS_TIMEOUT_S)
        yield "paged_entries", stage.entries().most()
        yield from _singles(stage, singles)


def _singles(stage: Stage, to: list[Peer]) -> Figures:
    wire = stage.wire
    numbers = []
    for peer in to:
        wire.take(0)
        numbers.append(wire.send(peer))
        if not wire.wait_left(numbers[-1:], MISS_TIMEOUT_S):
            yield "miss_p50", None
            return
    delays = [wire.delay_ms(number) for number in numbers]
    yield "miss_p50", percentile(delays, 50)
    yield "miss_p99", percentile(delays, 99)


def misses(subject: Subject) -> Figures:
    """A packet to each of 1000 peers at once, on a host that has addressed nobody before.

    The kernel's neighbour table has room for 1024 entries of all namespaces together, so other work on the
    machine can make it lose packets here.
    """
    with Stage(subject.command, subject.backend, subject.size, {"PageAhead": 0}) as stage:
        stage.start(subject.settings.timeout_s, ready=True, programmed=False)
        time.sleep(subject.settings.settle_s)
        wire = stage.wire
        numbers = [wire.send(peer) for peer in stage.peers[:MISS_BURST]]
        answered = wire.wait_left(numbers, MISS_TIMEOUT_S)
        yield "misses", (max(wire.left.values()) - wire.sent[0][0]) / 1e6 if answered else None
        yield "misses_lost", sum(number not in wire.left for number in numbers)


def percentile(values: list[float], percent: float) -> float:
    """The value that ``percent`` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
