"""The planner's promises (style section 1, rules 1 to 4), on arbitrary pairs of wanted and found states.

The universe is small so that wanted, found and foreign things collide; the fake kernel is verified against
the real one by ``tests/scenario``.
"""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld.model.addr import Family, Prefix, parse_ip, parse_mac
from flanneld.model.objects import (
    METRIC_VOID,
    PROTO_BOOT,
    PROTO_OURS,
    Address,
    Fdb,
    KernelObject,
    Link,
    Neighbour,
    Route,
    RouteKind,
    Scope,
    Sysctl,
    Vxlan,
)
from flanneld.model.state import State
from flanneld.plan.diff import Op, Verb, compatible, plan, plan_changes
from flanneld.plan.ownership import Ownership
from tests.support.fake_kernel import FakeKernel

DEVICE = "flannel.1"
ALIAS = "flanneld /x"
NETWORK = Prefix.parse("10.5.0.0/16")
OWN = Ownership(frozenset({DEVICE}), ALIAS, (NETWORK,), frozenset({24}), "eth0")
VXLAN = Vxlan(1, 2, parse_ip("198.18.0.1"), 8472)
LINK = Link(DEVICE, parse_mac("02:00:00:00:00:01"), 1450, True, ALIAS, VXLAN)

ADDRESS = Address(DEVICE, parse_ip("10.5.1.0"), 32)
MACS = [parse_mac(f"02:00:00:00:01:{n:02x}") for n in range(3)]
HOSTS = [parse_ip(f"198.18.0.{n}") for n in range(2, 5)]
SUBNETS = [Prefix.parse(text) for text in ("10.5.2.0/24", "10.5.3.0/24", "10.5.128.0/17", "10.9.0.0/24")]
INNER = [subnet.ip for subnet in SUBNETS] + [parse_ip("10.5.2.9")]

macs, hosts, subnets, inner = (st.sampled_from(each) for each in (MACS, HOSTS, SUBNETS, INNER))

tunnel_routes = st.builds(lambda s: Route(s, DEVICE, s.ip, onlink=True), subnets)
direct_routes = st.builds(lambda s, h: Route(s, "eth0", h, proto=PROTO_OURS), subnets, hosts)
void_routes = st.builds(
    lambda s: Route(s, "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=METRIC_VOID), subnets
)
wanted_entries: st.SearchStrategy[KernelObject] = st.one_of(
    st.builds(Fdb, st.just(DEVICE), macs, hosts),
    st.builds(Neighbour, st.just(DEVICE), inner, macs),
    st.builds(lambda ip: Address(DEVICE, ip, 32), inner),
    st.builds(Sysctl, st.just(f"net/ipv4/neigh/{DEVICE}/app_solicit"), st.just("3")),
    tunnel_routes,
    direct_routes,
    void_routes,
)
found_links = st.builds(
    Link,
    st.just(DEVICE),
    st.sampled_from([LINK.mac, MACS[0]]),
    st.sampled_from([1450, 1300]),
    st.booleans(),
    st.sampled_from([ALIAS, "", "somebody's"]),
    st.sampled_from([VXLAN, VXLAN._replace(vni=7), VXLAN._replace(local=HOSTS[0]), VXLAN._replace(gbp=True), None]),
    st.sampled_from(["", "master #9", "arp off, ttl 3"]),
)
former_device = LINK._replace(name="flannel.7", vxlan=VXLAN._replace(vni=7), up=True)
found_entries: st.SearchStrategy[KernelObject] = st.one_of(
    wanted_entries,
    st.builds(Neighbour, st.just(DEVICE), inner, macs, st.just(False)),
    st.builds(
        Address,
        st.sampled_from([DEVICE, "eth0"]),
        inner,
        st.sampled_from([24, 32]),
        st.sampled_from([None, INNER[0]]),
        st.sampled_from([Scope.UNIVERSE, Scope.LINK]),
    ),
    st.builds(Sysctl, st.just(f"net/ipv4/neigh/{DEVICE}/app_solicit"), st.sampled_from(["0", "3"])),
    st.builds(
        Route,
        subnets,
        st.sampled_from([DEVICE, "eth0"]),
        st.none() | hosts,
        proto=st.sampled_from([PROTO_BOOT, PROTO_OURS, 4, 2]),
        metric=st.sampled_from([0, 100]),
    ),
    st.just(Route(SUBNETS[0], "", kind=RouteKind.BLACKHOLE, proto=4, metric=100)),
)


@st.composite
def wanted_states(draw: st.DrawFn) -> State:
    """What a data path wants: a device with an address and entries; of each destination one route."""
    state = State.of([LINK, ADDRESS, *draw(st.lists(wanted_entries, max_size=12))])
    ways: dict[tuple[object, ...], Route] = {}
    for route in list(state.routes):
        if ways.setdefault((route.dst, route.metric), route) is not route:
            state.discard(route)
    return state


@st.composite
def found_kernels(draw: st.DrawFn) -> FakeKernel:
    """What a kernel may hold: entries only on devices that are there, routes only on those that are up."""
    kernel = FakeKernel({"eth0": True})
    link = draw(st.none() | found_links)
    links = [each for each in (link, former_device if draw(st.booleans()) else None) if each is not None]
    for each in links:
        kernel.state.add(each)
    up = {"eth0", "", *(each.name for each in links if each.up)}
    there = {"eth0", *(each.name for each in links)}
    taken: set[tuple[object, ...]] = set()
    for obj in draw(st.lists(found_entries, max_size=12)):
        name = "eth0" if isinstance(obj, Sysctl | Link) else obj.link
        if isinstance(obj, Sysctl) and link is None:
            continue
        if isinstance(obj, Route):
            if obj.link in up and (obj.dst, obj.metric) not in taken:
                taken.add((obj.dst, obj.metric))
                kernel.state.add(obj)
        elif name in there and (name, obj) not in taken:
            if isinstance(obj, Address):  # once, of whatever scope
                taken.update((name, obj._replace(scope=scope)) for scope in Scope)
            kernel.state.add(obj)
    return kernel


def in_the_way(desired: State, kernel: FakeKernel) -> set[Route]:
    """Wanted routes whose place somebody else holds: those fail, and say so."""
    foreign = {(r.dst, r.metric): r for r in kernel.state.routes if not OWN.owns(r)}
    return {r for r in desired.routes if (held := foreign.get((r.dst, r.metric))) is not None and held != r}


def foreign(state: State) -> set[KernelObject]:
    """What is not ours and does not hang on a device of ours."""
    ours = {DEVICE, former_device.name}
    return {
        obj
        for obj in state
        if not OWN.owns(obj)
        and not isinstance(obj, Sysctl)
        and (getattr(obj, "link", "") not in ours)
        and not (isinstance(obj, Link) and obj.name in ours)
    }


@settings(max_examples=400)
@given(wanted_states(), found_kernels())
def test_rule_1_what_is_applied_comes_to_the_wanted_state_and_what_was_foreign(
    desired: State, kernel: FakeKernel
) -> None:
    blocked, before = in_the_way(desired, kernel), foreign(kernel.state)
    for _ in range(2):  # one round; a second one shows that nothing is left to do
        ops = plan(desired, kernel.state, OWN)
        failures = kernel.apply_now(ops)
        assert {f.op.obj for f in failures} <= blocked
        assert {f.error.code for f in failures} <= {errno.EEXIST}
    assert [str(obj) for obj in desired if obj not in kernel.state and obj not in blocked] == []
    assert before <= set(kernel.state)
    surplus = {o for o in kernel.state if OWN.owns(o) and o not in desired and not isinstance(o, Neighbour)}
    assert {str(obj) for obj in surplus} == set()
    assert {
        str(n) for n in kernel.state.neighbours.values() if n.permanent and n not in desired and OWN.owns(n)
    } == set()


@settings(max_examples=300)
@given(wanted_states(), found_kernels())
def test_rule_2_one_round_is_enough_and_an_equal_state_needs_none(desired: State, kernel: FakeKernel) -> None:
    blocked = in_the_way(desired, kernel)
    kernel.apply_now(plan(desired, kernel.state, OWN))
    assert {str(op) for op in plan(desired, kernel.state, OWN) if op.obj not in blocked} == set()
    assert plan(desired, desired, OWN) == []


@settings(max_examples=300)
@given(wanted_states(), found_kernels(), st.booleans())
def test_rule_3_no_operation_names_what_is_not_ours(desired: State, kernel: FakeKernel, deletions: bool) -> None:
    for op in plan(desired, kernel.state, OWN, deletions=deletions):
        if op.verb is Verb.DELETE:
            assert OWN.owns(op.obj), str(op)
        elif isinstance(op.obj, Link):
            assert op.obj.name in desired.links
        else:
            assert op.obj in desired, str(op)
        if isinstance(op.was, Route):
            assert OWN.owns(op.was), "a route of somebody else would be replaced"


@settings(max_examples=300)
@given(wanted_states(), found_kernels(), st.randoms(use_true_random=False))
def test_rule_3_the_order_in_which_things_are_wanted_or_found_does_not_matter(
    desired: State, kernel: FakeKernel, random: st.DataObject
) -> None:
    def shuffled(state: State) -> State:
        objects = list(state)
        random.shuffle(objects)  # type: ignore[attr-defined]
        return State.of(objects)

    plain = plan(desired, kernel.state, OWN)
    mixed = plan(shuffled(desired), shuffled(kernel.state), OWN)
    assert sorted(map(str, plain)) == sorted(map(str, mixed))
    assert [kind(op) for op in plain] == [kind(op) for op in mixed]


def kind(op: Op) -> tuple[Verb, type]:
    return op.verb, type(op.obj)


RANK = [
    (Verb.DELETE, Link),
    (Verb.CREATE, Link),
    (Verb.PUT, Sysctl),
    (Verb.PUT, Address),
    (Verb.PUT, Fdb),
    (Verb.PUT, Neighbour),
    (Verb.PUT, Route),
    (Verb.DELETE, Route),
    (Verb.DELETE, Neighbour),
    (Verb.DELETE, Fdb),
    (Verb.DELETE, Address),
]


@settings(max_examples=300)
@given(wanted_states(), found_kernels())
def test_rule_4_adding_goes_from_the_ground_up_and_deleting_back_and_after_it(
    desired: State, kernel: FakeKernel
) -> None:
    kinds = [kind(op) for op in plan(desired, kernel.state, OWN)]
    ranks = [RANK.index(each) for each in kinds if each != (Verb.PUT, Link)]
    assert ranks == sorted(ranks)
    if (Verb.CREATE, Link) in kinds:  # a new device is furnished, then set up, then gets its entries
        up = kinds.index((Verb.PUT, Link))
        assert all(RANK.index(each) <= RANK.index((Verb.PUT, Address)) for each in kinds[:up])
        assert all(RANK.index(each) > RANK.index((Verb.PUT, Address)) for each in kinds[up + 1 :])


@settings(max_examples=300)
@given(wanted_states(), found_kernels())
def test_rule_6_nothing_that_peers_may_need_is_deleted_before_the_leases_are_known(
    desired: State, kernel: FakeKernel
) -> None:
    ops = plan(desired, kernel.state, OWN, deletions=False)
    deleted = [op.obj for op in ops if op.verb is Verb.DELETE]
    assert {type(obj) for obj in deleted} <= {Link, Address, Route}
    known = {route.dst for route in desired.routes}
    assert not any(NETWORK.covers(obj.dst) and obj.dst not in known for obj in deleted if isinstance(obj, Route))


def test_a_host_tools_default_route_on_our_device_goes_before_the_leases_are_known_too() -> None:
    """Failures F31, in a start without the store: no lease could ever ask for it."""
    grabbed = Route(Prefix.parse("0.0.0.0/0"), DEVICE, metric=5)
    found = State()
    found.add(LINK)
    found.add(grabbed)
    wanted = State()
    wanted.add(LINK)
    assert plan(wanted, found, OWN, deletions=False) == [Op(Verb.DELETE, grabbed)]


@settings(max_examples=300)
@given(wanted_states(), wanted_states())
def test_a_short_cycle_comes_to_the_same_as_a_full_one(before: State, after: State) -> None:
    """When all else is right, what changed is enough (addresses and settings change in full cycles only)."""
    kernel = FakeKernel({"eth0": True})
    kernel.apply_now(plan(before, kernel.state, OWN))
    for state in (before, after):
        state.addresses = {ADDRESS: ADDRESS}
        state.sysctls.clear()
    kernel.apply_now(plan(before, kernel.state, OWN))
    changed = [obj for obj in (*before, *after) if (obj in before) is not (obj in after)]
    assert kernel.apply_now(plan_changes(changed, after)) == []
    assert [str(op) for op in plan(after, kernel.state, OWN)] == []


# ---- single promises ------------------------------------------------------------------------------


def test_a_new_mac_costs_the_neighbours_and_they_are_written_again() -> None:
    entry = Neighbour(DEVICE, INNER[0], MACS[0])
    desired = State.of([LINK, entry])
    observed = State.of([LINK._replace(mac=MACS[2]), entry])
    assert [op.obj for op in plan(desired, observed, OWN)] == [LINK, entry]


def test_a_device_that_the_kernel_would_not_change_is_made_anew_with_all_that_hangs_on_it() -> None:
    entry = Fdb(DEVICE, MACS[0], HOSTS[0])
    desired = State.of([LINK, entry])
    observed = State.of([LINK._replace(vxlan=VXLAN._replace(local=HOSTS[2])), entry])
    assert [kind(op) for op in plan(desired, observed, OWN)] == [(Verb.PUT, Link)]
    again = plan(desired, observed, OWN, recreate=frozenset({DEVICE}))
    assert [kind(op) for op in again] == [
        (Verb.DELETE, Link),
        (Verb.CREATE, Link),
        (Verb.PUT, Link),
        (Verb.PUT, Fdb),
    ]


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"learning": True}, True),
        ({"lower": 9}, True),
        ({"local": parse_ip("198.18.0.9")}, True),
        ({"local": parse_ip("2001:db8::1")}, False),
        ({"local": None}, False),
        ({"vni": 2}, False),
        ({"port": 4789}, False),
        ({"gbp": True}, False),
        ({"group": parse_ip("239.1.1.1")}, False),
    ],
)
def test_a_device_stays_when_a_change_in_place_is_enough(change: dict[str, object], stays: bool) -> None:
    """Contract 6.12, without the miss flags: a device made by Go flanneld has none and works."""
    found = LINK._replace(vxlan=VXLAN._replace(**change))  # type: ignore[arg-type]
    assert compatible(LINK, found) is stays
    assert not compatible(LINK, LINK._replace(vxlan=None))


def test_an_answer_that_became_wrong_is_taken_back_and_a_right_one_stays() -> None:
    wrong, right = (Neighbour(DEVICE, ip, MACS[0], permanent=False) for ip in INNER[:2])
    desired, observed = State.of([LINK]), State.of([LINK, wrong, right])
    ops = plan(desired, observed, OWN, answer_is_right=lambda entry: entry == right)
    assert ops == [Op(Verb.DELETE, wrong)]


def test_an_ipv6_address_of_another_length_goes_before_ours_comes_and_an_ipv4_one_after() -> None:
    for base, length, family in (("fd00:5:0:1::", 64, Family.V6), ("10.5.1.0", 24, Family.V4)):
        ours = Address(DEVICE, parse_ip(base), family.bits)
        other = ours._replace(length=length)
        ops = plan(State.of([LINK, ours]), State.of([LINK, other]), OWN)
        expected = [Op(Verb.DELETE, other), Op(Verb.PUT, ours)]
        assert ops == (expected if family is Family.V6 else expected[::-1])


def test_a_route_that_gives_way_to_another_is_replaced_and_not_deleted_as_well() -> None:
    """A packet in between would find no route."""
    tunnelled = Route(SUBNETS[0], DEVICE, SUBNETS[0].ip, onlink=True)
    direct = Route(SUBNETS[0], "eth0", HOSTS[0], proto=PROTO_OURS)
    for old, new in ((tunnelled, direct), (direct, tunnelled)):
        desired = State.of([LINK, new])
        assert plan(desired, State.of([LINK, old]), OWN) == [Op(Verb.PUT, new, old)]
        assert plan_changes([old, new], desired) == [Op(Verb.PUT, new, old)]
