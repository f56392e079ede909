"""The coverage-guided fuzzer: ``python -m tests.fuzz.guided [TARGET …] [--seconds N]``, or ``make fuzz-guided``.

libFuzzer (through atheris) changes inputs and keeps those that reach new code, so it finds what random bytes do not.
An input that goes wrong is written to ``tests/fuzz/corpus/TARGET``; there ``test_targets.py`` runs it with every
other test, so it stays fixed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS

SECONDS = 60
SLOWEST_S = 5
"""For one input."""
MEMORY_MIB = 1024
LONGEST_BYTES = 8192

_CHILD = """
import sys
import atheris
with atheris.instrument_imports(include=["flanneld", "backends", "h11", "yaml"]):
    from tests.fuzz.targets import TARGETS
name, *flags = sys.argv[1:]
atheris.Setup([sys.argv[0], *flags], TARGETS[name].call)
atheris.Fuzz()
"""
"""Runs in a process of its own, because libFuzzer ends the one that it runs in."""


def main() -> int:
    """Fuzz some targets, one after the other; returns 1 when one of them went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description="Look for inputs that go wrong.")
    parser.add_argument("target", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target, default {SECONDS}")
    options = parser.parse_args()
    if unknown := set(options.target) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    wrong = [name for name in options.target or TARGETS if not fuzz(name, options.seconds)]
    print(f"inputs that went wrong are in {CORPUS}: {', '.join(wrong)}" if wrong else "nothing went wrong")
    return 1 if wrong else 0


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target; tells whether all went well, and keeps what did not."""
    kept = CORPUS / name
    with tempfile.TemporaryDirectory(prefix="flanneld-fuzz-") as scratch:
        seeds, found = Path(scratch, "seeds"), Path(scratch, "found")
        seeds.mkdir()
        found.mkdir()
        for number, seed in enumerate(TARGETS[name].seeds):
            (seeds / str(number)).write_bytes(seed)
        flags = [
            f"-max_total_time={seconds}",
            f"-timeout={SLOWEST_S}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-max_len={LONGEST_BYTES}",
            f"-artifact_prefix={found}/",
            str(seeds),
            *([str(kept)] if kept.is_dir() else []),
        ]
        argv = [sys.executable, "-c", _CHILD, name, *flags]
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
        for path in found.iterdir():
            kept.mkdir(parents=True, exist_ok=True)
            (kept / path.name).write_bytes(path.read_bytes())
    counts = [line for line in done.stderr.splitlines() if line.startswith("#") and "cov:" in line][-1:]
    print(f"{name:<15} {'ok' if done.returncode == 0 else 'WRONG'}  {' '.join(counts)}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
