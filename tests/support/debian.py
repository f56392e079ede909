"""A small Debian to boot or to build an image on, made once by mmdebstrap and kept in ``CACHE``.

Twenty seconds and the Debian archive the first time; a copy of a file after that. Tests ask for the ``debian``
capability, so that a machine without mmdebstrap skips them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SUITE = "bookworm"
CACHE = Path(os.environ.get("FLANNELD_DEBIAN_DIR", Path.home() / ".cache" / "flanneld-debian"))
MAKING_S = 300.0


class NotMadeError(Exception):
    """No Debian could be made; the sentence says why."""


def lacking() -> str:
    """Why none can be made here; empty when one can."""
    if os.geteuid() != 0:
        return "not root"
    return "" if shutil.which("mmdebstrap") else "no mmdebstrap; get it with: deploy/bootstrap.sh --deploy"


def tarball(packages: Iterable[str] = (), suite: str = SUITE) -> Path:
    """A root file system as a tar file, with the smallest Debian and these packages in it.

    Args:
        packages: Debian packages beyond the essential ones and apt.
        suite: Debian's release by name.

    Raises:
        NotMadeError: mmdebstrap failed, most often because the Debian archive cannot be reached.
    """
    wanted = sorted(set(packages))
    key = hashlib.sha256(" ".join([suite, *wanted]).encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    made = CACHE / f"{suite}-{key}.tar"
    with (CACHE / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once make one
        if not made.exists():
            _make(made, wanted, suite)
    return made


def unpack(into: Path, packages: Iterable[str] = (), suite: str = SUITE) -> Path:
    """Unpack a root file system of one's own into a directory, which is made and given back."""
    into.mkdir(parents=True, exist_ok=True)
    # tar, which is three times as fast as tarfile
    subprocess.run(
        ["tar", "--numeric-owner", "-xpf", tarball(packages, suite), "-C", into], check=True, timeout=MAKING_S
    )
    return into


def _make(made: Path, packages: list[str], suite: str) -> None:
    unfinished = made.with_suffix(".part")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar", f"--include={','.join(packages)}"]
    try:
        done = subprocess.run(
            [*command, suite, str(unfinished)],
            capture_output=True,
            text=True,
            timeout=MAKING_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        unfinished.unlink(missing_ok=True)
        raise NotMadeError(f"mmdebstrap {suite}: {error}") from error
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise NotMadeError(f"mmdebstrap {suite} failed: {said[0] if said else 'it says nothing'}")
    unfinished.rename(made)
