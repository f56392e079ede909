"""However many warnings somebody causes, the log shows the first ones and tells how many more there were."""

from __future__ import annotations

import logging

import pytest

from flanneld import flood
from flanneld.flood import BURST, COUNT_S, REFILL_S, Flood
from tests.support.wait import until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_warnings_are_lines_and_the_rest_is_a_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    some = Flood(logging.getLogger("x"), "keys that are no leases", clock=clock)
    for number in range(BURST + 50_000):
        some.line("bad key=%d", number)
    assert len(caplog.messages) == BURST
    some.tell()
    some.tell()
    assert caplog.messages[BURST:] == ["and 50000 more keys that are no leases; flannelctl leases shows all"]
    clock.now += 3 * REFILL_S
    for number in range(5):
        some.line("later key=%d", number)
    assert [line for line in caplog.messages if line.startswith("later")] == [f"later key={n}" for n in range(3)]


async def test_the_count_comes_by_itself(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert COUNT_S > 1
    monkeypatch.setattr(flood, "COUNT_S", 0.01)
    some = Flood(logging.getLogger("x"), "keys")
    for number in range(BURST + 7):
        some.line("bad key=%d", number)
    await until(lambda: len(caplog.messages) > BURST)
    assert caplog.messages[-1].startswith("and 7 more keys")
