"""Settings of our devices are looked at, as their change is announced to nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from flanneld.contracts import DataPath
from flanneld.duties.settings import SettingsWatch
from flanneld.kernel import procfs
from flanneld.wake import Wake

SETTING = "net/ipv4/neigh/flannel.1/app_solicit"


class Woken(Wake):
    """A wake-up that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def proc_sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(procfs, "PROC_SYS", tmp_path)
    (tmp_path / SETTING).parent.mkdir(parents=True)
    return tmp_path


def watch(wanted: Mapping[str, str], woken: Woken) -> SettingsWatch:
    return SettingsWatch(cast(DataPath, SimpleNamespace(desired=SimpleNamespace(sysctls=wanted))), woken)


def test_a_wrong_value_wakes_and_one_that_stays_wakes_less_and_less_often(proc_sys: Path) -> None:
    woken = Woken()
    settings = watch({SETTING: "3"}, woken)
    for value, wakings in (("3", 0), ("0", 1), ("0", 2), ("0", 2), ("0", 3), ("1", 4), ("3", 4), ("1", 5)):
        (proc_sys / SETTING).write_text(f"{value}\n")
        settings.look()
        assert len(woken.reasons) == wakings, value
    for _ in range(3600):
        settings.look()
    assert len(woken.reasons) < 20


def test_a_setting_that_is_not_there_is_no_reason_to_look(proc_sys: Path) -> None:
    woken = Woken()
    watch({SETTING: "3"}, woken).look()
    assert not woken.reasons
