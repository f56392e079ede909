"""Many reasons, one turn of the loop; and what is wrong, by part."""

from __future__ import annotations

import asyncio
import time

from flanneld.problems import Problems
from flanneld.wake import Wake


async def test_all_reasons_that_came_are_handed_over_once_in_their_order() -> None:
    wake = Wake()
    began = time.monotonic()
    for reason in ("link", "route", "link"):
        wake(reason)
    reasons = await wake.wait(1)
    assert reasons.names == ("link", "route")
    assert began <= reasons.since <= time.monotonic()
    assert (await wake.wait(0)).names == ()


async def test_a_reason_during_the_wait_ends_it() -> None:
    wake = Wake()
    asyncio.get_running_loop().call_later(0.01, wake, "late")
    assert (await wake.wait(5)).names == ("late",)


async def test_a_reason_that_comes_during_a_turn_is_for_the_next_one() -> None:
    wake = Wake()
    wake("first")
    assert (await wake.wait()).names == ("first",)
    wake("second")
    assert (await wake.wait()).names == ("second",)


def test_a_part_is_ready_when_it_says_so_and_only_changes_are_told() -> None:
    told: list[list[str]] = []
    problems = Problems(lambda now: told.append(list(now)))
    kernel = problems.slot("kernel", "not set up yet")
    lease = problems.slot("lease")
    told.clear()
    kernel("not set up yet")
    assert told == []
    kernel(None)
    lease("lost")
    lease("lost")
    assert told == [[], ["lost"]]
    assert problems.now() == ["lost"]
