"""The lease protocol, explored: every interleaving of a few hosts, a store, and what may go wrong between them.

In every state that can be reached (design/lease-protocol.md, failures F16, F18, F19, F25):

- no two of our hosts hold overlapping subnets, unless one of them cannot know yet what an outsider did to its key,
- none of our hosts has written over a live lease of another identity, or deleted it,
- no host that saw its subnet in other hands goes on sending with it,
- and there is a way to rest without another fault: each host holds a subnet of its own, is in quarantine, or waits.

``MODEL_DEEPER=1`` allows each scenario one fault more (minutes).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from flanneld.model.lease import Lease
from flanneld.plan import claim, guard
from flanneld.plan.guard import Act, Loss
from tests.model.checker import Broken, explore
from tests.model.hosts import Cluster, Rules
from tests.model.state import attrs_of
from tests.support.hosts import family_conf, net_conf

DEEPER = int(os.environ.get("MODEL_DEEPER", "0"))

TWO = net_conf(family_conf("10.5.0.0/16", 24, 2))
THREE = net_conf(family_conf("10.5.0.0/16", 24, 3))
DUAL = net_conf(family_conf("10.5.0.0/16", 24, 2), family_conf("fd00:5::/48", 64, 2))


def vtep(number: int) -> bytes:
    return b'{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}' % number


A, B, C = attrs_of(1, "a", vtep(1)), attrs_of(2, "b", vtep(2)), attrs_of(3, "c", vtep(3))
CRASHES = ("crash", "forget", "memory", "stall", "expire", "answer", "late")

Make = Callable[[Rules | None, int], Cluster]
SCENARIOS: Mapping[str, Make] = {
    "two hosts, two subnets": lambda rules, more: Cluster(TWO, (A, B), CRASHES, 2 + more, rules),
    "three hosts, two subnets": lambda rules, more: Cluster(TWO, (A, B, C), CRASHES, 1 + more, rules),
    "starts without the store": lambda rules, more: Cluster(
        TWO, (A, B), ("crash", "memory", "stall", "expire"), 4 + more, rules
    ),
    "an operator deletes keys": lambda rules, more: Cluster(TWO, (A, B), (*CRASHES, "delete"), 2 + more, rules),
    "the store is rebuilt or restored": lambda rules, more: Cluster(
        TWO, (A, B), ("crash", "memory", "stall", "wipe", "restore"), 3 + more, rules
    ),
    "Go flanneld elsewhere with our address": lambda rules, more: Cluster(
        THREE, (A, B), ("crash", "memory", "answer", "stall", "go"), 2 + more, rules, go=attrs_of(1, "", vtep(7))
    ),
    "Go flanneld with an address of its own": lambda rules, more: Cluster(
        TWO, (A, B), ("crash", "stall", "expire", "go"), 2 + more, rules, go=attrs_of(7, "", vtep(7))
    ),
    "one public address twice": lambda rules, more: Cluster(
        THREE, (A, attrs_of(1, "b", vtep(2))), ("crash", "memory", "stall", "expire", "answer"), 2 + more, rules
    ),
    "a cloned machine": lambda rules, more: Cluster(
        THREE,
        (A, attrs_of(2, "a", vtep(1))),
        ("crash", "clone", "memory", "stall", "expire"),
        3 + more,
        rules,
        clone_of={1: 0},
    ),
    "dual stack, keys that differ and overlap": lambda rules, more: Cluster(
        DUAL, (A, B), ("crash", "stall", "expire", "answer", "delete"), 2 + more, rules
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_interleaving_breaks_a_rule_and_all_come_to_rest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    explored = explore(SCENARIOS[name](None, DEEPER), at_most=10_000_000)
    with capsys.disabled():
        print(f"\n  {name}: {explored.states} states, {explored.moves} moves", end="")
    assert explored.states > 100


# ---- and it finds what is wrong ---------------------------------------------------------------------


def _fights(*args: Any, **more: Any) -> Act | Loss:
    """Puts its value back whoever wrote."""
    found = guard.look(*args, **more)
    return Act.RESTORE if isinstance(found, Loss) else found


def _believes(*args: Any, **more: Any) -> Act | Loss:
    """Takes any value for its own."""
    found = guard.look(*args, **more)
    return Act.CONFIRM if isinstance(found, Loss) else found


def _stays(*args: Any, **more: Any) -> Act | Loss:
    """Leaves it at that."""
    found = guard.look(*args, **more)
    return Act.LEAVE if isinstance(found, Loss) else found


def _goes_by_address(leases: Mapping[str, Lease], *args: Any) -> Any:
    """Go flanneld's rule (contract 3.20): a lease with our address is ours."""
    unsigned = {key: lease._replace(attrs=lease.attrs._replace(identity="")) for key, lease in leases.items()}
    return claim.next_step(unsigned, *args)


def _goes_by_identity(leases: Mapping[str, Lease], taken: Any, conf: Any, ours: Any, *args: Any) -> Any:
    """A lease with our identity is ours, whatever its address."""
    return claim.next_step(
        {
            key: lease._replace(attrs=ours.attrs) if lease.attrs.identity == ours.attrs.identity else lease
            for key, lease in leases.items()
        },
        taken,
        conf,
        ours,
        *args,
    )


@pytest.mark.parametrize(
    ("mistake", "name", "told"),
    [
        (Rules(look=_fights), "two hosts, two subnets", "goes on using"),
        (Rules(look=_believes), "two hosts, two subnets", "goes on using"),
        (Rules(look=_stays), "Go flanneld elsewhere with our address", "goes on using"),
        (Rules(next_step=_goes_by_address), "one public address twice", "wrote over"),
        (Rules(next_step=_goes_by_identity), "a cloned machine", "of another address"),
        (Rules(is_displaced=lambda *_: False), "starts without the store", "goes on using"),
        (Rules(beaten=lambda *_: None), "dual stack, keys that differ and overlap", "two hosts hold"),
    ],
)
def test_a_wrong_decision_is_found(mistake: Rules, name: str, told: str) -> None:
    with pytest.raises(Broken, match=told):
        explore(SCENARIOS[name](mistake, 0))


def test_a_host_that_never_looks_again_is_found_not_to_come_to_rest() -> None:
    class Deaf(Cluster):
        def _look(self, *_: Any) -> Any:
            return iter(())

    with pytest.raises(Broken, match="nothing leads to rest"):
        explore(Deaf(TWO, (A, B), ("delete",), 1))
