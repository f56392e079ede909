"""Runs of several processes: what shares something stays together (tests/support/shards.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shards import ALONE, FAULTS, TOGETHER, scope

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*ALONE, FAULTS, TOGETHER])
def test_what_is_named_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", ALONE)
def test_a_file_whose_tests_may_be_apart_builds_nothing_for_all_of_them(name: str) -> None:
    assert 'scope="module"' not in (ROOT / name).read_text()


def test_tests_of_a_module_a_cluster_or_an_image_stay_together_and_long_ones_do_not_wait_for_each_other() -> None:
    assert scope("tests/netns/test_nft.py::TestPackets::test_a[x]") == scope("tests/netns/test_nft.py::test_b")
    assert scope(f"{FAULTS}::test_x[udp: device deleted]") == scope(f"{FAULTS}::test_x[udp: device down, then up]")
    assert scope(f"{FAULTS}::test_x[udp: device deleted]") != scope(f"{FAULTS}::test_x[udp basic: device deleted]")
    assert scope(f"{TOGETHER}test_pod.py::test_a") == scope(f"{TOGETHER}test_systemd.py::test_b")
    assert scope(f"{ALONE[0]}::test_a[1]") != scope(f"{ALONE[0]}::test_a[2]")
