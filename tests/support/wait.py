"""Wait for what a test claims will happen, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> None:
    """Return as soon as the condition is true; fail with what was waited for, and the last value, at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition} (last value {value!r})")
        await asyncio.sleep(0.005)


async def until_read(read: Callable[[], Awaitable[T]], right: Callable[[T], object], timeout_s: float = 20.0) -> T:
    """The same for what has to be asked for: return the first value that is right."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = await read()
        if right(value):
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: last value {value!r}")
        await asyncio.sleep(0.02)
