"""Whose a lease is and how a host comes to one (contract 3.20, 11.14, failures F18, F19)."""

from __future__ import annotations

import pytest

from flanneld.errors import Unavailable
from flanneld.model.addr import Prefix, parse_ip
from flanneld.model.lease import Claim, Lease, LeaseAttrs
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.plan.allocate import Subnets
from flanneld.plan.claim import Create, Holder, Remove, Take, Verdict, doubles, holder, judge, next_step

NETWORK = Prefix.parse("10.5.0.0/16")
CONF = NetConf(
    FamilyConf(NETWORK, 24, NETWORK.first + 256, NETWORK.last + 1 - 256),
    None,
    nftables=False,
    backend_type="",
    backend=b"{}",
)


def attrs(ip: str, identity: str = "") -> LeaseAttrs:
    if ":" in ip:
        return LeaseAttrs(None, parse_ip(ip), identity=identity)
    return LeaseAttrs(parse_ip(ip), identity=identity)


ME = attrs("192.0.2.1", "me")


def lease(subnet: str, ip: str, identity: str = "") -> Lease:
    return Lease(Prefix.parse(subnet), None, attrs(ip, identity), revision=7, ttl_id=9)


def step(*leases: Lease, previous: str | None = None, lost: frozenset[str] = frozenset()) -> Take | Remove | Create:
    claim = Claim(ME, (Prefix.parse(previous) if previous else None, None))
    return next_step({str(lease.subnet): lease for lease in leases}, [], CONF, claim, lost, lambda _: 0)


def first_free() -> Subnets:
    return Subnets(Prefix.parse("10.5.1.0/24"), None)


@pytest.mark.parametrize(
    ("found", "ours", "whose"),
    [
        (attrs("192.0.2.1", "me"), ME, Holder.OURS),
        (attrs("192.0.2.1"), ME, Holder.UNSIGNED),
        (attrs("192.0.2.9", "me"), ME, Holder.MOVED),
        (attrs("192.0.2.1", "you"), ME, Holder.DOUBLE),
        (attrs("192.0.2.9", "you"), ME, Holder.OTHER),
        (attrs("192.0.2.9"), ME, Holder.OTHER),
        (attrs("192.0.2.9"), attrs("192.0.2.1"), Holder.OTHER),  # two hosts without identity
        (attrs("fd00::1"), attrs("fd00::1", "me"), Holder.UNSIGNED),
        (LeaseAttrs(None), attrs("fd00::1", "me"), Holder.OTHER),  # IPv6-only: nobody matches 0.0.0.0
        (LeaseAttrs(None), LeaseAttrs(None, identity="me"), Holder.OTHER),
    ],
)
def test_identity_decides_and_the_address_only_where_there_is_none(
    found: LeaseAttrs, ours: LeaseAttrs, whose: Holder
) -> None:
    assert holder(found, ours) is whose


def test_our_own_lease_is_taken_before_one_that_go_left() -> None:
    ours, unsigned = lease("10.5.9.0/24", "192.0.2.1", "me"), lease("10.5.3.0/24", "192.0.2.1")
    decision = step(unsigned, ours)
    assert isinstance(decision, Take)
    assert decision.lease == ours


def test_a_lease_that_go_wrote_with_our_address_is_ours() -> None:
    decision = step(lease("10.5.3.0/24", "192.0.2.1"))
    assert isinstance(decision, Take)  # contract 13.6


def test_our_lease_outside_the_new_network_is_removed() -> None:
    decision = step(lease("10.9.3.0/24", "192.0.2.1", "me"))
    assert isinstance(decision, Remove)


def test_another_machines_lease_with_our_address_is_neither_taken_nor_removed() -> None:
    for subnet in ("10.5.1.0/24", "10.9.1.0/24"):
        decision = step(lease(subnet, "192.0.2.1", "you"), previous="10.5.1.0/24")
        assert isinstance(decision, Create)
        assert str(decision.subnets.v4) != subnet


def test_the_warning_about_a_double_names_both_machines_the_subnet_and_the_remedy() -> None:
    (sentence,) = doubles({"k": lease("10.5.1.0/24", "192.0.2.1", "you")}, ME).values()
    for part in ("machine you", "machine me", "10.5.1.0/24", "192.0.2.1", "--public-ip"):
        assert part in sentence


def test_our_previous_subnet_is_taken_though_our_address_changed() -> None:
    moved = lease("10.5.4.0/24", "192.0.2.77", "me")
    decision = step(moved, previous="10.5.4.0/24")
    assert isinstance(decision, Take)
    assert decision.lease == moved


def test_a_lease_with_our_identity_alone_may_be_a_clones() -> None:
    moved = lease("10.5.4.0/24", "192.0.2.77", "me")
    assert isinstance(step(moved), Create)
    assert isinstance(step(moved, previous="10.5.4.0/24", lost=frozenset({"10.5.4.0/24"})), Create)


def test_the_previous_subnet_is_created_again_when_free() -> None:
    decision = step(lease("10.5.1.0/24", "192.0.2.9"), previous="10.5.200.0/24")
    assert decision == Create(Subnets(Prefix.parse("10.5.200.0/24"), None), "subnet=previous")


def test_subnets_of_unreadable_leases_count_as_taken() -> None:
    taken = [Subnets(Prefix.parse(half), None) for half in ("10.5.0.0/17", "10.5.128.0/17")]
    with pytest.raises(Unavailable):
        next_step({}, taken, CONF, Claim(ME, (None, None)), (), lambda _: 0)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (ME, Verdict.HOLDS),
        (ME._replace(data=b"{}"), Verdict.HOLDS),  # our write whose answer got lost
        (None, Verdict.RESTORE),
        (attrs("192.0.2.1"), Verdict.RESTORE),
        (ME._replace(backend_type="udp"), Verdict.RESTORE),
        (attrs("192.0.2.1", "you"), Verdict.LOST),
        (attrs("192.0.2.9"), Verdict.LOST),
        (attrs("192.0.2.9", "me"), Verdict.LOST),  # a clone of this machine
    ],
)
def test_what_stands_under_our_key_is_judged_by_identity(found: LeaseAttrs | None, verdict: Verdict) -> None:
    assert judge(found, ME, ME._replace(data=b"{}")) is verdict
