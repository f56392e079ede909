"""``flannelctl status`` and ``audit`` against a control socket: what others put into a sentence stays text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from flanneld.ctl.main import main
from flanneld.report.audit import Audit
from flanneld.report.control import Control, socket_path
from tests.support.wait import until

NASTY = "restored link flannel.1: its alias was 'a\u2028b\x85c\u202ed\x9b2Je\nf'"
"""Line ends that only some take for such, a mark that turns text around, a terminal code of one character."""


@pytest.fixture
async def subnet_file(tmp_path: Path) -> AsyncIterator[Path]:
    """A daemon's, which has made one repair."""
    file, audit = tmp_path / "subnet.env", Audit()
    audit.note("link", NASTY, by="evil\u2028[4711]")
    serving = asyncio.create_task(Control(socket_path(file), dict, audit).serve())
    await until(socket_path(file).exists, what="the socket")
    yield file
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def test_a_repair_is_one_line_whatever_its_object_was_called(
    subnet_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(main, ["audit", f"--subnet-file={subnet_file}"]) == 0
    head, line = capsys.readouterr().out.rstrip("\n").split("\n")
    assert head.split() == ["SEEN", "AFTER", "MS", "BY", "REPAIR"]
    assert line.isprintable()
    assert "its alias was" in line


async def test_json_for_programs_does_a_terminal_no_harm(subnet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["audit", f"--subnet-file={subnet_file}", "-o", "json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["text"] == NASTY
