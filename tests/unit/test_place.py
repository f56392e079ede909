"""Which host on this machine a process belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld.kernel.place import place


@pytest.fixture
def namespaces(tmp_path: Path) -> Path:
    """Files that stand for namespaces: the machine's, one with a name, one without."""
    (tmp_path / "names").mkdir()
    for name in ("machine", "nameless"):
        (tmp_path / name).touch()
    (tmp_path / "names" / "blue").touch()
    return tmp_path


def test_the_machine_itself_has_no_place(namespaces: Path) -> None:
    machine = namespaces / "machine"
    assert place(machine, machine, namespaces / "names") == ""


def test_a_named_namespace_is_told_by_its_name_even_where_process_1_is_hidden(namespaces: Path) -> None:
    own = namespaces / "own"
    own.symlink_to(namespaces / "names" / "blue")
    assert place(own, namespaces / "machine", namespaces / "names") == "netns-blue"
    assert place(own, namespaces / "absent", namespaces / "names") == "netns-blue"


def test_a_namespace_without_a_name_is_told_by_its_number(namespaces: Path) -> None:
    own = namespaces / "nameless"
    assert place(own, namespaces / "machine", namespaces / "names") == f"netns-{own.stat().st_ino}"


def test_where_nothing_can_be_seen_it_is_the_machine(namespaces: Path) -> None:
    assert place(namespaces / "nameless", namespaces / "absent", namespaces / "no-names") == ""
