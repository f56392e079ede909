"""The file itself, on a real file system with real inotify: contract 4.3 to 4.6, failure F35."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from flanneld.errors import KernelError
from flanneld.model.addr import Prefix
from flanneld.model.subnet_env import PreviousEnv, SubnetEnv
from flanneld.report import held_file
from flanneld.report.atomic import write_atomic
from flanneld.report.subnet_file import SubnetFile
from tests.support.wait import until


def env(mtu: int) -> bytes:
    return SubnetEnv(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.72.0/24"), None, None, mtu, True).render()


RIGHT = env(1450)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None  # reading a pipe would wait
    except OSError:
        return None


@contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


@asynccontextmanager
async def held(file: SubnetFile, wanted: Callable[[], bytes | None] = lambda: RIGHT) -> AsyncIterator[list[str]]:
    lines: list[str] = []
    task = asyncio.create_task(file.hold(wanted, lambda line, _times: lines.append(line)))
    try:
        yield lines
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flannel" / "subnet.env"


class TestUpdate:
    @pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
    def test_new_file_and_directories_have_flannels_modes_whatever_the_umask(self, tmp_path: Path, mask: int) -> None:
        path = tmp_path / "a" / "b" / "subnet.env"
        with umask(mask):
            assert SubnetFile(path).update(RIGHT)
        assert path.read_bytes() == RIGHT
        assert [mode(p) for p in (path, path.parent, path.parent.parent)] == [0o644, 0o755, 0o755]

    def test_mode_of_an_existing_file_is_kept(self, path: Path) -> None:
        file = SubnetFile(path)
        file.update(RIGHT)
        path.chmod(0o640)
        file.update(env(1400))
        assert path.read_bytes() == env(1400)
        assert mode(path) == 0o640

    def test_file_that_is_right_is_left_alone(self, path: Path) -> None:
        SubnetFile(path).update(RIGHT)
        before = path.stat()
        SubnetFile(path).update(RIGHT)
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_symbolic_link_is_replaced_and_its_target_spared(self, path: Path, tmp_path: Path) -> None:
        path.parent.mkdir()
        target = tmp_path / "precious"
        target.write_bytes(b"x")
        target.chmod(0o600)
        path.symlink_to(target)
        assert SubnetFile(path).update(RIGHT)
        assert not path.is_symlink()
        assert mode(path) == 0o644
        assert target.read_bytes() == b"x"

    def test_nothing_but_the_file_is_left_in_the_directory(self, path: Path) -> None:
        file = SubnetFile(path)
        for mtu in range(1000, 1010):
            file.update(env(mtu))
        path.unlink()
        path.mkdir()
        assert not file.update(RIGHT)
        assert os.listdir(path.parent) == ["subnet.env"]

    @pytest.mark.parametrize(
        ("spoil", "sentence"),
        [
            (lambda path: path.mkdir(parents=True), "Is a directory (a directory is in its place; remove that)"),
            (
                lambda path: path.parent.write_text(""),
                "Not a directory (part of its path is not a directory)",
            ),
        ],
    )
    def test_refusal_is_one_sentence_with_remedy(
        self, path: Path, spoil: Callable[[Path], None], sentence: str
    ) -> None:
        spoil(path)
        file = SubnetFile(path)
        assert not file.update(RIGHT)
        assert file.problem == f"write the subnet file {path}: {sentence}"
        with pytest.raises(KernelError) as caught:
            write_atomic(path, RIGHT, "the subnet file")
        assert str(caught.value) == file.problem

    def test_problem_ends_when_the_file_can_be_written(self, path: Path) -> None:
        path.mkdir(parents=True)
        file = SubnetFile(path)
        file.update(RIGHT)
        assert file.problem
        path.rmdir()
        assert file.update(RIGHT)
        assert file.problem is None

    def test_reader_in_a_loop_never_sees_a_missing_or_half_file(self, path: Path) -> None:
        """The CNI plugin reads whenever a container starts."""
        texts = [env(1000), env(1001) + b"# longer\n" * 1000]
        file = SubnetFile(path)
        file.update(texts[0])
        stop = threading.Event()
        seen: dict[bytes | None, int] = {}

        def read() -> None:
            while not stop.is_set():
                found = content(path)
                seen[found] = seen.get(found, 0) + 1

        reader = threading.Thread(target=read)
        reader.start()
        for turn in range(200):
            file.update(texts[turn % 2])
        stop.set()
        reader.join()
        assert set(seen) <= set(texts)
        assert sum(seen.values()) > 50


class TestPrevious:
    def test_earlier_runs_subnet_is_read_back(self, path: Path) -> None:
        SubnetFile(path).update(RIGHT)
        expected = PreviousEnv(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.72.0/24"))
        assert SubnetFile(path).previous() == expected

    def test_no_file_no_previous_subnet(self, path: Path) -> None:
        assert SubnetFile(path).previous() == PreviousEnv()
        path.mkdir(parents=True)
        assert SubnetFile(path).previous() == PreviousEnv()

    def test_pipe_in_its_place_does_not_block_the_start(self, path: Path) -> None:
        path.parent.mkdir()
        os.mkfifo(path)
        assert SubnetFile(path).previous() == PreviousEnv()


def garbage(path: Path) -> None:
    path.write_bytes(b"FLANNEL_NETWORK=192.168.0.0/16\n")


def renamed_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"#")
    other.rename(path)


def remove_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def move_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is repaired now was noticed by its event."""
    monkeypatch.setattr(held_file, "CHECK_S", 3600.0)


class TestHold:
    async def strike(self, path: Path, damage: Callable[[Path], None], lines: list[str], expected: list[str]) -> None:
        damage(path)
        await until(lambda: lines == expected, what=f"the lines {expected}")
        assert content(path) == RIGHT
        shutil.rmtree(path.parent.with_name("elsewhere"), ignore_errors=True)

    @pytest.mark.parametrize(
        ("damage", "line"),
        [
            (Path.unlink, "subnet.env was deleted: written again"),
            (lambda path: os.truncate(path, 0), "subnet.env was truncated: written again"),
            (lambda path: os.truncate(path, 30), "subnet.env was truncated: written again"),
            (garbage, "subnet.env was changed by somebody else: written again"),
            (renamed_over, "subnet.env was changed by somebody else: written again"),
            (lambda path: path.rename(path.with_name("x")), "subnet.env was deleted: written again"),
            (remove_directory, "subnet.env was deleted: written again"),
            (move_directory, "subnet.env was deleted: written again"),
            (fifo, "subnet.env became unreadable (not a regular file): written again"),
        ],
    )
    @pytest.mark.usefixtures("no_timer")
    async def test_damage_is_repaired_at_once_with_one_line(
        self, path: Path, damage: Callable[[Path], None], line: str
    ) -> None:
        file = SubnetFile(path)
        file.update(RIGHT)
        async with held(file) as lines:
            await asyncio.sleep(0)  # let it begin
            await self.strike(path, damage, lines, [line])
            # the second time: the watch is still, or again, in place
            await self.strike(path, damage, lines, [line, line])
            assert file.problem is None

    @pytest.mark.usefixtures("no_timer")
    async def test_ten_damages_in_a_row_are_each_undone_and_told_at_once(self, path: Path) -> None:
        """The audit once kept the sixth time to itself until all was quiet, five seconds later."""
        file = SubnetFile(path)
        file.update(RIGHT)
        async with held(file) as lines:
            await asyncio.sleep(0)  # let it begin
            for number in range(1, 11):
                os.unlink(path)
                await until(lambda: len(lines) == number, 3.0, f"the line about repair {number}")  # noqa: B023
                assert content(path) == RIGHT
            assert file.fight is None

    async def test_file_of_an_earlier_run_is_brought_up_to_date_without_alarm(self, path: Path) -> None:
        SubnetFile(path).update(env(1000))
        async with held(SubnetFile(path)) as lines:
            await until(lambda: content(path) == RIGHT)
            assert lines == []

    async def test_new_content_is_taken_without_alarm(self, path: Path) -> None:
        wanted = [RIGHT]
        file = SubnetFile(path)
        async with held(file, lambda: wanted[0]) as lines:
            await until(lambda: content(path) == RIGHT)
            wanted[0] = env(1400)
            file.update(env(1400))
            assert content(path) == env(1400)
            wanted[0] = env(1300)
            await until(lambda: content(path) == env(1300), what="the new answer of content()")
            assert lines == []

    async def test_file_is_left_alone_while_nothing_is_known(self, path: Path) -> None:
        SubnetFile(path).update(env(1000))
        known: list[bytes] = []
        asked: list[int] = []

        def wanted() -> bytes | None:
            asked.append(1)
            return known[0] if known else None

        async with held(SubnetFile(path), wanted) as lines:
            garbage(path)
            await until(lambda: len(asked) > 1)
            assert content(path) not in (None, RIGHT)
            known.append(RIGHT)
            await until(lambda: content(path) == RIGHT)
            assert lines == []

    async def test_refusal_is_a_problem_until_it_ends(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        file = SubnetFile(path)
        file.update(RIGHT)
        async with held(file):
            directory_instead(path)
            await until(lambda: file.problem, 1, "the problem")
            os.rmdir(path)
            await until(lambda: content(path) == RIGHT and file.problem is None, 6, "the end of the problem")
        assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]

    async def test_somebody_who_breaks_it_for_ever_costs_a_bounded_amount(self, path: Path) -> None:
        """1 s of damage without pause: repaired about fifteen times, the processor stays idle, few lines."""
        file = SubnetFile(path)
        file.update(RIGHT)
        looks: list[float] = []

        def wanted() -> bytes:
            looks.append(time.monotonic())
            return RIGHT

        stop = threading.Event()
        repaired = 0

        def vandal() -> None:
            nonlocal repaired
            while not stop.wait(0.0005):
                if content(path) == RIGHT:
                    repaired += 1
                    path.unlink(missing_ok=True)

        async with held(file, wanted) as lines:
            thread = threading.Thread(target=vandal)
            thread.start()
            start = time.monotonic()
            await until(lambda: time.monotonic() - start > 1)
            stop.set()
            thread.join()
            assert 2 <= repaired <= 20
            assert len(looks) <= 110
            assert len(lines) <= 11
            assert file.fight is not None
            assert "again and again" in file.fight
            assert "stop that program" in file.fight
            await until(lambda: content(path) == RIGHT, 1, "the repair after the last damage")

    async def test_quiet_directory_is_hardly_looked_at(self, path: Path) -> None:
        file = SubnetFile(path)
        file.update(RIGHT)
        looks: list[float] = []

        def wanted() -> bytes:
            looks.append(time.monotonic())
            return RIGHT

        async with held(file, wanted):
            start = time.monotonic()
            await until(lambda: time.monotonic() - start > 1.5)
        assert len(looks) <= 4

    async def test_nothing_stays_open_afterwards(self, path: Path) -> None:
        before = set(os.listdir("/proc/self/fd"))
        file = SubnetFile(path)
        async with held(file):
            await until(lambda: content(path) == RIGHT)
        assert set(os.listdir("/proc/self/fd")) == before
