"""File systems that refuse, for real: read-only, full, covered by a mount (failures F35, F37).

Each claim runs in a mount namespace of its own process, so nothing outside sees the mounts::

    unshare --mount ─ sh: mounts ─ python: the code under test, prints what the operator would read
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

HOLD = """
import asyncio, pathlib, subprocess, sys
from flanneld.report.subnet_file import SubnetFile
from tests.support.wait import until
path = pathlib.Path(sys.argv[1]) / "run" / "subnet.env"
file = SubnetFile(path)
file.update(b"A=1\\n")
def is_right(): return path.is_file() and path.read_bytes() == b"A=1\\n"
async def main():
    task = asyncio.create_task(file.hold(lambda: b"A=1\\n", lambda line, _times: print(line, flush=True)))
    await asyncio.sleep(0)
    await body(path, file)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
def sh(line): subprocess.run(["sh", "-ec", line], check=True)
"""


def inside(tmp_path: Path, mounts: str, code: str) -> str:
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    script = f'{mounts}\nexec "$PYTHON" -c "$CODE" {tmp_path}'
    environment = {"PYTHON": sys.executable, "CODE": code, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "T": str(tmp_path)}
    done = subprocess.run([*argv, script], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_read_only_proc_sys_is_named_as_the_cause(tmp_path: Path) -> None:
    told = inside(
        tmp_path,
        "mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys",
        "from flanneld.kernel import procfs\n"
        "from flanneld.errors import KernelError\n"
        "from flanneld.model.addr import Family\n"
        "path = procfs.conf(Family.V4, 'lo', 'accept_local')\n"
        "procfs.write(path, procfs.read(path))\n"
        "try: procfs.write(path, 7)\n"
        "except KernelError as exc: print(exc)\n",
    )
    assert "accept_local: Read-only file system (/proc/sys is read-only here, as in a container" in told


def test_hidden_br_netfilter_is_a_warning_and_nothing_more(tmp_path: Path) -> None:
    told = inside(
        tmp_path,
        "mount -t tmpfs none /proc/sys/net",
        "from flanneld.kernel import procfs\n"
        "from flanneld.model.addr import Family\n"
        "print(*procfs.warnings([Family.V4], 'eth0', iptables=True), sep='\\n')\n",
    )
    assert "modprobe br_netfilter" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("refuse", "accept", "reason"),
    [
        ("mount -o remount,ro $T/run", "mount -o remount,rw $T/run", "Read-only file system (mount its file system"),
        ("dd if=/dev/zero of=$T/run/fill bs=4k status=none || :", "rm $T/run/fill", "No space left on device (its"),
    ],
)
def test_problem_is_told_and_ends_by_itself(tmp_path: Path, refuse: str, accept: str, reason: str) -> None:
    body = f"""
async def body(path, file):
    path.write_bytes(b"")
    sh({refuse!r})  # before the loop runs again
    await until(lambda: file.problem)
    print(file.problem)
    sh({accept!r})
    await until(lambda: is_right() and not file.problem, 6)
asyncio.run(main())
"""
    told = inside(tmp_path, "mkdir $T/run; mount -t tmpfs -o size=16k none $T/run", HOLD + body)
    assert reason in told
    assert len(told.splitlines()) == 1


def test_file_comes_back_after_a_mount_over_its_directory(tmp_path: Path) -> None:
    """No inotify event tells of it: the timer does."""
    told = inside(
        tmp_path,
        "mkdir $T/run",
        HOLD
        + """
async def body(path, file):
    sh("mount -t tmpfs none $T/run")
    await until(is_right)
    path.unlink()
    await until(is_right)
asyncio.run(main())
""",
    )
    assert told == "subnet.env was deleted: written again\n" * 2
