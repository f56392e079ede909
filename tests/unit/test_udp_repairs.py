"""When the maps of the udp backend are looked at: at once for a reason, now and then without one, never too often."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from backends import udp_repairs
from backends.udp_repairs import MapWatch, Repairs
from flanneld.contracts import Surroundings
from flanneld.errors import KernelError
from tests.support.wait import until


class Host:
    """Maps that can be wrong, a pump that can be asked for strays, and who is told."""

    def __init__(self) -> None:
        self.wrong = 0
        self.looks = 0
        self.refusal: KernelError | None = None
        self.armed = self.failures = 0
        self.told: list[str] = []
        self.remarks: list[Sequence[str]] = []
        self.reasons: list[str] = []

    def is_filled(self) -> bool:
        self.looks += 1
        if self.refusal:
            raise self.refusal
        return not self.wrong

    def mend(self) -> int:
        mended, self.wrong = self.wrong, 0
        return mended

    def arm(self) -> None:
        self.armed += 1

    def fail(self) -> None:
        self.failures += 1

    # a part of Surroundings
    def look(self, reason: str) -> None:
        self.reasons.append(reason)

    def repaired(self, text: str) -> None:
        self.told.append(text)

    def remark(self, sentences: Sequence[str]) -> None:
        self.remarks.append(sentences)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reason nobody looks."""
    monkeypatch.setattr(udp_repairs, "LOOK_S", 3600.0)


def watch(host: Host) -> MapWatch:
    return MapWatch(host, Repairs(cast(Surroundings, host)), host.arm, host.fail)


async def test_without_any_reason_it_is_looked_now_and_then(host: Host) -> None:
    maps = watch(host)
    maps.look()
    host.wrong = 3
    await until(lambda: host.told)
    assert host.told == ["restored 3 entries of the udp data path's maps: somebody had changed them"]
    maps.close()


@pytest.mark.usefixtures("slow")
async def test_a_packet_that_came_the_slow_way_is_a_reason_to_look_at_once(host: Host) -> None:
    maps = watch(host)
    maps.look()
    for _ in range(3):
        host.told.clear()
        armed, host.wrong = host.armed, 1
        maps.stray()
        await until(lambda: host.told)
        assert host.armed > armed, "the next one is heard of again"
    maps.close()


@pytest.mark.usefixtures("slow")
async def test_packets_that_take_the_slow_way_for_a_reason_of_theirs_cost_a_bounded_number_of_looks(host: Host) -> None:
    maps = watch(host)
    maps.look()
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < began + 0.3:
        maps.stray()
        await asyncio.sleep(0.001)
    assert host.looks < 15
    maps.close()


@pytest.mark.usefixtures("slow")
async def test_a_kernel_that_cannot_be_asked_is_told_and_not_asked_on_and_on(host: Host) -> None:
    maps = watch(host)
    host.refusal = KernelError("read BPF map flannel_peers", 1)
    with pytest.raises(KernelError):
        maps.look()
    assert not maps.is_waiting
    maps.stray()
    await until(lambda: host.failures)
    assert not maps.is_waiting
    host.refusal = None
    maps.look()
    assert maps.is_waiting
    maps.close()


async def test_what_a_closed_pump_still_says_is_not_heard(host: Host) -> None:
    maps = watch(host)
    maps.close()
    maps.stray()
    assert not maps.is_waiting


@pytest.mark.usefixtures("slow")
async def test_a_program_that_undoes_each_repair_is_held_back_and_named(host: Host) -> None:
    maps = watch(host)

    def vandal() -> bool:
        host.wrong = 1
        maps.stray()
        return bool(host.remarks)

    await until(vandal)
    [[remark]] = host.remarks
    assert "changes the udp data path's maps again and again" in remark
    assert "stop that program" in remark
    assert len(host.told) < 40
    maps.close()
