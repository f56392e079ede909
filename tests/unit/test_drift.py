"""Which notifications are damage, which need a look, which are nobody's business; and how a repair is told."""

from __future__ import annotations

from functools import partial

import pytest

from flanneld.model.addr import MAC, Prefix, parse_ip, parse_mac
from flanneld.model.objects import (
    METRIC_VOID,
    PROTO_BOOT,
    PROTO_OURS,
    Address,
    Fdb,
    Link,
    Neighbour,
    Route,
    RouteKind,
    Sysctl,
    Vxlan,
)
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb, plan
from flanneld.plan.drift import Entry, judge, repairs
from flanneld.plan.ownership import Ownership

DEVICE = "flannel.1"
OWN = Ownership(frozenset({DEVICE}), "flanneld /x", (Prefix.parse("10.5.0.0/16"),), frozenset({24}), "eth0")
MAC1, MAC2, MAC9 = (parse_mac(f"02:00:00:00:00:0{n}") for n in (1, 2, 9))
LINK = Link(DEVICE, MAC1, 1450, True, "flanneld /x", Vxlan(1, 2, parse_ip("198.18.0.1"), 8472))
FDB = Fdb(DEVICE, MAC2, parse_ip("198.18.0.2"))
NEIGHBOUR = Neighbour(DEVICE, parse_ip("10.5.2.0"), MAC2)
ROUTE = Route(Prefix.parse("10.5.2.0/24"), DEVICE, parse_ip("10.5.2.0"), onlink=True)
DIRECT = Route(Prefix.parse("10.5.3.0/24"), "eth0", parse_ip("198.18.0.3"), proto=PROTO_OURS)
VOID = Route(Prefix.parse("10.5.128.0/17"), "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=METRIC_VOID)
ADDRESS = Address(DEVICE, parse_ip("10.5.1.0"), 32)
DESIRED = State.of([LINK, ADDRESS, FDB, NEIGHBOUR, ROUTE, DIRECT, VOID])


def judged(obj: Link | Address | Entry, *, new: bool, watch_routes: bool = False) -> str | Entry | None:
    return judge(obj, new=new, desired=DESIRED, own=OWN, watch_routes=watch_routes)


@pytest.mark.parametrize("obj", [FDB, NEIGHBOUR, ROUTE, DIRECT, VOID], ids=str)
def test_an_entry_of_ours_that_goes_is_put_back_and_one_that_comes_is_as_it_should_be(obj: Entry) -> None:
    assert judged(obj, new=False) == obj
    assert judged(obj, new=True) is None


@pytest.mark.parametrize(
    ("came", "damaged"),
    [
        (FDB._replace(dst=parse_ip("198.18.0.99")), FDB),
        (NEIGHBOUR._replace(mac=MAC9), NEIGHBOUR),
        (NEIGHBOUR._replace(permanent=False), NEIGHBOUR),
        (NEIGHBOUR._replace(mac=MAC(b""), permanent=False), NEIGHBOUR),  # the kernel asks for it: it is gone
    ],
    ids=str,
)
def test_an_entry_of_ours_that_was_replaced_is_put_back(came: Entry, damaged: Entry) -> None:
    assert judged(came, new=True) == damaged


def test_an_entry_that_makes_room_for_ours_is_no_damage() -> None:
    assert judged(FDB._replace(dst=parse_ip("198.18.0.99")), new=False) is None


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        (Fdb(DEVICE, MAC9, parse_ip("198.18.0.9")), "fdb"),
        (Neighbour(DEVICE, parse_ip("10.5.9.0"), MAC9), "neighbour"),
        (Route(Prefix.parse("10.5.9.0/24"), DEVICE, parse_ip("10.5.9.0"), onlink=True), "route"),
        (Route(Prefix.parse("0.0.0.0/0"), DEVICE), "route"),  # dhcpcd's default route (failures F31)
        (ROUTE._replace(gateway=parse_ip("10.5.9.0")), "route"),
        (Route(Prefix.parse("10.5.9.0/24"), "eth0", parse_ip("198.18.0.9"), proto=PROTO_OURS), "route"),
        (Route(Prefix.parse("10.5.9.0/24"), "eth0", parse_ip("198.18.0.9"), proto=PROTO_BOOT), "route"),
        (Address(DEVICE, parse_ip("192.168.1.125"), 24), "address flannel.1"),
        (ADDRESS._replace(length=24), "address flannel.1"),
    ],
    ids=str,
)
def test_a_stranger_on_our_device_or_in_our_name_deserves_a_look(obj: Address | Entry, reason: str) -> None:
    assert judged(obj, new=True) == reason
    assert judged(obj, new=False) is None


def test_an_answer_that_is_not_ours_deserves_a_look() -> None:
    """Somebody made it up over the tunnel, and packets would go where it says."""
    lie = Neighbour(DEVICE, parse_ip("10.5.2.9"), MAC9, permanent=False)
    judged_lie = partial(judge, desired=DESIRED, own=OWN, watch_routes=False, answer_is_right=lambda n: n.mac == MAC2)
    assert judged_lie(lie, new=True) == "neighbour"
    assert judged_lie(lie, new=False) is None
    assert judged_lie(lie._replace(link="eth0"), new=True) is None
    assert judged_lie(lie._replace(mac=MAC(b"")), new=True) is None
    assert judged_lie(lie._replace(mac=MAC2), new=True) is None


@pytest.mark.parametrize(
    "obj",
    [
        Fdb("flannel.9", MAC9, parse_ip("198.18.0.9")),
        Neighbour("eth0", parse_ip("198.18.0.9"), MAC9),
        Neighbour(DEVICE, parse_ip("10.5.2.9"), MAC2, permanent=False),  # an answer to a miss
        Neighbour(DEVICE, parse_ip("10.5.2.9"), MAC(b""), permanent=False),  # … or the question
        Route(Prefix.parse("192.0.2.0/24"), "eth0", parse_ip("198.18.0.9")),
        Route(Prefix.parse("192.0.2.0/24"), "eth0", parse_ip("198.18.0.9"), proto=PROTO_OURS),  # a twin's
        Address("cni0", parse_ip("10.5.1.1"), 24),
        Address(DEVICE, parse_ip("fe80::1"), 64),  # the kernel gives every device one
        LINK._replace(name="veth1", alias="", vxlan=None),
    ],
    ids=str,
)
def test_what_is_not_ours_and_in_nobodys_way_is_not_our_business(obj: Link | Address | Entry) -> None:
    assert judged(obj, new=True) is None
    assert judged(obj, new=False) is None


def test_our_address_that_goes_deserves_a_look() -> None:
    assert judged(ADDRESS, new=False) == "address flannel.1"
    assert judged(ADDRESS, new=True) is None


@pytest.mark.parametrize(
    "change",
    [{"up": False}, {"mac": MAC9}, {"mtu": 1400}, {"alias": "mine"}, {"vxlan": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_device_of_ours_deserves_a_look(change: dict[str, object]) -> None:
    assert judged(LINK._replace(**change), new=True) == "link flannel.1"  # type: ignore[arg-type]


def test_a_device_of_ours_that_goes_or_is_renamed_deserves_a_look_and_an_unchanged_one_does_not() -> None:
    assert judged(LINK, new=False) == "link flannel.1"
    assert judged(LINK, new=True) is None
    assert judged(LINK._replace(name="mine"), new=True) == "link mine"  # the alias proves whose it is


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        (Link("eth0", MAC9, 1500, True, "", None), "underlay link"),
        (Address("eth0", parse_ip("198.18.0.1"), 24), "underlay address"),
    ],
    ids=str,
)
def test_whatever_happens_to_the_underlay_deserves_a_look_at_it(obj: Link | Address, reason: str) -> None:
    assert judged(obj, new=True) == judged(obj, new=False) == reason


def test_other_peoples_routes_matter_where_they_decide_something() -> None:
    elsewhere = Route(Prefix.parse("192.0.2.0/24"), "eth1", parse_ip("203.0.113.1"))
    assert judged(elsewhere, new=True, watch_routes=True) == "underlay route"
    blocking = Route(Prefix.parse("10.5.2.0/24"), "eth1", parse_ip("203.0.113.1"), proto=4)
    assert judged(blocking, new=True) == judged(blocking, new=False) == "underlay route"


# ---- audit ----------------------------------------------------------------------------------------


def lines(desired: State, observed: State) -> list[str]:
    return [repair.text for repair in repairs(plan(desired, observed, OWN))]


def test_each_repair_says_what_it_was_and_what_it_is() -> None:
    observed = State.of(
        [
            LINK._replace(up=False, mtu=1400),
            Sysctl("net/ipv4/neigh/flannel.1/app_solicit", "0"),
            ADDRESS,
            FDB._replace(dst=parse_ip("198.18.0.99")),
            Neighbour(DEVICE, parse_ip("10.5.9.0"), MAC9),
            ROUTE._replace(gateway=parse_ip("10.5.9.0")),
            DIRECT,
            VOID,
        ]
    )
    desired = State.of([*DESIRED, Sysctl("net/ipv4/neigh/flannel.1/app_solicit", "3")])
    assert lines(desired, observed) == [
        "restored link flannel.1: it was down, its MTU was 1400, is 1450",
        "restored sysctl net/ipv4/neigh/flannel.1/app_solicit = 3: it was net/ipv4/neigh/flannel.1/app_solicit = 0",
        "restored fdb 02:00:00:00:00:02 dst 198.18.0.2 dev flannel.1: it was "
        "02:00:00:00:00:02 dst 198.18.0.99 dev flannel.1",
        "restored neighbour 10.5.2.0 lladdr 02:00:00:00:00:02 permanent dev flannel.1: it was gone",
        "restored route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink: it was "
        "10.5.2.0/24 via 10.5.9.0 dev flannel.1 onlink",
        "removed neighbour 10.5.9.0 lladdr 02:00:00:00:00:09 permanent dev flannel.1: no lease asks for it",
    ]


def test_a_changed_mac_and_alias_are_told_with_old_and_new() -> None:
    [line, *_] = lines(DESIRED, State.of([*DESIRED, LINK._replace(mac=MAC9, alias="mine")]))
    assert line == (
        "restored link flannel.1: its MAC was 02:00:00:00:00:09, is 02:00:00:00:00:01, its alias was 'mine'"
    )


def test_what_somebody_did_to_a_device_or_entry_that_stays_is_told_in_words() -> None:
    outer = LINK._replace(extra="master #9, arp off, ttl 3")
    [line, *_] = lines(DESIRED, State.of([*DESIRED, outer]))
    assert line == "restored link flannel.1: it had master #9, arp off, ttl 3"
    [line] = lines(DESIRED, State.of([*DESIRED, FDB._replace(permanent=False)]))
    assert line == f"restored {FDB}: it was 02:00:00:00:00:02 dst 198.18.0.2 dev flannel.1 temporary"
    bent = ROUTE._replace(extra="mtu 600")
    [line] = lines(DESIRED, State.of([*(obj for obj in DESIRED if obj != ROUTE), bent]))
    assert line == f"restored {ROUTE}: it was 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink mtu 600"


@pytest.mark.parametrize(
    "changed",
    [LINK._replace(extra="master #9"), FDB._replace(permanent=False), ROUTE._replace(extra="nexthops 2")],
)
def test_a_property_that_ours_never_have_calls_for_a_look(changed: Link | Fdb | Route) -> None:
    assert judged(changed, new=True) is not None


def test_learned_entries_of_hosts_that_are_no_peers_are_left_alone() -> None:
    assert judged(FDB._replace(mac=MAC9, permanent=False), new=True) is None


def test_a_device_made_anew_is_one_line_whatever_hung_on_it() -> None:
    [line, direct, void] = lines(DESIRED, State())
    assert line == "restored link flannel.1: it was gone, with its 4 settings, addresses and entries"
    assert direct.startswith("restored route 10.5.3.0/24")
    assert void.startswith("restored route unreachable 10.5.128.0/17")


def test_a_device_of_another_kind_is_told_as_what_it_was() -> None:
    found = LINK._replace(vxlan=None, up=False)
    [line, *_] = lines(DESIRED, State.of([*DESIRED, found]))
    assert line == (
        "restored link flannel.1: another one was there (flannel.1 02:00:00:00:00:01 mtu 1450 down), "
        "with its 4 settings, addresses and entries"
    )


def test_nothing_to_repair_is_nothing_to_tell() -> None:
    assert lines(DESIRED, DESIRED) == []
    assert [repair.text for repair in repairs([Op(Verb.DELETE, FDB)])] == [f"removed {FDB}: no lease asks for it"]
