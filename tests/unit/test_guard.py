"""What becomes of our key, case by case; how the cases follow one another is explored in ``tests/model``."""

from __future__ import annotations

import pytest

from flanneld.model.addr import Prefix, parse_ip
from flanneld.model.lease import Claim, Lease, LeaseAttrs, OwnLease
from flanneld.plan.allocate import Subnets
from flanneld.plan.claim import Create, Remove, Take, is_displaced, tunnel_ends
from flanneld.plan.guard import MAX_RESTORES, Act, Found, Loss, Stake, beaten, clashes, is_clone, look, rival
from flanneld.sources.keeper import LOSSES


def attrs(number: int, identity: str = "", mac: int = 0) -> LeaseAttrs:
    data = b'{"VNI":1,"VtepMAC":"0A:00:00:00:00:%02X"}' % mac if mac else b""
    return LeaseAttrs(parse_ip(f"192.0.2.{number}"), data=data, identity=identity)


def subnets(text: str, text6: str = "") -> Subnets:
    return Subnets(Prefix.parse(text), Prefix.parse(text6) if text6 else None)


ME = attrs(1, "me", 1)
OWN = OwnLease("10.5.1.0-24", Lease(Prefix.parse("10.5.1.0/24"), None, ME, revision=20, ttl_id=9), 100.0)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (None, Act.CREATE),
        (Found(ME, 20, 7), Act.CONFIRM),
        (Found(attrs(1), 25, 7), Act.RESTORE),
        (Found(None, 25, 7), Act.RESTORE),
        (Found(attrs(1, mac=1), 25, 7), Act.RESTORE),  # Go flanneld on this host adopted our device (contract 13.15)
        (Found(attrs(1, mac=9), 25, 7), Loss.DOUBLED),
        (Found(attrs(9, "you", 9), 25, 7), Loss.STOLEN),
        (Found(attrs(1, "you", 9), 25, 7), Loss.STOLEN),
        (Found(attrs(9, "me", 1), 25, 7), Loss.CLONED),
        (Found(attrs(9, "you", 9), 25, 24), Loss.TAKEN),
        (Found(attrs(9, "me", 1), 25, 24), Loss.TAKEN),
    ],
)
def test_our_key_is_judged_by_who_wrote_it_and_whether_it_was_gone(found: Found | None, what: Act | Loss) -> None:
    assert look(found, OWN, ME, granted=True, due=False, restores=0, same_store=True) is what


def test_a_restored_store_proves_nobody_right() -> None:
    """Its revisions are of an older time, so "made anew" cannot be told."""
    found = Found(attrs(9, "you"), 25, 24)
    assert look(found, OWN, ME, granted=True, due=False, restores=0, same_store=False) is Loss.STOLEN


def test_a_writer_that_insists_is_left_alone_until_the_next_renewal() -> None:
    found = Found(attrs(1), 25, 7)
    assert look(found, OWN, ME, granted=True, due=False, restores=MAX_RESTORES, same_store=True) is Act.LEAVE
    assert look(found, OWN, ME, granted=True, due=True, restores=MAX_RESTORES, same_store=True) is Act.WRITE


def test_a_renewal_writes_what_is_there_already_and_never_over_another() -> None:
    assert look(Found(ME, 20, 7), OWN, ME, granted=True, due=True, restores=0, same_store=True) is Act.WRITE
    stolen = Found(attrs(9, "you"), 25, 7)
    assert look(stolen, OWN, ME, granted=True, due=True, restores=0, same_store=True) is Loss.STOLEN


def test_our_value_under_another_writers_etcd_lease_is_put_under_ours() -> None:
    assert look(Found(ME, 25, 7), OWN, ME, granted=False, due=False, restores=0, same_store=True) is Act.RESTORE


def test_every_loss_says_who_and_where_and_what_to_do() -> None:
    for loss in Loss:
        sentence = LOSSES[loss].format(subnet="10.5.1.0/24", other="machine you at 192.0.2.9", us="we are machine me")
        assert "10.5.1.0/24" in sentence
        assert "machine you" in sentence
        assert any(word in sentence for word in ("delete that key", "leasing another", "write another id")), sentence


def test_of_two_keys_that_overlap_the_older_one_stays() -> None:
    mine = Stake("a", subnets("10.5.1.0/24", "fd00:1::/64"), 10)
    older = Stake("b", subnets("10.5.1.0/24", "fd00:2::/64"), 9)
    younger, apart = older._replace(created=11), Stake("c", subnets("10.5.2.0/24"), 1)
    assert beaten([mine, older], "a", mine.subnets, 10) == "b"
    assert beaten([mine, younger, apart], "a", mine.subnets, 10) is None
    assert rival([mine, younger], "a", mine.subnets) == "b"
    assert rival([mine, apart], "a", mine.subnets) is None


def test_a_key_that_went_or_changed_hands_while_we_looked_is_not_ours() -> None:
    mine = Stake("a", subnets("10.5.1.0/24"), 10)
    assert beaten([], "a", mine.subnets, 10) == "a"
    assert beaten([mine._replace(created=12)], "a", mine.subnets, 10) == "a"


def test_clones_clash_where_their_tunnel_ends_are_one() -> None:
    assert is_clone(attrs(9, "me"), ME)
    assert not is_clone(attrs(1, "me"), ME)
    assert not is_clone(attrs(9, "you"), ME)
    assert clashes(attrs(9, "me", 1), ME)
    assert not clashes(attrs(9, "me", 2), ME)
    assert not clashes(attrs(9, "me"), attrs(1, "me"))


def test_tunnel_ends_are_found_in_any_case_and_family() -> None:
    both = LeaseAttrs(None, data=b'{"vtepmac" : "0a:00:00:00:00:01"}', data6=b'{"VtepMAC":"0A:00:00:00:00:02"}')
    assert tunnel_ends(both) == {b"0a:00:00:00:00:01", b"0a:00:00:00:00:02"}


def test_only_who_uses_its_subnet_is_displaced_by_another() -> None:
    before, lease = (Prefix.parse("10.5.1.0/24"), None), OWN.lease
    elsewhere = Create(subnets("10.5.2.0/24"), "")
    assert is_displaced(elsewhere, Claim(ME, before, in_use=True))
    assert not is_displaced(elsewhere, Claim(ME, before))
    assert not is_displaced(Take("k", lease, ""), Claim(ME, before, in_use=True))
    assert is_displaced(
        Take("k", lease._replace(subnet=Prefix.parse("10.5.2.0/24")), ""), Claim(ME, before, in_use=True)
    )
    assert not is_displaced(Remove("k", lease), Claim(ME, before, in_use=True))
