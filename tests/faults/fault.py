"""What a fault is.

A fault is a script on host 1, with words in braces from ``Bed.words``. What the fault takes from others as well (the
default route, others' firewall rules) the operator puts back himself; time counts from there, as only then the
surroundings are whole. Everything must then be as before without anybody's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults.cases import ALL

if TYPE_CHECKING:
    from tests.faults.bed import Bed

Act = Callable[["Bed"], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what happens, in the words of an operator.
        failures: of the collection, which it stands for.
        cases: the clusters where it can happen.
        harm: script of the fault.
        whole: script of the operator, who puts right what is his.
        undo: script that takes the fault back, where it leaves a state that is right but another one.
        undo_act: the same, in Python.
        before, after: done by the test before the harm and when it is repaired, such as taking etcd away.
        in_table: a row of the damage table.
        egress: traffic is that of new connections to the outside.
        is_told: by an entry in the audit.
        quiet: clusters where it is not: what the fault takes is put back as a matter of course.
        go: what Go flanneld does about it, by type of backend; absent = not known to us.
        lost_at_most: packets of one stream, where the kernel forwards; None where no bound is promised.
        outage_at_most_ms: beyond this the fault is not survived but suffered; figures stand in the table.
    """

    name: str
    failures: tuple[str, ...]
    cases: tuple[str, ...] = ALL
    harm: str = ""
    whole: str = ""
    undo: str = ""
    undo_act: Act | None = None
    before: Act | None = None
    act: Act | None = None
    after: Act | None = None
    in_table: bool = False
    egress: bool = False
    is_told: bool = True
    quiet: tuple[str, ...] = ()
    go: Mapping[str, str] = field(default_factory=dict, hash=False)
    lost_at_most: int | None = None
    outage_at_most_ms: float = 2000.0
