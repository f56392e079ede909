"""Whether this machine has, and lets us use, the programs that ``deploy/bootstrap.sh --deploy`` installs.

Each is asked to do the least thing it is for: in a container they are often there and not allowed to work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GET = "get it with: deploy/bootstrap.sh --deploy"


def no_nspawn() -> str:
    # this machine's own file system, as it is below /usr, under an empty one
    words = "-q -D / --volatile=yes --register=no --keep-unit --private-network --pipe true"
    return _refused("systemd-nspawn", *words.split())


def no_buildah() -> str:
    with tempfile.TemporaryDirectory(prefix="flprobe-") as folder:
        stores = storage(Path(folder))
        return (
            _refused("buildah", *stores, "from", "--name", "flprobe", "scratch")
            # unmounts what the first mounted, so that the folder can go
            or _refused("buildah", *stores, "rm", "flprobe")
        )


def no_podman() -> str:
    if lack := _refused("runc", "--version"):
        return lack
    with tempfile.TemporaryDirectory(prefix="flprobe-") as folder:
        return _refused("podman", *storage(Path(folder)), "images")


def no_faketime() -> str:
    return _refused("faketime", "2030-01-01", "true")


def storage(folder: Path) -> list[str]:
    """Options that keep everything buildah or podman stores in one folder, which the two can share."""
    return [f"--root={folder}/store", f"--runroot={folder}/run"]


def no_module(name: str) -> str:
    """Why a Python package of the linters cannot be used; empty when it can."""
    return "" if importlib.util.find_spec(name) else f"no Python package {name}; {GET}"


def no_script(name: str) -> str:
    """The same for a program that a Python package put beside our interpreter."""
    return "" if Path(sys.executable).with_name(name).exists() else f"no {name}; {GET}"


def _refused(program: str, *words: str) -> str:
    if os.geteuid() != 0:
        return "not root"
    if not shutil.which(program):
        return f"no {program}; {GET}"
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return f"{program} {words[-1]}: {said[-1] if said else f'status {done.returncode}'}"
    return ""
