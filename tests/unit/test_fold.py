"""What leases mean to this host: one bad lease costs its owner only, and order costs nobody anything."""

from __future__ import annotations

from itertools import combinations

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
ME = Self((OWN, OWN6), frozenset({parse_ip("198.18.0.1"), parse_ip("2001:db8::1")}), parse_ip("198.18.0.255"))


def lease(
    subnet: str = "10.5.2.0/24",
    ip: str | None = "198.18.0.2",
    subnet6: str | None = None,
    ip6: str | None = None,
    backend: str = "vxlan",
    revision: int = 1,
    created: int = 0,
    identity: str = "",
) -> Lease:
    attrs = LeaseAttrs(parse_ip(ip) if ip else None, parse_ip(ip6) if ip6 else None, backend, b"4", b"6", identity)
    return Lease(Prefix.parse(subnet), Prefix.parse(subnet6) if subnet6 else None, attrs, revision, 0, created)


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
        (lease(ip="198.18.0.255"), "unusable public address 198.18.0.255"),
        (lease(ip="10.5.3.7"), "inside the network 10.5.0.0/16"),  # packets would come round and round
        (lease(ip="169.254.169.254"), "link-local public address"),
    ],
)
def test_a_lease_that_cannot_be_used_is_told_in_a_sentence(bad: Lease, why: str) -> None:
    sentence = told(meaning(bad, Family.V4, CONF, ME, "vxlan"))
    assert why in sentence
    assert bad.name() in sentence
    assert len(sentence) < 200


@pytest.mark.parametrize(("own", "peer"), [("10.5.200.1", "10.5.200.2"), ("169.254.7.7", "169.254.7.8")])
def test_on_an_underlay_of_unusual_addresses_peers_may_have_them_too(own: str, peer: str) -> None:
    me = ME._replace(public_ips=frozenset({parse_ip(own)}))
    assert isinstance(meaning(lease(ip=peer), Family.V4, CONF, me, "vxlan"), Remote)


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


def test_of_two_hosts_that_claim_one_subnet_the_one_that_was_there_counts_and_the_other_is_told() -> None:
    there = lease(ip="198.18.0.2", revision=99, created=5)
    later = lease(ip="198.18.0.3", subnet6="fd00:5:0:2::/64", ip6="2001:db8::3", revision=9, created=9)
    for order in ((there, later), (later, there)):
        fold = folded(*order)
        assert [remote.public_ip for remote in fold.remotes.values()] == [parse_ip("198.18.0.2")]
        assert "198.18.0.3" in fold.notes[key(later)]
        assert "198.18.0.2" in fold.notes[key(later)]
        assert key(there) not in fold.notes


def test_of_two_keys_of_one_host_for_one_subnet_the_one_written_last_counts() -> None:
    old = lease(revision=5, created=5)
    new = lease(subnet6="fd00:5:0:2::/64", ip6="2001:db8::2", revision=9, created=9)
    stranger = lease(ip="198.18.0.3", subnet6="fd00:5:0:3::/64", ip6="2001:db8::3", revision=99, created=7)
    for order in ((old, new, stranger), (stranger, new, old)):
        fold = folded(*order)
        assert [remote.revision for remote in fold.remotes.values()] == [9]
        assert fold.notes.keys() == {key(stranger)}


def test_a_claim_that_cannot_be_served_does_not_hide_one_that_can() -> None:
    bad = lease(backend="host-gw", subnet6="fd00:5:0:2::/64", ip6="2001:db8::2", revision=9)
    good = lease(revision=5)
    for order in ((bad, good), (good, bad)):
        fold = folded(*order)
        assert list(fold.remotes) == [Prefix.parse("10.5.2.0/24")]
        assert fold.unserved == {}


@pytest.mark.parametrize("odd", ["10.5.18.0/26", "10.5.18.64/26", "10.5.18.0/23", "10.5.16.0/20"])
def test_a_subnet_of_another_length_never_takes_from_one_of_the_usual_length(odd: str) -> None:
    usual, other = lease("10.5.18.0/24", created=9), lease(odd, ip="198.18.0.3", created=5)
    for order in ((usual, other), (other, usual)):
        fold = folded(*order)
        assert list(fold.remotes) == [Prefix.parse("10.5.18.0/24")]
        assert fold.notes.keys() == {key(other)}
    fold.update({key(usual): None}, CONF, ME, "vxlan")
    assert list(fold.remotes) == [Prefix.parse(odd)]
    assert fold.notes == {}


def test_of_overlapping_subnets_of_other_lengths_the_one_that_was_there_counts() -> None:
    wide, narrow = lease("10.5.2.0/23", ip="198.18.0.2", created=9), lease("10.5.3.0/26", ip="198.18.0.3", created=5)
    fold = folded(wide, narrow)
    assert list(fold.remotes) == [Prefix.parse("10.5.3.0/26")]
    assert "was there before" in fold.notes[key(wide)]


SUBNETS = ["10.5.2.0/24", "10.5.2.0/26", "10.5.2.64/26", "10.5.3.0/24", "10.5.1.0/24", "10.5.0.0/22", "10.9.0.0/24"]
some_leases = st.builds(
    lease,
    st.sampled_from(SUBNETS),
    st.sampled_from(["198.18.0.1", "198.18.0.2", "198.18.0.3", "127.0.0.1"]),
    st.sampled_from([None, "fd00:5:0:2::/64"]),
    st.just("2001:db8::9"),
    st.sampled_from(["vxlan", "host-gw"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["", "a", "b"]),
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
    assert not any(one.overlaps(other) for one, other in combinations(step_by_step.remotes, 2))
    assert not step_by_step.remotes.keys() & step_by_step.unserved.keys()


@given(st.lists(some_leases.filter(lambda one: key(one) != "10.5.2.0-24"), max_size=8))
def test_whoever_comes_later_takes_no_address_from_a_host_that_was_there(others: list[Lease]) -> None:
    there = lease("10.5.2.0/24", "198.18.0.44", created=1, identity="c")
    fold = folded(there, *(other._replace(created=other.created + 2) for other in others))
    assert fold.remotes[Prefix.parse("10.5.2.0/24")].public_ip == parse_ip("198.18.0.44")
    assert [subnet for subnet in fold.remotes if subnet.overlaps(Prefix.parse("10.5.2.0/24"))] == [there.subnet]


def differs(before: dict[Prefix, Remote], fold: Fold, subnet: Prefix) -> bool:
    return before.get(subnet) != fold.remotes.get(subnet)
