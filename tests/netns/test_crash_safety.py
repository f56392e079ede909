"""Killed before whatever it does, the daemon comes back to the right state, and nobody notices (failures F45).

A sample here; ``python -m tests.support.crashes`` does all of it, ``CRASH_POINTS`` and ``RESTARTS`` set the size.
"""

from __future__ import annotations

import os

import pytest

from tests.support.crashes import BACKENDS, crash_everywhere, restart

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

POINTS = int(os.environ.get("CRASH_POINTS", "3"))
"""In each of four phases of each backend."""
RESTARTS = int(os.environ.get("RESTARTS", "20"))


@pytest.mark.timeout(120 + 40 * POINTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_before_anything_it_does_it_ends_in_the_right_state_and_harms_nobody(backend: str) -> None:
    """Same subnet and kernel state as after an undisturbed start; no files, rules, devices or keys left over."""
    report = crash_everywhere(backend, POINTS)
    told = f"seed {report.seed}"
    assert [death for death in report.killed if death.complaints] == [], told
    reached = [death for death in report.killed if death.point != "(not reached)"]
    assert len(reached) >= len(report.killed) * 0.6, f"{told}: the daemon was hardly killed"
    assert sum(report.points.values()) > 50, "hardly any points were found"
    assert [outcome.lost() for outcome in report.bystanders] == [0], told
    assert {outcome.name: outcome.lost() for outcome in report.through} == {"pod1 to pod2": 0, "pod2 to pod1": 0}, told


@pytest.mark.timeout(60 + 3 * RESTARTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_restarts_by_sigterm_and_sigkill_lose_no_packet_of_a_thousand_a_second(backend: str) -> None:
    done = restart(backend, RESTARTS)
    assert {outcome.name: outcome.lost() for outcome in done.outcomes} == {
        "pod1 to pod2": 0,
        "pod2 to pod1": 0,
        "pod2 to pod3": 0,
    }
    assert all(outcome.sent > 500 * done.seconds for outcome in done.outcomes), "the probe itself did not run"
