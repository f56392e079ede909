"""A minute of faults at random, the same each time; by hand others and longer: ``make chaos``, ``CHAOS_SEED=N``."""

from __future__ import annotations

import os

import pytest

from tests.faults.cases import TOOLS
from tests.faults.chaos import attack

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs(*TOOLS), pytest.mark.timeout(300)]


def test_a_cluster_survives_faults_at_random() -> None:
    seed = int(os.environ.get("CHAOS_SEED", "5"))
    told: list[str] = []
    report = attack(seed, minutes=1.0, tell=told.append, steps=8)
    assert report.failure == "", "\n".join([f"seed {seed}", *told])
    assert report.steps > 0
