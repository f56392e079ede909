"""A pytest plug-in for runs of several processes (``make test JOBS=3``): which tests stay together in one of them.

Most tests wait for something, so processes that take turns on a processor save most of the time. What a module has
built for its tests is built once, so a file is not split where that costs more than it gains.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

FAULTS = "tests/faults/test_faults.py"
ALONE = ("tests/interop/test_etcd_faults.py", "tests/netns/test_crash_safety.py", "tests/netns/test_udp_lab.py")
"""Files whose tests are long and share nothing."""
TOGETHER = "tests/deploy/"
"""One image for all, one machine booted at a time."""


def scope(nodeid: str) -> str:
    """What a test shares a process with: tests of one scope run in one, in order."""
    file, _, name = nodeid.partition("::")
    if file.startswith(TOGETHER):
        return TOGETHER
    if file == FAULTS:
        return f"{file}::{name.partition(': ')[0]}"  # the cluster: faults hit it one after another
    return nodeid if file in ALONE else file


def pytest_configure(config: pytest.Config) -> None:
    # in the order of names, which begins with what takes longest (deploy, faults, interop) and ends with unit tests;
    # xdist would begin with the files of most tests
    config.option.loadscopereorder = False


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = scope
    return scheduler
