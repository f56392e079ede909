"""Back-off for whatever waits for somebody else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator


def backoff(first_s: float = 0.1, cap_s: float = 5.0, rand: Callable[[], float] = random.random) -> Iterator[float]:
    """Endless delays in seconds: doubling from ``first_s`` to ``cap_s``, each jittered down by up to half.

    The jitter keeps a cluster that lost its store from coming back in lockstep.
    """
    delay = first_s
    while True:
        yield delay * (1 - rand() / 2)
        delay = min(delay * 2, cap_s)
