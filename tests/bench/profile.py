"""Runs our daemon under a sampling profiler; takes the place of a daemon command of the benchmark.

``python -m tests.bench --only life --sizes 5000 --rounds 1 --daemon "profiled=python -m tests.bench.profile FILE"``
then ``python -m tests.bench.profile FILE`` shows where CPU time went. The kernel's profiling timer ticks once a
millisecond of CPU time, kernel time included, so what a system call costs is found at the line that made it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from flanneld.cli import main as flanneld

TICK_S = 0.001
WRITE_EVERY_S = 0.5
DEEPEST = 60
SHOWN = 45


def record(file: Path, argv: list[str]) -> int:
    """Run the daemon, writing what has been sampled every half second: it may be killed at any time."""
    stacks: Counter[tuple[str, ...]] = Counter()

    def sample(_number: int, frame: FrameType | None) -> None:
        stack: list[str] = []
        while frame is not None and len(stack) < DEEPEST:
            code = frame.f_code
            stack.append(f"{_short(code.co_filename)}:{code.co_qualname}:{frame.f_lineno}")
            frame = frame.f_back
        stacks[tuple(stack)] += 1

    def write() -> None:
        written = 0
        while True:
            time.sleep(WRITE_EVERY_S)
            if (total := stacks.total()) != written:
                written = total
                fresh = file.with_suffix(".new")
                fresh.write_text(json.dumps([[*stack, count] for stack, count in list(stacks.items())]))
                fresh.replace(file)

    file.unlink(missing_ok=True)
    threading.Thread(target=write, daemon=True).start()
    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, TICK_S, TICK_S)
    return flanneld(argv)


def show(file: Path) -> None:
    """Print functions by the share of samples in them and all that they call."""
    inclusive: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    total = 0
    for *stack, count in json.loads(file.read_text()):
        total += count
        lines[stack[0]] += count
        for function in {frame.rpartition(":")[0] for frame in stack}:
            inclusive[function] += count
    print(f"{total} samples of 1 ms CPU time\n\nwith all they call:")
    for function, count in inclusive.most_common(SHOWN):
        print(f"{count:6} ms {count / total:6.1%}  {function}")
    print("\nin the line itself:")
    for line, count in lines.most_common(SHOWN):
        print(f"{count:6} ms {count / total:6.1%}  {line}")


def _short(path: str) -> str:
    """A path without what all have in common."""
    for mark in ("site-packages/", f"python3.{sys.version_info.minor}/", f"{os.getcwd()}/"):
        _, found, rest = path.partition(mark)
        if found:
            return rest
    return path


if __name__ == "__main__":
    if len(sys.argv) == 2:
        show(Path(sys.argv[1]))
    else:
        sys.exit(record(Path(sys.argv[1]), sys.argv[2:]))
