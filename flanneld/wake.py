"""A coalescing wake-up: many reasons, one turn of the loop."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple


async def heard(event: asyncio.Event, within_s: float | None) -> bool:
    """Wait for an event, or for the time to pass; whether it was the event. None = for ever."""
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False


class Reasons(NamedTuple):
    """What woke the loop, and since when the first of it waits."""

    names: tuple[str, ...]
    """Each reason once, in order of arrival."""
    since: float
    """``time.monotonic`` of the first one, in seconds."""


class Wake:
    """Collects reasons until the loop comes round. Reasons are hints: the loop reads the truth itself."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._reasons: dict[str, None] = {}
        self._since = 0.0

    def __call__(self, reason: str) -> None:
        """Note a reason; cheap, and safe from any callback of the loop's thread."""
        if not self._reasons:
            self._since = time.monotonic()
        self._reasons[reason] = None
        self._event.set()

    async def wait(self, timeout_s: float | None = None) -> Reasons:
        """Wait for at least one reason, or for the time to pass; then hand over all that have come.

        Returns:
            The reasons; none of them when the time ran out.
        """
        if not await heard(self._event, timeout_s):
            return Reasons((), time.monotonic())
        self._event.clear()
        names, self._reasons = tuple(self._reasons), {}
        return Reasons(names, self._since)
