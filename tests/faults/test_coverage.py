"""The table of failures and tests says the truth."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.faults.cases import CASES
from tests.faults.coverage import PROOFS, README, SUITE, render
from tests.faults.registry import FAULTS, GO

TESTS = Path(__file__).parent.parent


@cache
def names(file: Path) -> frozenset[str]:
    """Tests of a file, those of classes with their class, inherited ones too."""
    body = ast.parse(file.read_text()).body
    found: set[str] = set()
    home: dict[str, str] = {}
    for node in body:
        found.add(getattr(node, "name", ""))
        if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("tests."):
            home |= {alias.name: f"{node.module}".replace(".", "/") + ".py" for alias in node.names}
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{getattr(part, 'name', '')}" for part in node.body}
            for base in (base.id for base in node.bases if isinstance(base, ast.Name) and base.id in home):
                theirs = (name.partition("::") for name in names(TESTS.parent / home[base]))
                found |= {f"{node.name}::{test}" for owner, _, test in theirs if owner == base}
    return frozenset(found)


def test_each_of_the_46_failures_has_a_test_or_a_reason() -> None:
    assert list(PROOFS) == [f"F{number:02}" for number in range(1, 47)]
    faults = {number for fault in FAULTS for number in fault.failures}
    assert faults <= PROOFS.keys()
    without = [number for number, proof in PROOFS.items() if not (proof.tests or proof.note or number in faults)]
    assert without == []


@pytest.mark.parametrize("number", PROOFS)
def test_each_test_named_for_a_failure_exists(number: str) -> None:
    for test in (*PROOFS[number].tests, SUITE.removeprefix("tests/")):
        file, _, name = test.partition("::")
        assert name in names(TESTS / file), test


def test_the_table_in_the_readme_is_up_to_date() -> None:
    assert README.read_text() == render(), "write it anew: python -m tests.faults.coverage"


def test_faults_have_names_of_their_own_and_clusters_that_exist() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {case for fault in FAULTS for case in fault.cases} == CASES.keys()
    assert GO.keys() <= {fault.name for fault in FAULTS}
