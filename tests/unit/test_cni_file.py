"""The CNI configuration in a directory it shares with others: real files, real inotify (failure F35)."""

# ruff: noqa: ASYNC240  # the files of these tests are on tmpfs or as good as, and nobody else waits
from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flanneld.model.addr import Prefix
from flanneld.model.cni_conf import render
from flanneld.model.subnet_env import SubnetEnv
from flanneld.report import held_file
from flanneld.report.cni_file import CniFile, first_conf
from tests.support.wait import until


def conf(mtu: int, form: str = "bridge") -> bytes:
    env = SubnetEnv(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.72.0/24"), None, None, mtu, True)
    return render(form, env)


RIGHT = conf(1450)
FOREIGN = json.dumps({"name": "mine", "cniVersion": "1.0.0", "plugins": [{"type": "macvlan"}]}).encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.d" / "10-flannel.conflist"


@asynccontextmanager
async def held(
    path: Path, wanted: Callable[[], bytes | None] = lambda: RIGHT
) -> AsyncIterator[tuple[CniFile, list[str]]]:
    lines: list[str] = []
    file = CniFile(path)
    task = asyncio.create_task(file.hold(wanted, lambda line, _times: lines.append(line)))
    try:
        yield file, lines
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_right(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == RIGHT


def in_directory(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}


@pytest.fixture
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repaired now was noticed by its event."""
    monkeypatch.setattr(held_file, "CHECK_S", 3600.0)


class TestWriting:
    async def test_directory_and_file_are_made_and_nothing_else(self, path: Path) -> None:
        async with held(path) as (file, lines):
            assert file.problem == "the CNI configuration is not written yet"
            await until(lambda: is_right(path) and not file.problem)
        assert in_directory(path) == {path.name: RIGHT}
        assert [entry.stat().st_mode & 0o7777 for entry in (path.parent, path)] == [0o755, 0o644]
        assert lines == []

    async def test_nothing_is_written_while_there_is_no_subnet(self, path: Path) -> None:
        known: list[bytes] = []
        asked: list[int] = []

        def wanted() -> bytes | None:
            asked.append(1)
            return known[0] if known else None

        async with held(path, wanted):
            await until(lambda: len(asked) > 1)
            assert not path.parent.exists()
            known.append(RIGHT)
            await until(lambda: is_right(path))

    async def test_new_mtu_is_taken_soon_and_is_no_damage(self, path: Path) -> None:
        wanted = [conf(1400)]
        async with held(path, lambda: wanted[0]) as (_, lines):
            await until(lambda: path.is_file() and path.read_bytes() == conf(1400))
            wanted[0] = RIGHT
            await until(lambda: is_right(path))
        assert lines == []

    async def test_event_loop_turns_while_the_disk_takes_its_time(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk queue keeps fsync for seconds; meanwhile the daemon answers the kernel and its watchdog."""
        release = threading.Event()
        synced = os.fsync

        def slow(fd: int) -> None:
            assert release.wait(10)
            synced(fd)

        monkeypatch.setattr(os, "fsync", slow)
        async with held(path):
            await until(lambda: path.parent.is_dir() and os.listdir(path.parent))
            assert not path.exists()
            release.set()
            await until(lambda: is_right(path))

    async def test_directory_in_its_place_is_a_problem_with_a_remedy(self, path: Path) -> None:
        path.mkdir(parents=True)
        async with held(path) as (file, _):
            sentence = f"write the CNI configuration {path}: Is a directory (a directory is in its place; remove that)"
            await until(lambda: file.problem == sentence)
            path.rmdir()
            await until(lambda: is_right(path) and not file.problem, 6)


class TestRepair:
    @pytest.mark.parametrize(
        ("damage", "line"),
        [
            (Path.unlink, "was deleted"),
            (lambda path: os.truncate(path, 40), "was truncated"),
            (lambda path: path.write_bytes(FOREIGN), "was changed by somebody else"),
        ],
    )
    @pytest.mark.usefixtures("no_timer")
    async def test_damage_is_repaired_at_once_with_one_line(
        self, path: Path, damage: Callable[[Path], None], line: str
    ) -> None:
        async with held(path) as (file, lines):
            await until(lambda: is_right(path) and not file.problem)
            damage(path)
            await until(lambda: lines)
            assert is_right(path)
            assert lines == [f"10-flannel.conflist {line}: written again"]


class TestOthersFiles:
    async def test_foreign_file_of_that_name_is_kept_under_a_name_that_runtimes_ignore(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.parent.mkdir()
        path.write_bytes(FOREIGN)
        path.chmod(0o600)
        async with held(path):
            await until(lambda: is_right(path))
        assert in_directory(path) == {path.name: RIGHT, f"{path.name}.old": FOREIGN}
        assert path.with_name(f"{path.name}.old").stat().st_mode & 0o777 == 0o600
        assert first_conf(path.parent) == path.name
        [record] = caplog.records
        expected = f"CNI configuration held something else path={path} kept=10-flannel.conflist.old"
        assert (record.levelname, record.getMessage()) == ("WARNING", expected)

    @pytest.mark.parametrize("old", [conf(1300), conf(0, "flannel"), RIGHT[:40], b""])
    async def test_earlier_file_of_flannels_is_replaced_without_a_trace(self, path: Path, old: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(old)
        async with held(path):
            await until(lambda: is_right(path))
        assert in_directory(path) == {path.name: RIGHT}

    async def test_every_different_edit_is_kept_once_and_their_number_is_bounded(self, path: Path) -> None:
        path.parent.mkdir()
        file = CniFile(path)
        for turn in [0, 0, 1, 0, *range(2, 15)]:
            path.write_bytes(FOREIGN + b" " * turn)
            assert file.update(RIGHT)
            assert is_right(path)
        kept = {name: text for name, text in in_directory(path).items() if name != path.name}
        assert sorted(kept)[:2] == [f"{path.name}.old", f"{path.name}.old2"]
        assert sorted(kept.values()) == [FOREIGN + b" " * turn for turn in range(9)]

    async def test_symbolic_link_is_kept_as_one_and_its_target_is_spared(self, path: Path, tmp_path: Path) -> None:
        path.parent.mkdir()
        target = tmp_path / "theirs.conflist"
        target.write_bytes(FOREIGN)
        path.symlink_to(target)
        async with held(path):
            await until(lambda: is_right(path))
        assert target.read_bytes() == FOREIGN
        assert not path.is_symlink()
        assert path.with_name(f"{path.name}.old").readlink() == target

    async def test_link_to_a_file_that_says_the_same_is_left_alone(self, path: Path, tmp_path: Path) -> None:
        path.parent.mkdir()
        target = tmp_path / "theirs.conflist"
        target.write_bytes(RIGHT)
        path.symlink_to(target)
        async with held(path) as (file, _):
            await until(lambda: not file.problem)
        assert path.is_symlink()

    async def test_what_cannot_be_kept_is_not_replaced(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)  # a file system without hard links
        path.parent.mkdir()
        path.write_bytes(FOREIGN)
        async with held(path) as (file, _):
            await until(lambda: file.problem and "keep what stands in" in file.problem)
        assert in_directory(path) == {path.name: FOREIGN}

    async def test_file_that_runtimes_prefer_is_named_once_and_left_alone(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.parent.mkdir()
        other = path.with_name("05-other.conf")
        for name in ("99-later.conflist", "00-readme.txt", "01-old.conflist.bak"):
            path.with_name(name).write_bytes(b"x")
        async with held(path) as (file, _):
            await until(lambda: is_right(path) and not file.problem)
            assert caplog.records == []
            other.write_bytes(b"{}")
            await until(lambda: caplog.records)
            other.write_bytes(b"{ }")
            path.unlink()
            await until(lambda: is_right(path))
        [record] = caplog.records
        assert record.getMessage() == (
            f"containers get another network: runtimes take the first file of {path.parent}, 05-other.conf comes "
            "before 10-flannel.conflist; remove it or choose another --cni-conf-name, unless it passes pods on to ours"
        )
        assert other.read_bytes() == b"{ }"
        assert file.problem is None
