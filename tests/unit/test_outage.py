from __future__ import annotations

import logging

import pytest

from flanneld.sources.outage import Outage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outage(clock: Clock, caplog: pytest.LogCaptureFixture) -> Outage:
    caplog.set_level(logging.INFO)
    return Outage(logging.getLogger("test"), "etcd is away", "etcd is back", clock=clock)


def fail_for(outage: Outage, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        outage.failed("connection refused")
        clock.now += 1


def test_a_streak_has_a_line_at_its_start_and_one_at_its_end(
    outage: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fail_for(outage, clock, 30)
    outage.over()
    assert caplog.messages == [
        "etcd is away failures=1 for_s=0.0 reason=connection refused",
        "etcd is back after_s=30.0 failures=30",
    ]


def test_a_day_of_failures_is_told_in_some_thirty_lines(
    outage: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures F26."""
    fail_for(outage, clock, 24 * 3600)
    assert 20 < len(caplog.messages) < 40
    assert caplog.messages[1] == "etcd is away failures=61 for_s=60.0 reason=connection refused"


def test_something_that_flaps_is_told_at_most_once_a_minute(
    outage: Outage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(600):
        fail_for(outage, clock, 1)
        outage.over()
    assert len(caplog.messages) <= 2 * 10


def test_success_without_failure_says_nothing(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.over()
    assert not caplog.messages
