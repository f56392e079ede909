"""What is not understood in a listing of nftables may accept, and accuses nobody (failure F08).

What nft itself writes is in ``tests/netns/test_foreign_drop.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.model.addr import Prefix
from flanneld.plan.foreign_drop import certain_drops, forward_tables, walks

PACKETS = walks(Prefix.parse("10.244.0.0/16"), Prefix.parse("10.244.7.0/24"), frozenset({"flannel.1"}))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
WORDS = st.sampled_from(["match", "jump", "goto", "accept", "drop", "xt", "queue", "vmap", "counter"])


def chain(name: str, *rules: list[Any], policy: str = "drop", hook: str = "forward") -> list[dict[str, Any]]:
    where = {"family": "ip", "table": "filter"}
    base = {"type": "filter", "hook": hook, "prio": 0, "policy": policy} if hook else {}
    return [
        {"chain": {**where, "name": name, **base}},
        *({"rule": {**where, "chain": name, "expr": expr}} for expr in rules),
    ]


def source(value: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": value}}


DROP, ACCEPT = {"drop": None}, {"accept": None}


def test_a_dropping_policy_alone_is_named_once_for_both_ways() -> None:
    [sentence] = certain_drops(chain("FORWARD"), PACKETS)
    assert sentence == (
        "nftables table ip filter drops new connections from 10.244.0.0/16 to 10.244.7.0/24 and new connections from "
        "10.244.7.0/24 to 10.244.0.0/16 in its chain FORWARD, by its policy, and rules of other tables cannot overrule "
        "that: accept them there (nft -a list chain ip filter FORWARD)"
    )


@pytest.mark.parametrize(
    "statement",
    [
        {"xt": {"type": "match", "name": "comment"}},
        {"xt": {"type": "target", "name": "NFQUEUE"}},
        {"queue": {"num": 1}},
        {"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@zones"}},
        {"jump": {"target": "gone"}},
        {"brand-new": 1},
        {},
    ],
)
def test_a_statement_that_is_not_understood_may_accept(statement: dict[str, Any]) -> None:
    assert certain_drops(chain("FORWARD", [statement, ACCEPT]), PACKETS) == []
    assert certain_drops(chain("FORWARD", [statement], [DROP]), PACKETS) == []


@pytest.mark.parametrize(
    ("match", "named"),
    [
        (source({"prefix": {"addr": "10.244.0.0", "len": 16}}), True),
        (source({"prefix": {"addr": "10.244.128.0", "len": 17}}), False),
        (source({"prefix": {"addr": "192.0.2.0", "len": 24}}, "!="), True),
        (source({"range": ["10.244.0.0", "10.244.255.255"]}), False),
        (source({"prefix": {"addr": "fd00::", "len": 16}}), False),
        (source({"prefix": {"addr": 1, "len": "x"}}), False),
        (source("@set"), False),
        (source("10.0.0.1", "<"), False),
    ],
)
def test_a_rule_drops_for_certain_only_where_it_holds_all_packets(match: dict[str, Any], named: bool) -> None:
    assert bool(certain_drops(chain("FORWARD", [match, DROP], policy="accept"), PACKETS[:1])) is named


def test_chains_that_jump_to_each_other_come_to_an_end() -> None:
    loop = chain("FORWARD", [{"jump": {"target": "FORWARD"}}])
    assert certain_drops(loop, PACKETS) == []
    wide = chain("FORWARD", *[[{"jump": {"target": "c0"}}]] * 3)
    for depth in range(12):
        wide += chain(f"c{depth}", *[[{"jump": {"target": f"c{depth + 1}"}}]] * 30, hook="")
    assert len(certain_drops([*wide, *chain("c12", hook="")], PACKETS)) == 1


@given(st.lists(st.dictionaries(st.sampled_from(["chain", "rule", "table"]), JSON, max_size=2), max_size=5))
def test_any_listing_is_read_without_an_accusation_of_what_is_no_chain(listing: list[dict[str, Any]]) -> None:
    assert certain_drops(listing, PACKETS) == []
    assert forward_tables(listing) == []


@given(st.lists(st.dictionaries(WORDS, JSON, max_size=2), max_size=4))
def test_any_rule_is_read(expr: list[Any]) -> None:
    certain_drops(chain("FORWARD", expr), PACKETS)
