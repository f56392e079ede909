"""Every fault of the registry, once, in every cluster where it can happen: repaired under traffic, and nothing else.

Figures are asserted in seconds only, as this runs on busy machines; ``make faults`` measures them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.bed import Bed
from tests.faults.cases import CASES, TOOLS
from tests.faults.fault import Fault
from tests.faults.inject import inject, others_changed
from tests.faults.registry import rows

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs(*TOOLS), pytest.mark.timeout(120)]


class Beds:
    """One cluster at a time, used by fault after fault until one spoils it."""

    def __init__(self) -> None:
        self._bed: Bed | None = None

    def get(self, case: str) -> Bed:
        """The cluster of a kind."""
        if self._bed is None or self._bed.name != case:
            self.end()
            self._bed = Bed(case).__enter__()
        return self._bed

    def end(self) -> None:
        """Take it down, and fail if its other hosts are not as they were."""
        if self._bed is not None:
            name, changed = self._bed.name, others_changed(self._bed)
            self.drop()
            assert changed == [], f"at the end of all faults in the cluster {name}"

    def drop(self) -> None:
        """Take it down."""
        if self._bed is not None:
            self._bed.close()
            self._bed = None


@pytest.fixture(scope="module")
def beds() -> Iterator[Beds]:
    made = Beds()
    try:
        yield made
        made.end()
    finally:
        made.drop()


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        pytest.param(fault, case, marks=pytest.mark.needs(*CASES[case].needs), id=f"{case}: {fault.name}")
        for fault, case in rows()
    ],
)
def test_what_a_fault_breaks_is_whole_again_and_what_others_have_is_untouched(
    beds: Beds, fault: Fault, case: str
) -> None:
    try:
        result = inject(beds.get(case), fault)
    except BaseException:
        beds.drop()
        raise
    if not result.is_green:
        beds.drop()
    assert result.complaints == ()
