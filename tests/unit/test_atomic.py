"""What a killed writer leaves behind goes with the next start, what a living one is at stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flanneld.report.atomic import remove_leftovers, write_atomic

KILLED = """
import os, sys
from pathlib import Path
from flanneld.report import atomic
def stop(*_):
    print("written", flush=True)
    sys.stdin.read()
atomic.os.rename = stop
atomic.write_atomic(Path(sys.argv[1]), b"half", "the file")
"""


@pytest.fixture
def writer(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that is about to rename its temporary file."""
    argv = [sys.executable, "-c", KILLED, str(tmp_path / "subnet.env")]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"written\n"
    return process


def test_leftovers_of_a_killed_writer_go(tmp_path: Path, writer: subprocess.Popen[bytes]) -> None:
    write_atomic(tmp_path / "subnet.env", b"whole", "the file")
    remove_leftovers(tmp_path, "subnet.env")
    assert len(os.listdir(tmp_path)) == 2, "it lives"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    remove_leftovers(tmp_path, "other.env")
    assert len(os.listdir(tmp_path)) == 2, "another's"
    remove_leftovers(tmp_path, "subnet.env")
    assert os.listdir(tmp_path) == ["subnet.env"]
    assert (tmp_path / "subnet.env").read_bytes() == b"whole"


def test_names_that_are_not_of_our_making_stay(tmp_path: Path) -> None:
    names = {".subnet.env.swp", "subnet.env.abcdefgh", ".subnet.env", ".subnet.env.ABCDEFGH", ".x.subnet.env.abcdefgh"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".subnet.env.abcdefgh").mkdir()
    remove_leftovers(tmp_path, "subnet.env")
    assert set(os.listdir(tmp_path)) == names | {".subnet.env.abcdefgh"}
    remove_leftovers(tmp_path / "nowhere", "subnet.env")
