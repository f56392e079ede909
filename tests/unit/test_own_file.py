"""Reading what lies where a file of ours should: nothing that lies there keeps us waiting, or costs a descriptor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.report.own_file import read_file, read_own

READERS: list[Callable[[Path], bytes]] = [read_own, lambda path: read_file(path, 64)]


@pytest.mark.parametrize("read", READERS, ids=["own", "anybody's"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_refused_and_let_go(
    tmp_path: Path, read: Callable[[Path], bytes], make: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    make(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises((OSError, ValueError)):
        read(path)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("read", READERS, ids=["own", "anybody's"])
def test_a_file_is_read(tmp_path: Path, read: Callable[[Path], bytes]) -> None:
    (tmp_path / "file").write_bytes(b"text\n")
    assert read(tmp_path / "file") == b"text\n"
