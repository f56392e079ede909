"""What only tells never ends the daemon, whatever happens to it."""

from __future__ import annotations

import asyncio

import pytest

from flanneld.errors import KernelError
from flanneld.watches import harmless
from tests.support.wait import until


class Watch:
    """Fails a few times, then works."""

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.works = asyncio.Event()

    async def run(self) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self.works.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    "failure",
    [KernelError("listen for kernel notifications", 24), OSError(24, "Too many open files"), KeyError("a defect")],
    ids=["refused", "limit", "defect"],
)
async def test_a_watch_that_fails_is_told_once_and_tried_again_and_all_else_goes_on(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(failure, failure)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(harmless("routing rules", watch.run, again_s=0.0))
        await until(watch.works.is_set, what="the watch")
        task.cancel()
    assert [record.getMessage() for record in caplog.records] == [
        "routing rules cannot be watched now, everything else goes on; trying again"
    ]


async def test_a_watch_that_has_nothing_to_watch_ends() -> None:
    async def nothing() -> None:
        return

    await harmless("certificates", nothing)
