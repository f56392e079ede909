"""Who made a change: a name, or that he is gone, or no more than what is known."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flanneld.kernel.culprit import INIT_PID_NAMESPACE, who
from tests.support.live import until

pytestmark = pytest.mark.skipif(
    os.stat("/proc/self/ns/pid").st_ino != INIT_PID_NAMESPACE, reason="pids are not the machine's here"
)


def test_a_process_that_lives_is_named_and_one_that_ended_is_said_to_have() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            until(lambda: who(process.pid) == f"sleep[{process.pid}]", "its name")
        finally:
            process.kill()
    assert who(process.pid) == f"pid {process.pid}, which has ended"


def test_a_process_that_is_hidden_from_us_is_not_said_to_have_ended(tmp_path: Path) -> None:
    """``/proc`` mounted with hidepid, as ``ProtectProc=invisible`` does for a unit with ``User=``."""
    (tmp_path / "self").symlink_to("/proc/self")
    assert who(os.getppid(), tmp_path) == f"pid {os.getppid()}"


def test_a_port_that_is_no_pid_tells_nothing() -> None:
    assert who(0) == who(1 << 31) == ""
