"""Runs our daemon under a sampling profiler; takes the place of a daemon command of the benchmark.

``python -m tests.bench --only life --sizes 5000 --rounds 1 --daemon "profiled=python -m tests.bench.profile FILE"``
then ``python -m tests.bench.profile FILE ...`` shows where CPU time went. The kernel's profiling timer counts CPU
time, kernel time included, so what a system call costs is found at the line that made it; it is as fine as the
kernel's tick (4 ms with HZ=250), so add up several starts before believing small figures.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
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
                found = [[*stack, count] for stack, count in list(stacks.items())]
                fresh.write_text(json.dumps({"cpu_s": time.process_time(), "stacks": found}))
                fresh.replace(file)

    file.unlink(missing_ok=True)
    threading.Thread(target=write, daemon=True).start()
    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, TICK_S, TICK_S)
    return flanneld(argv)


def show(files: Sequence[Path]) -> None:
    """Print functions by the CPU time in them and all that they call, on average of some recorded runs."""
    inclusive: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    total = 0
    runs = [json.loads(file.read_text()) for file in files]
    cpu_ms = sum(run["cpu_s"] for run in runs) * 1000 / len(runs)
    for *stack, count in (stack for run in runs for stack in run["stacks"]):
        total += count
        lines[stack[0]] += count
        for function in {frame.rpartition(":")[0] for frame in stack}:
            inclusive[function] += count
    print(f"{cpu_ms:.0f} ms of CPU time in {total} samples of {len(runs)} runs\n\nwith all they call:")
    for function, count in inclusive.most_common(SHOWN):
        print(f"{count / total * cpu_ms:6.0f} ms {count / total:6.1%}  {function}")
    print("\nin the line itself:")
    for line, count in lines.most_common(SHOWN):
        print(f"{count / total * cpu_ms:6.0f} ms {count / total:6.1%}  {line}")


def _short(path: str) -> str:
    """A path without what all have in common."""
    for mark in ("site-packages/", f"python3.{sys.version_info.minor}/", f"{os.getcwd()}/"):
        _, found, rest = path.partition(mark)
        if found:
            return rest
    return path


if __name__ == "__main__":
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(record(Path(sys.argv[1]), sys.argv[2:]))
    show([Path(argument) for argument in sys.argv[1:]])
