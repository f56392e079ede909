"""Rules of several networks on one host: each keeps its own, whoever comes first, whatever happens between them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.contracts import TrafficRules
from flanneld.model.addr import Family, Prefix
from flanneld.plan.rule_owner import Us, networks_in
from flanneld.plan.traffic import Block, Rule, Verdict, forward_rules, masquerade_rules
from flanneld.plan.traffic_iptables import remnants, repair

A = TrafficRules(Prefix.parse("10.42.0.0/16"), Prefix.parse("10.42.1.0/24"), True, True, True)
B = TrafficRules(Prefix.parse("10.66.0.0/16"), Prefix.parse("10.66.7.0/24"), True, True, True)
US_A, US_B = Us.of("/coreos.com/network", [A.network]), Us.of("/second", [B.network])
CHAIN_B = f"FLANNEL-POSTRTG-{US_B.mark}"


class Tables:
    """What ``iptables-restore --noflush`` makes of payloads, as ``iptables-save`` prints it."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, list[str]]] = {"nat": {"POSTROUTING": []}, "filter": {"FORWARD": []}}

    def apply(self, payload: str) -> None:
        chains: dict[str, list[str]] = {}
        for line in payload.splitlines():
            if line.startswith("*"):
                chains = self._tables[line[1:]]
            elif line.startswith(":"):
                chains[line[1:].split()[0]] = []
            elif line.startswith("-A"):
                chains[line.split()[1]].append(line)
            elif line.startswith("-D"):
                chains[line.split()[1]].remove(line.replace("-D", "-A", 1))
            elif line.startswith("-F"):
                chains[line.split()[1]] = []
            elif line.startswith("-X"):
                assert not chains.pop(line.split()[1])

    def saved(self) -> str:
        text = ""
        for table, chains in self._tables.items():
            declared = [f":{name} {'-' if '-' in name else 'ACCEPT'} [0:0]" for name in chains]
            text += "\n".join([f"*{table}", *declared, *itertools.chain(*chains.values()), "COMMIT", ""])
        return text

    def flush(self) -> None:
        for chains in self._tables.values():
            for rules in chains.values():
                rules.clear()

    def serve(self, wanted: TrafficRules | None, us: Us | None) -> tuple[str, ...]:
        found = repair(self.saved(), Family.V4, wanted, us)
        self.apply(found.payload)
        return found.changes


@pytest.fixture
def both() -> Tables:
    tables = Tables()
    assert tables.serve(A, US_A)
    assert tables.serve(B, US_B)
    return tables


def test_second_network_gets_a_chain_of_its_own_and_the_first_keeps_flannels(both: Tables) -> None:
    assert f"-A {CHAIN_B} -s 10.66.0.0/16 ! -d 224.0.0.0/4" in both.saved()
    assert "-A FLANNEL-POSTRTG -s 10.42.0.0/16 ! -d 224.0.0.0/4" in both.saved()
    assert len(CHAIN_B) <= 28
    assert (both.serve(A, US_A), both.serve(B, US_B)) == ((), ())


def test_reason_for_the_longer_name_is_told() -> None:
    tables = Tables()
    tables.serve(A, US_A)
    assert any("FLANNEL-POSTRTG is that of 10.42.0.0/16" in change for change in tables.serve(B, US_B))


def test_flush_leaves_each_network_where_it_was(both: Tables) -> None:
    before = both.saved()
    both.flush()
    both.serve(B, US_B)  # the one that could take the plain chain comes first
    both.serve(A, US_A)
    assert sorted(both.saved().splitlines()) == sorted(before.splitlines())


def test_network_that_goes_takes_its_own_rules_only_and_the_other_one_moves_into_its_place(both: Tables) -> None:
    both.serve(None, US_A)
    assert "10.42." not in both.saved()
    both.serve(B, US_B)
    assert CHAIN_B not in both.saved()
    assert "-A FLANNEL-POSTRTG -s 10.66.0.0/16" in both.saved()


def test_second_network_goes_without_a_trace(both: Tables) -> None:
    alone = Tables()
    alone.serve(A, US_A)
    both.serve(None, US_B)
    assert both.saved() == alone.saved()


def test_network_of_an_earlier_run_is_not_another_one() -> None:
    """Contract 8.11."""
    tables = Tables()
    tables.serve(A, US_A)
    tables.serve(B, Us.of("/coreos.com/network", [B.network, A.network]))
    assert "10.42." not in tables.saved()
    assert US_A.mark not in tables.saved()


def test_go_flanneld_of_another_network_that_empties_the_plain_chain_gets_it(both: Tables) -> None:
    """It creates or flushes at start and adds what is missing later (contract 8.7, 8.8)."""
    go = TrafficRules(Prefix.parse("10.99.0.0/16"), Prefix.parse("10.99.3.0/24"), True, True, True)
    both.apply(repair("", Family.V4, go).payload)
    assert both.serve(A, US_A)
    assert both.serve(B, US_B) == ()
    assert f"-A FLANNEL-POSTRTG-{US_A.mark} -s 10.42.0.0/16" in both.saved()
    assert "-A FLANNEL-POSTRTG -s 10.99.0.0/16" in both.saved()
    assert both.serve(A, US_A) == ()


def test_rules_of_ours_in_anothers_chain_are_taken_out() -> None:
    tables = Tables()
    tables.serve(A, None)
    stale = '-A FLANNEL-POSTRTG -s 10.66.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE\n'
    tables.apply("*nat\n" + stale)
    tables.serve(B, US_B)
    assert stale not in tables.saved()
    assert tables.saved().count("10.42.") > 4


def test_single_strange_rule_is_no_network() -> None:
    tables = Tables()
    tables.serve(A, US_A)
    tables.apply("*nat\n-A FLANNEL-POSTRTG -s 192.0.2.0/24 -j RETURN\n")
    assert any("refilled" in change for change in tables.serve(A, US_A))
    assert "192.0.2.0" not in tables.saved()


def test_cleanup_finds_a_network_under_either_name(both: Tables) -> None:
    found = remnants(both.saved(), [B.network])
    for remnant in found:
        if not remnant.others:
            both.apply(remnant.payload)
    alone = Tables()
    alone.serve(A, US_A)
    assert both.saved() == alone.saved()


@given(st.lists(st.sampled_from(["a", "b", "flush", "a goes", "b goes"]), max_size=12))
def test_whatever_happened_before_both_end_with_their_own_rules(steps: list[str]) -> None:
    tables = Tables()
    for step in steps:
        if step == "flush":
            tables.flush()
        else:
            wanted, us = (A, US_A) if step.startswith("a") else (B, US_B)
            tables.serve(None if "goes" in step else wanted, us)
    for wanted, us in ((A, US_A), (B, US_B)):
        tables.serve(wanted, us)
    assert (tables.serve(A, US_A), tables.serve(B, US_B)) == ((), ())
    for name, rules in (("a", A), ("b", B)):
        assert tables.saved().count(f"-s {rules.network} ! -d 224.0.0.0/4") == 1, name
        assert tables.saved().count(f'-d {rules.network} -m comment --comment "flanneld forward"') == 1, name


def test_networks_are_told_by_what_makes_a_network() -> None:
    outside = Rule(Verdict.RETURN, Block(Prefix.parse("192.0.2.0/24")))
    assert networks_in([*masquerade_rules(A), None, outside]) == {A.network}
    assert networks_in(forward_rules(B)) == {B.network}
    assert networks_in(forward_rules(B)[:1]) == frozenset()
