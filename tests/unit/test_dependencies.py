"""What runs with the daemon's rights: few packages, each pinned by hashes, under licences that allow it."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy/image/requirements.lock"
ALLOWED = {"MIT", "BSD-3-Clause", "Apache-2.0"}
"""Give everybody what this project's own licence does."""
WORDS = {
    "MIT": "MIT",
    "The MIT License (MIT)": "MIT",
    "BSD-3-Clause": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache-2.0": "Apache-2.0",
}


def locked() -> list[str]:
    return re.findall(r"^([a-z0-9-]+)==", LOCK.read_text(), re.MULTILINE)


def licence(name: str) -> str:
    """The licence that a package states, by its SPDX name where it is known by one."""
    metadata = distribution(name).metadata
    field = next(name for name in ("License-Expression", "License") if name in metadata)
    text = metadata[field].strip().partition("\n")[0].strip()
    return WORDS.get(text, text)


@pytest.mark.parametrize("name", locked())
def test_a_package_in_the_daemon_has_a_licence_that_allows_it(name: str) -> None:
    assert licence(name) in ALLOWED


def test_every_package_in_the_daemon_is_weighed_in_the_record_of_dependencies() -> None:
    record = (ROOT / "flanneld/design/adr-0010-dependencies.md").read_text().lower()
    assert [name for name in locked() if name not in record] == []


def test_what_is_installed_with_the_daemon_is_what_is_locked() -> None:
    found, todo = set(), ["flanneld"]
    while todo:
        for text in distribution(todo.pop()).requires or ():
            wanted = Requirement(text)
            if not (wanted.marker and not wanted.marker.evaluate({"extra": ""})) and wanted.name.lower() not in found:
                found.add(wanted.name.lower())
                todo.append(wanted.name)
    assert found == set(locked())
