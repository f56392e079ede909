"""Run one firewall tool: whole input on stdin, a deadline, one error type.

Never through a shell. Not for anything the daemon does in steady state: each call costs a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from asyncio.subprocess import PIPE, Process

from flanneld.errors import KernelError

_PACKAGES = {"nft": "nftables"}  # every other tool we run is in Debian's package iptables

SBIN = "/usr/sbin:/sbin"
"""Searched after PATH, which often lacks them under cron and sudo."""


def find(tool: str) -> str | None:
    """The path of a program, or None; looks into the sbin directories even when PATH lacks them."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")


async def run(*argv: str, stdin: str = "", timeout_s: float = 30.0) -> str:
    """Run a program to its end.

    Args:
        argv: the program's name and its arguments.
        stdin: its whole input.
        timeout_s: seconds after which it is killed; the xtables lock may be held by others for a while.

    Returns:
        What it wrote to standard output.

    Raises:
        KernelError: not installed, cannot be started, ended with a status other than 0, or killed at its deadline.
    """
    what = f"run {' '.join(argv)}"
    path = find(argv[0])
    if path is None:
        package = _PACKAGES.get(argv[0], "iptables")
        raise KernelError(what, errno.ENOENT, f"install it, on Debian: apt-get install {package}")
    try:
        # its own session, so that a wrapper script and its children can be killed together
        process = await asyncio.create_subprocess_exec(
            path, *argv[1:], stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True, env=_environment()
        )
    except OSError as exc:  # no room for a process or a descriptor: passes, and is no reason for anybody to end
        raise KernelError(what, exc.errno or 0) from exc
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin.encode())
    except TimeoutError as exc:
        raise KernelError(what, errno.ETIMEDOUT, f"killed after {timeout_s:g} s; is the xtables lock held?") from exc
    finally:
        await _kill(process)
    if process.returncode != 0:
        raise KernelError(what, 0, _first_sentence(err.decode(errors="replace")) or f"status {process.returncode}")
    return out.decode(errors="replace")


def _environment() -> dict[str, str]:
    """Ours without what is for us alone: etcd's password, and the way to systemd."""
    alone = ("FLANNELD_", "_FLANNELD_", "NOTIFY_SOCKET", "WATCHDOG_")
    return {name: value for name, value in os.environ.items() if not name.startswith(alone)}


async def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _first_sentence(err: str) -> str:
    lines = [line.strip() for line in err.splitlines() if line.strip() and not line.startswith("# Warning")]
    # iptables-nft-restore puts its name and version on a line of their own
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
