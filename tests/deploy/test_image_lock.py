"""The lock files of the image against pyproject.toml and what is installed here; needs neither network nor buildah."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCE = Path(__file__).parents[2]
FOLDER = SOURCE / "deploy" / "image"
PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())


def read(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package in a lock file."""
    lock = re.sub(r"\\\n|^ *#.*\n", "", (FOLDER / name).read_text(), flags=re.MULTILINE)
    pinned = {}
    for line in lock.splitlines():
        found = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)(?: ; [^-]*)?((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
        assert found, f"not a pinned package with hashes: {line[:80]!r}"
        pinned[found[1]] = (found[2], found[3].split())
    return pinned


def missing(requirements: list[str], pinned: dict[str, tuple[str, list[str]]]) -> list[str]:
    """Requirements, and theirs in turn as installed here, that the lock does not meet."""
    lacking, todo, seen = [], [Requirement(text) for text in requirements], set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        if name not in pinned or not wanted.specifier.contains(pinned[name][0]):
            lacking.append(f"{wanted} (locked: {pinned.get(name, ('nothing',))[0]})")
        elif name not in seen:
            seen.add(name)
            todo += [Requirement(text) for text in distribution(name).requires or ()]
    return lacking


def test_every_dependency_of_the_daemon_is_locked_in_a_version_it_accepts() -> None:
    remedy = "deploy/image/lock.sh writes it anew"
    assert missing(PROJECT["project"]["dependencies"], read("requirements.lock")) == [], remedy


def test_what_builds_the_wheel_is_locked_too() -> None:
    assert missing([*PROJECT["build-system"]["requires"], "wheel"], read("build.lock")) == []


def test_nothing_is_locked_that_the_daemon_does_not_need() -> None:
    direct = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    needed = set(direct)
    for name in read("requirements.lock"):
        needed |= {canonicalize_name(Requirement(text).name) for text in distribution(name).requires or ()}
    assert set(read("requirements.lock")) <= needed


@pytest.mark.parametrize("name", ["requirements.lock", "build.lock"])
def test_each_package_has_hashes_for_more_than_one_file(name: str) -> None:
    """One would be this machine's wheel only: the image is built for other processors too."""
    assert all(len(hashes) >= 2 for _, hashes in read(name).values())
