"""Wait for what a test claims will happen, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> None:
    """Return as soon as the condition is true; fail with what was waited for, and the last value, at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition} (last value {value!r})")
        await asyncio.sleep(0.005)
