"""``python -m tests.bench``: flags in, cases run, tables and plots out."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import backends
import flanneld
from flanneld.errors import FlannelError
from tests.bench.cases import Settings, Subject, demand, life, misses, reach
from tests.bench.kube import kube
from tests.bench.metrics import METRICS
from tests.bench.plot import plots
from tests.bench.report import Results, figure, markdown, text
from tests.bench.stage import Command
from tests.bench.throughput import PATHS, throughput

NAMES = {
    "life": "start, CPU, memory, one lease, burst, deletion, at each of --sizes",
    "reach": "packets lost while it starts, at the largest of --sizes",
    "big": "as life, at --big leases",
    "demand": "vxlan peers on demand, at --big leases",
    "misses": "1000 vxlan misses at once, at --big leases",
    "kube": "start, memory and CPU among Kubernetes nodes of 20 KiB each, at the largest of --sizes",
    "throughput": "TCP through the overlay, against the same devices set up by hand",
}
BIG, QUICK_BIG = 50_000, 5000
EPILOG = "measurements: " + "; ".join(f"{name}: {what}" for name, what in NAMES.items())


class Job(NamedTuple):
    """One case to run once."""

    what: str
    daemon: str
    backend: str
    size: int
    run: Callable[[], Iterator[tuple[str, float | None]]]


def main(argv: Sequence[str]) -> int:
    """Measure, print and write; returns the exit status."""
    given = _flags(argv)
    if os.geteuid() != 0:
        print("the benchmark builds network namespaces and so must run as root", file=sys.stderr)
        return 1
    commands = [Command("ours", ())] * all(command.label != "ours" for command in given.daemon) + given.daemon
    _compile()
    results = Results([command.label for command in commands])
    began, load = time.time(), os.getloadavg()[0]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        for turn in range(1, given.rounds + 1):
            for job in _jobs(given, commands):
                _run(job, results, f"round {turn} of {given.rounds}")
    except KeyboardInterrupt:
        results.failures.append("the rest, because the run was interrupted")
    head = [
        f"Reproduce with: python -m tests.bench {shlex.join(argv)}".rstrip(),
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.release()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after, "
        f"{time.time() - began:.0f} s",
        f"Median of {given.rounds} rounds, smallest and largest beside it; Go (reference) was measured elsewhere",
    ]
    print(text(results, head))
    if given.out:
        _write(results, head, given.out)
    return 1 if results.failures else 0


def _compile() -> None:
    """Byte-compile what is measured, as pip does when it installs; a checkout may never have been.

    Compiling costs a start 100 ms, on every start where PYTHONDONTWRITEBYTECODE is set.
    """
    for package in (backends, flanneld):
        for directory in package.__path__:
            compileall.compile_dir(directory, quiet=2)


def _jobs(given: argparse.Namespace, commands: Sequence[Command]) -> Iterator[Job]:
    """All that one round does; daemons take turns inside, so that they meet the same machine."""
    settings = Settings(given.timeout, 50, 5.0) if given.quick else Settings(given.timeout)
    subjects: list[tuple[str, Callable[[Subject], Iterator[tuple[str, float | None]]], str, int]] = []
    for backend in given.backend:
        subjects += [("life", life, backend, size) for size in given.sizes]
        subjects += [("reach", reach, backend, max(given.sizes))] if backend != "alloc" else []
        subjects += [("kube", kube, backend, max(given.sizes))]
        subjects += [("big", life, backend, given.big)]
        if backend == "vxlan":
            subjects += [("demand", demand, backend, given.big), ("misses", misses, backend, given.big)]
    for name, case, backend, size in subjects:
        if name in given.only and not (given.quick and name == "big"):
            for command in commands:
                subject = Subject(command, backend, size, settings)
                yield Job(name, command.label, backend, size, lambda case=case, subject=subject: case(subject))  # type: ignore[misc]
    if "throughput" in given.only:
        for name, path in PATHS.items():
            if name.partition("/")[0] in given.backend:
                for command in commands:
                    yield Job("throughput", command.label, name, 0,
                              lambda command=command, path=path: throughput(command, path))  # type: ignore[misc]  # fmt: skip


def _run(job: Job, results: Results, turn: str) -> None:
    """Run one job and take its figures; one that fails is reported and does not stop the others."""
    title = f"{turn}: {job.what}, {job.daemon}, {job.backend}" + (f", {job.size} leases" if job.size else "")
    print(title, file=sys.stderr, flush=True)
    try:
        for name, value in job.run():
            results.add((name, job.backend, job.size), job.daemon, value)
            print(f"  {METRICS[name].title}: {figure(value)} {METRICS[name].unit}", file=sys.stderr, flush=True)
    except (FlannelError, AssertionError, OSError) as error:
        results.failures.append(f"{title}: {error}")
        print(f"  failed: {error}", file=sys.stderr, flush=True)


def _write(results: Results, head: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pictures = dict(plots(results))
    for name, svg in pictures.items():
        (out / name).write_text(svg)
    (out / "bench.md").write_text(markdown(results, head, list(pictures)))
    report = {"about": head, "results": list(results.to_json()), "not_measured": results.failures}
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {out}/bench.md, bench.json, {', '.join(pictures) or 'no plots (they need two sizes)'}")


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.bench", description="Benchmark of flanneld.", epilog=EPILOG)
    add = parser.add_argument
    add(
        "--daemon",
        action="append",
        type=_command,
        default=[],
        metavar="[NAME=]CMD",
        help="measured beside ours; NAME ours replaces it",
    )
    add("--backend", type=_words, default=["vxlan"], metavar="TYPE,...", help="vxlan, host-gw, udp, alloc")
    add("--sizes", type=_sizes, default=[100, 1000, 5000], metavar="N,...", help="leases present at the start")
    add("--big", type=int, metavar="N", help=f"leases of the big cases (default {BIG}, quick {QUICK_BIG})")
    add("--rounds", type=int, metavar="N", help="how often everything is done (default 3, quick 1)")
    add("--only", type=_words, default=list(NAMES), metavar="NAME,...", help=f"of {', '.join(NAMES)}")
    add("--out", type=Path, metavar="DIR", help="write bench.md, bench.json and plots there")
    add("--timeout", type=float, default=120.0, metavar="S", help="longest wait for one thing (default 120)")
    add("--quick", action="store_true", help="one round, fewer puts, no start with 50 000 leases programmed")
    given = parser.parse_args(argv)
    given.rounds = given.rounds or (1 if given.quick else 3)
    given.big = given.big or (QUICK_BIG if given.quick else BIG)
    if unknown := set(given.only) - set(NAMES):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    return given


def _command(text: str) -> Command:
    named = re.match(r"([\w.-]+)=(.+)", text)
    label, command = named.groups() if named else (Path(text.split()[0]).name, text)
    return Command(label, tuple(shlex.split(command)))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _sizes(text: str) -> list[int]:
    return sorted({int(word) for word in _words(text)})


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
