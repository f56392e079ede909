"""Settings of our devices: what is written to them by others is heard of at once, and looked at now and then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from flanneld.contracts import DataPath
from flanneld.duties import settings
from flanneld.duties.settings import SettingsWatch
from flanneld.kernel import procfs
from flanneld.model.objects import Sysctl
from flanneld.wake import Wake
from tests.support.wait import until

SETTING = "net/ipv4/neigh/flannel.1/app_solicit"
OTHER = "net/ipv6/conf/flannel.1/accept_ra"


class Loop(Wake):
    """What the reconcile loop is told: full looks, and damage."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.damage: list[tuple[str, str, str]] = []

    def __call__(self, reason: str) -> None:
        self.looks += 1

    def damaged(self, want: Sysctl, instead: Sysctl) -> None:
        assert want.path == instead.path
        self.damage.append((want.path, want.value, instead.value))


@pytest.fixture
def proc_sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(procfs, "PROC_SYS", tmp_path)
    for path in (SETTING, OTHER):
        (tmp_path / path).parent.mkdir(parents=True)
    return tmp_path


@pytest.fixture
def loop() -> Loop:
    return Loop()


def watch(wanted: Mapping[str, str], loop: Loop) -> SettingsWatch:
    path = cast(DataPath, SimpleNamespace(desired=SimpleNamespace(sysctls=wanted)))
    return SettingsWatch(path, loop.damaged, loop)


@asynccontextmanager
async def running(duty: SettingsWatch) -> AsyncIterator[None]:
    task = asyncio.create_task(duty.run())
    try:
        await asyncio.sleep(0)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_what_never_was_right_is_a_reason_to_look_less_and_less_often(proc_sys: Path, loop: Loop) -> None:
    duty = watch({SETTING: "3"}, loop)
    for value, looks in (("0", 1), ("0", 2), ("0", 2), ("0", 3), ("1", 4)):
        (proc_sys / SETTING).write_text(f"{value}\n")
        duty.look()
        assert loop.looks == looks, value
    for _ in range(3600):
        duty.look()
    assert loop.looks < 20
    assert not loop.damage


def test_what_was_right_and_is_not_any_more_is_damage_once(proc_sys: Path, loop: Loop) -> None:
    duty = watch({SETTING: "3"}, loop)
    for value, times in (("3", 0), ("0", 1), ("0", 1), ("3", 1), ("1", 2)):
        (proc_sys / SETTING).write_text(f"{value}\n")
        duty.look()
        assert len(loop.damage) == times, value
    assert loop.damage == [(SETTING, "3", "0"), (SETTING, "3", "1")]
    assert loop.looks == 1, "it stayed wrong for a second look"


def test_a_setting_that_is_not_there_is_no_reason_to_look(proc_sys: Path, loop: Loop) -> None:
    watch({SETTING: "3"}, loop).look()
    assert not loop.looks
    assert not loop.damage


async def test_a_write_is_heard_of_without_waiting_for_the_next_look(
    proc_sys: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "LOOK_S", 3600.0)
    for path in (SETTING, OTHER):
        (proc_sys / path).write_text("3\n")
    async with running(watch({SETTING: "3", OTHER: "3"}, loop)):
        (proc_sys / OTHER).write_text("0\n")
        await until(lambda: loop.damage == [(OTHER, "3", "0")])
        (proc_sys / OTHER).write_text("3\n")
        (proc_sys / SETTING).write_text("7\n")
        await until(lambda: (SETTING, "3", "7") in loop.damage)


async def test_a_program_that_writes_without_end_costs_a_bounded_number_of_looks(proc_sys: Path, loop: Loop) -> None:
    (proc_sys / SETTING).write_text("3\n")
    duty = watch({SETTING: "3"}, loop)
    async with running(duty):
        end = asyncio.get_running_loop().time() + 0.5
        while asyncio.get_running_loop().time() < end:
            for value in ("3", "0"):
                (proc_sys / SETTING).write_text(value)
            await asyncio.sleep(0)
    assert 1 <= len(loop.damage) + loop.looks <= 30
