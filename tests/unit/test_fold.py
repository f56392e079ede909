"""What leases mean to this host: one bad lease costs its owner only, and order costs nobody anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.model.addr import Family, Prefix, parse_ip
from flanneld.model.lease import Lease, LeaseAttrs
from flanneld.model.lease_codec import render_key
from flanneld.model.netconf_parse import parse_netconf
from flanneld.plan.fold import Fold, Outside, Remote, Self, Unserved, meaning, usable_unicast

CONF = parse_netconf(b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"}')
ONLY_V4 = parse_netconf(b'{"Network":"10.5.0.0/16"}')
OWN, OWN6 = Prefix.parse("10.5.1.0/24"), Prefix.parse("fd00:5:0:1::/64")
ME = Self((OWN, OWN6), frozenset({parse_ip("198.18.0.1"), parse_ip("2001:db8::1")}))


def lease(
    subnet: str = "10.5.2.0/24",
    ip: str | None = "198.18.0.2",
    subnet6: str | None = None,
    ip6: str | None = None,
    backend: str = "vxlan",
    revision: int = 1,
) -> Lease:
    attrs = LeaseAttrs(parse_ip(ip) if ip else None, parse_ip(ip6) if ip6 else None, backend, b"4", b"6")
    return Lease(Prefix.parse(subnet), Prefix.parse(subnet6) if subnet6 else None, attrs, revision)


def told(found: object) -> str:
    assert isinstance(found, Unserved | Outside)
    return found.why


def test_a_lease_of_both_families_is_a_peer_in_each_with_its_own_data() -> None:
    both = lease(subnet6="fd00:5:0:2::/64", ip6="2001:db8::2", revision=7)
    v4 = meaning(both, Family.V4, CONF, ME, "vxlan")
    assert v4 == Remote(Prefix.parse("10.5.2.0/24"), parse_ip("198.18.0.2"), b"4", 7)
    v6 = meaning(both, Family.V6, CONF, ME, "vxlan")
    assert v6 == Remote(Prefix.parse("fd00:5:0:2::/64"), parse_ip("2001:db8::2"), b"6", 7)


def test_host_bits_in_a_key_do_not_matter() -> None:
    """Contract 3.13: they are kept in the key and mean nothing."""
    found = meaning(lease("10.5.2.77/24"), Family.V4, CONF, ME, "vxlan")
    assert isinstance(found, Remote)
    assert found.subnet == Prefix.parse("10.5.2.0/24")


def test_our_own_lease_and_absent_families_mean_nothing() -> None:
    assert meaning(lease(str(OWN), "198.18.0.1"), Family.V4, CONF, ME, "vxlan") is None
    assert meaning(lease(), Family.V6, CONF, ME, "vxlan") is None
    assert meaning(lease(subnet6="fd00:5:0:2::/64", ip6="2001:db8::2"), Family.V6, ONLY_V4, ME, "vxlan") is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lease("10.6.2.0/24"), "lies outside 10.5.0.0/16"),
        (lease("10.5.0.0/16"), "lies outside 10.5.0.0/16"),  # the whole network: would take all from everybody
        (lease("10.4.0.0/15"), "lies outside"),
        (lease("10.5.1.128/25"), "overlaps our own 10.5.1.0/24"),
        (lease("10.5.0.0/22"), "overlaps our own 10.5.1.0/24"),
        (lease(backend="host-gw"), "has backend 'host-gw', ours is 'vxlan'"),
        (lease(backend="VXLAN"), "has backend 'VXLAN'"),  # contract 6.3: exact, case-sensitive
        (lease(backend=""), "has backend 'udp'"),
        (lease(ip=None), "has no public IPv4 address"),
        (lease(ip="198.18.0.1"), "carries our own public address 198.18.0.1"),
        (lease(ip="127.0.0.1"), "unusable public address 127.0.0.1"),
        (lease(ip="224.0.0.1"), "unusable public address 224.0.0.1"),
        (lease(ip="255.255.255.255"), "unusable public address"),
        (lease(ip="0.0.0.7"), "unusable public address"),
    ],
)
def test_a_lease_that_cannot_be_used_is_told_in_a_sentence(bad: Lease, why: str) -> None:
    sentence = told(meaning(bad, Family.V4, CONF, ME, "vxlan"))
    assert why in sentence
    assert bad.name() in sentence


@pytest.mark.parametrize("ip6", ["::", "::1", "ff02::1", "fe80::1", "::ffff:198.18.0.2"])
def test_addresses_that_no_tunnel_can_lead_to_are_unusable(ip6: str) -> None:
    """A link-local one says nothing without an interface; a mapped one is no IPv6 address on any wire."""
    assert not usable_unicast(parse_ip(ip6))
    found = meaning(lease(subnet6="fd00:5:0:2::/64", ip6=ip6), Family.V6, CONF, ME, "vxlan")
    assert isinstance(found, Unserved)
    assert found.subnet == Prefix.parse("fd00:5:0:2::/64")


@pytest.mark.parametrize("ip", ["198.18.0.2", "10.5.0.7", "100.64.0.1", "169.254.7.7", "2001:db8::2", "fd00::2"])
def test_other_addresses_are_usable(ip: str) -> None:
    assert usable_unicast(parse_ip(ip))


# ---- several leases -----------------------------------------------------------------------------------

Changes = dict[str, Lease | None]


def key(one: Lease) -> str:
    return render_key(one.subnet, one.subnet6)


def folded(*leases: Lease) -> Fold:
    fold = Fold(Family.V4)
    fold.update({key(one): one for one in leases}, CONF, ME, "vxlan")
    return fold


def test_of_two_keys_for_one_subnet_the_one_written_last_counts_and_the_other_is_told() -> None:
    old = lease(ip="198.18.0.2", revision=5)
    new = lease(ip="198.18.0.3", subnet6="fd00:5:0:2::/64", ip6="2001:db8::3", revision=9)
    for order in ((old, new), (new, old)):
        fold = folded(*order)
        assert [remote.public_ip for remote in fold.remotes.values()] == [parse_ip("198.18.0.3")]
        assert "198.18.0.2" in fold.notes[key(old)]
        assert key(new) not in fold.notes


def test_a_claim_that_cannot_be_served_does_not_hide_one_that_can() -> None:
    bad = lease(backend="host-gw", subnet6="fd00:5:0:2::/64", ip6="2001:db8::2", revision=9)
    good = lease(revision=5)
    for order in ((bad, good), (good, bad)):
        fold = folded(*order)
        assert list(fold.remotes) == [Prefix.parse("10.5.2.0/24")]
        assert fold.unserved == {}


def test_of_two_subnets_with_one_first_address_only_one_counts() -> None:
    """A peer's first address is its VTEP's neighbour: two of them would fight over it, and both lose."""
    wide, narrow = lease("10.5.2.0/24", revision=5), lease("10.5.2.0/26", ip="198.18.0.3", revision=9)
    for order in ((wide, narrow), (narrow, wide)):
        fold = folded(*order)
        assert list(fold.remotes) == [Prefix.parse("10.5.2.0/26")]
        assert "10.5.2.0/24" in fold.notes[key(wide)]
    fold.update({key(narrow): None}, CONF, ME, "vxlan")
    assert list(fold.remotes) == [Prefix.parse("10.5.2.0/24")]
    assert fold.notes == {}


SUBNETS = ["10.5.2.0/24", "10.5.2.0/26", "10.5.2.64/26", "10.5.3.0/24", "10.5.1.0/24", "10.5.0.0/22", "10.9.0.0/24"]
some_leases = st.builds(
    lease,
    st.sampled_from(SUBNETS),
    st.sampled_from(["198.18.0.1", "198.18.0.2", "198.18.0.3", "127.0.0.1"]),
    st.sampled_from([None, "fd00:5:0:2::/64"]),
    st.just("2001:db8::9"),
    st.sampled_from(["vxlan", "host-gw"]),
    st.integers(0, 3),
)


@given(st.lists(st.lists(st.tuples(some_leases, st.booleans()), max_size=4), max_size=12))
def test_lease_by_lease_comes_to_the_same_as_all_at_once_in_any_order(steps: list[list[tuple[Lease, bool]]]) -> None:
    step_by_step, table = Fold(Family.V4), dict[str, Lease]()
    for step in steps:
        changes: Changes = {key(one): one if comes else None for one, comes in step}
        before = dict(step_by_step.remotes)
        touched = step_by_step.update(changes, CONF, ME, "vxlan")
        different = {s for s in before.keys() | step_by_step.remotes.keys() if differs(before, step_by_step, s)}
        assert different <= touched
        for name, one in changes.items():
            if one is None:
                table.pop(name, None)
            else:
                table[name] = one
    for order in (list(table.items()), list(reversed(table.items()))):
        at_once = Fold(Family.V4)
        at_once.update(dict(order), CONF, ME, "vxlan")
        assert at_once.remotes == step_by_step.remotes
        assert at_once.unserved == step_by_step.unserved
        assert at_once.notes == step_by_step.notes
    bases = [subnet.ip for subnet in step_by_step.remotes]
    assert len(bases) == len(set(bases))
    assert not step_by_step.remotes.keys() & step_by_step.unserved.keys()


def differs(before: dict[Prefix, Remote], fold: Fold, subnet: Prefix) -> bool:
    return before.get(subnet) != fold.remotes.get(subnet)
