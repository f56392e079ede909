"""``python -m tests.faults``: makes every fault in every cluster where it can happen, and prints what it cost."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from flanneld.errors import FlannelError
from tests.conftest import missing
from tests.faults.bed import Bed
from tests.faults.cases import CASES, TOOLS
from tests.faults.fault import Fault
from tests.faults.inject import Result, inject, others_changed
from tests.faults.registry import FAULTS, rows
from tests.faults.report import markdown, text, to_json, verdict


def main(argv: Sequence[str]) -> int:
    """Run, print and write; returns the exit status, 0 when every row is as it must be."""
    given = _flags(argv)
    if os.geteuid() != 0:
        print("faults are made in network namespaces, so this must run as root", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    wanted = [row for row in rows() if _is_wanted(given, *row)]
    results: list[Result] = []
    began, load = time.time(), os.getloadavg()[0]
    interrupted = False
    try:
        for result in run(wanted, given.rounds, given.daemon):
            results.append(result)
            print(f"  {result.fault.name}, {result.case}: {verdict(result)}", file=sys.stderr, flush=True)
            for complaint in result.complaints[1:10]:
                print(f"      {complaint}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        interrupted = True
    head = [
        f"Reproduce with: {_command(argv)}",
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.release()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after, "
        f"{time.time() - began:.0f} s",
        f"{given.rounds} rounds of each, median / worst. Traffic: 1000 packets a second each way; time counts from the "
        "fault, or from when the underlay carries again",
    ]
    print(json.dumps(to_json(results), indent=1) if given.json else text(results, head))
    if given.out:
        given.out.write_text(markdown(results, head))
    return 1 if interrupted or not all(result.is_green for result in results) else 0


def _command(argv: Sequence[str]) -> str:
    """What brings this about, wherever the table is written to."""
    words = [word for at, word in enumerate(argv) if not {*argv[at - 1 : at], word.partition("=")[0]} & {"--out"}]
    return f'make faults ARGS="{shlex.join(words)}"' if words else "make faults"


def run(wanted: Sequence[tuple[Fault, str]], rounds: int, daemon: Sequence[str] = ()) -> Iterator[Result]:
    """Make faults, one cluster at a time; a cluster that a fault has spoilt is built anew.

    Args:
        wanted: faults and clusters, the clusters one after another.
        rounds: how often each is made.
        daemon: command of another flanneld; empty = ours.
    """
    for case, group in groupby(wanted, key=lambda row: row[1]):
        if lack := next(filter(None, map(missing, (*TOOLS, *CASES[case].needs))), ""):
            print(f"{case}: left out, this machine lacks {lack}", file=sys.stderr)
            continue
        print(case, file=sys.stderr, flush=True)
        with contextlib.ExitStack() as stack:
            bed: Bed | None = None
            for fault, _ in group:
                try:
                    bed = bed or stack.enter_context(Bed(case, daemon=tuple(daemon)))
                    result = inject(bed, fault, rounds)
                except FlannelError as error:
                    result = Result(fault, case, (), (str(error),))
                if not result.is_green:
                    stack.close()
                    bed = None
                last = result
                yield result
            if bed is not None and (changed := others_changed(bed)):
                yield last._replace(complaints=("at the end of all faults", *changed))


def _is_wanted(given: argparse.Namespace, fault: Fault, case: str) -> bool:
    names = (fault.name, *fault.failures, *(("table",) if fault.in_table else ()))
    return (not given.only or any(word in names for word in given.only)) and case in (given.backend or CASES)


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", metavar="FAULT", help='a name, a number such as F30, or "table"; may be repeated')
    add("--backend", type=_words, metavar="NAME,...", help=f"clusters, of {', '.join(CASES)}")
    add("--rounds", type=int, default=3, metavar="N", help="how often each fault is made (default 3)")
    add("--daemon", type=shlex.split, default=[], metavar="CMD", help="another flanneld, such as Go's, instead of ours")
    add("--json", action="store_true", help="every round of every row, for programs")
    add("--out", type=Path, metavar="FILE", help="write the table as Markdown too")
    given = parser.parse_args(argv)
    known = {name for fault in FAULTS for name in (fault.name, *fault.failures)} | {"table"}
    for word in given.only or ():
        if word not in known:
            parser.error(f"--only: there is no fault {word!r}; there are: {', '.join(sorted(known))}")
    for word in given.backend or ():
        if word not in CASES:
            parser.error(f"--backend: there is no cluster {word!r}; there are: {', '.join(CASES)}")
    return given


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
