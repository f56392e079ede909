"""What tests of live labs share: waiting, a stream of pings, everybody reaching everybody."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable

from flanneld.lab import Lab
from flanneld.lab.probe import egress_source, full_size_ping, ping_matrix
from flanneld.model.addr import Family

DEADLINE_S = 30.0
"""For what takes a moment on a machine with nothing else to do."""
ON_DEMAND = {"Type": "vxlan", "PageAhead": 0}


def until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Wait for a condition, or fail with the words."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def assert_all_pods_connected(lab: Lab) -> None:
    """Every pod reaches every other with its first packet and with full-size ones, and the outside, masqueraded."""
    for family in lab.spec.families:
        outcomes = ping_matrix(lab, family)
        assert {pair for pair, outcome in outcomes.items() if outcome.lost} == set()
        for peer in range(2, len(lab.hosts) + 1):
            size, outcome = full_size_ping(lab, 1, peer, family)
            assert outcome.lost == 0, f"{size} bytes of {family.label} to pod{peer}"
        for host in lab.hosts:
            assert egress_source(lab, host.number, family) == host.address(family)


class Stream:
    """A ping from one pod to another, a hundred a second, while something happens."""

    def __init__(self, lab: Lab, family: Family | None = None, *, source: int = 1, target: int = 2) -> None:
        argv = ["ping", "-n", "-i", "0.01", "-W", "1", lab.host(target).pod_address(family)]
        self._ping = subprocess.Popen(lab.host(source).pod.command(*argv), stdout=subprocess.PIPE, text=True)
        assert self._ping.stdout is not None
        self._ping.stdout.readline()  # its headline
        self._ping.stdout.readline()  # the first answer: now it flows

    def lost(self) -> int:
        """Stop; how many packets stayed without an answer."""
        self._ping.send_signal(signal.SIGINT)
        rest, _ = self._ping.communicate(timeout=DEADLINE_S)
        counts = re.search(r"(\d+) packets transmitted, (\d+) received", rest)
        assert counts is not None
        sent, received = map(int, counts.groups())
        # the last one may still have been on its way
        return max(0, sent - received - 1)
