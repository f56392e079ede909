"""Paging under every order of events: leases, misses, page-outs, routes of the underlay, a device that changes.

The kernel here is the fake one of the scenarios; each step writes what the daemon would write, so that at any
moment the tables must equal what was asked for, and what was asked for must follow from the leases alone.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backends import vxlan_pages
from backends.vxlan import Overlay, Peer
from backends.vxlan_pages import Pages
from flanneld.model.addr import IP, MAC, Family, Prefix, parse_ip, parse_mac
from flanneld.model.mtu import TunnelMTU
from flanneld.model.objects import Fdb, Link, Neighbour, Route, RouteKind, Vxlan
from flanneld.model.state import Desired, State
from flanneld.plan.diff import Op, Verb, plan_changes
from tests.support.fake_kernel import FakeKernel

NETWORK = Prefix.parse("10.0.0.0/20")
OWN = Prefix.parse("10.0.1.0/24")
OWN_IP = parse_ip("198.18.0.1")
VXLAN = Vxlan(1, 2, OWN_IP, 8472)
OVERLAY = Overlay(
    Family.V4, "flannel.1", parse_mac("02:00:00:00:00:01"), NETWORK, OWN, TunnelMTU(1450), "eth0", "x", VXLAN
)

# Few of each, so that they collide: nested subnets, hosts with two subnets, two hosts with one MAC.
# No two begin at one address; ``plan/fold.py`` sees to that.
BLOCKS = [Prefix.parse(f"10.0.{n}.0/24") for n in (0, 2, 3, 4, 8, 15)]
BLOCKS += [Prefix.parse(text) for text in ("10.0.2.64/26", "10.0.4.128/25", "10.0.12.0/22", "10.0.14.0/23")]
MACS = [parse_mac(f"02:00:00:00:01:{n:02x}") for n in range(4)]
HOSTS = [parse_ip(f"198.18.0.{n}") for n in range(2, 6)]

blocks = st.sampled_from(BLOCKS)
peers = st.builds(
    *(Peer, blocks, st.sampled_from(MACS), st.sampled_from(HOSTS), st.integers(0, 3)),
    *(st.integers(1, 3), st.sampled_from(["", "", "a", "b"])),
)
addresses = st.one_of(
    st.integers(NETWORK.first, NETWORK.last).filter(lambda value: not OWN.first <= value <= OWN.last),
    st.sampled_from([block.first for block in BLOCKS]),
).map(lambda value: IP(value.to_bytes(4, "big")))


def bed(page_ahead: int) -> tuple[Pages, Desired, FakeKernel]:
    """Pages with nothing in them, over a device that is there."""
    desired = Desired()
    kernel = FakeKernel({"eth0": True})
    link = Link("flannel.1", OVERLAY.mac, 1450, True, "x", VXLAN)
    kernel.state.add(link)
    return Pages(OVERLAY, desired, page_ahead), desired, kernel


class Events(RuleBasedStateMachine):
    """What happens to a host's tables, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: dict[Prefix, Peer] = {}
        self.unserved: set[Prefix] = set()
        self.direct: dict[IP, str] = {}
        self.answers: dict[IP, MAC] = {}

    @initialize(page_ahead=st.integers(0, 4))
    def begin(self, page_ahead: int) -> None:
        self.page_ahead = page_ahead
        self.pages, self.desired, self.kernel = bed(page_ahead)

    def write(self, ops: list[Op]) -> None:
        assert self.kernel.apply_now(ops) == []

    def write_changes(self) -> None:
        self.write(plan_changes(self.desired.take_changes(), self.desired))

    def taken(self, changes: dict[Prefix, Peer | None], full: bool) -> None:
        if full:
            self.pages.settle(self.leases, self.unserved, dict(self.direct))
        else:
            self.pages.update(changes, self.unserved, self.pages.direct_with({}))
        self.write_changes()

    # ---- what happens -------------------------------------------------------------------------

    @rule(peer=peers, full=st.booleans())
    def lease(self, peer: Peer, full: bool) -> None:
        self.leases[peer.subnet] = peer
        self.unserved.discard(peer.subnet)
        self.taken({peer.subnet: peer}, full)

    @rule(subnet=blocks, full=st.booleans(), unserved=st.booleans())
    def release(self, subnet: Prefix, full: bool, unserved: bool) -> None:
        known = self.leases.pop(subnet, None) is not None
        (self.unserved.add if unserved else self.unserved.discard)(subnet)
        self.taken({subnet: None} if known else {}, full)

    @rule(host=st.sampled_from(HOSTS), direct=st.booleans())
    def underlay_routes_change(self, host: IP, direct: bool) -> None:
        if direct:
            self.direct[host] = "eth0"
        else:
            self.direct.pop(host, None)
        self.taken({}, full=True)

    @rule()
    def page_ahead_of_need(self) -> None:
        self.pages.fill()
        self.write_changes()

    @rule(mtu=st.sampled_from((1400, 1450)))
    def device_changes(self, mtu: int) -> None:
        self.pages.reload(OVERLAY._replace(mtu=TunnelMTU(mtu)))
        self.write_changes()

    @rule(ip=addresses)
    def miss(self, ip: IP) -> None:
        ops = self.pages.answer_ip(ip)
        self.desired.applied(op.obj for op in ops)
        self.write(ops)
        peer = self.find(ip)
        last = ops[-1].obj
        if peer is None:
            assert isinstance(last, Neighbour)
            assert (last.ip, last.mac) == (ip, b"")  # refused, so that the sender hears of it
            return
        assert peer.subnet in self.pages.resident
        order = [type(op.obj) for op in ops]
        assert [kind for kind in order if kind is not Route] in ([Fdb, Neighbour], [Fdb, Neighbour, Neighbour])
        opened = last if isinstance(last, Neighbour) else ops[1].obj
        assert isinstance(opened, Neighbour)
        assert (opened.ip, opened.mac) == (ip, peer.mac)
        self.answers[ip] = peer.mac

    @rule(mac=st.sampled_from(MACS))
    def frame_without_forwarding_entry(self, mac: MAC) -> None:
        ops = self.pages.answer_mac(mac)
        self.desired.applied(op.obj for op in ops)
        self.write(ops)
        self.write_changes()
        served = {p.mac: p.public_ip for p in self.expected().values() if not self.direct.get(p.public_ip)}
        assert [op.obj for op in ops] == ([Fdb("flannel.1", mac, served[mac])] if mac in served else [])

    @rule(used=st.sets(st.sampled_from(MACS)), idle_s=st.floats(300, 1000))
    def page_out(self, used: set[MAC], idle_s: float) -> None:
        before = dict(self.pages.resident)
        tunnelled = {s for s, objects in before.items() if isinstance(objects[0], Fdb)}
        clock = {entry.mac: 1.0 if entry.mac in used else idle_s for entry in self.kernel.state.fdb.values()}
        answered = [n for n in self.kernel.state.neighbours.values() if not n.permanent]
        ops = self.pages.page_out(clock, 300.0, answered)
        self.desired.applied(op.obj for op in ops)
        self.write(ops)
        gone = before.keys() - self.pages.resident.keys()
        assert len(tunnelled) - len(gone) >= min(len(tunnelled), self.page_ahead)
        assert not {s for s in gone if self.leases[s].mac in used}
        assert gone <= tunnelled
        assert {op.verb for op in ops} <= {Verb.DELETE}
        # in the order in which a packet in between waits and is not dropped
        for subnet in gone:
            _fdb, neighbour, route = before[subnet]
            written = [op.obj for op in ops]
            assert written.index(route) < written.index(neighbour)
        for at, op in enumerate(ops):
            if isinstance(op.obj, Fdb):
                assert not [o for o in ops[at:] if isinstance(o.obj, Neighbour) and o.obj.mac == op.obj.mac]
                assert not [n for n in self.kernel.state.neighbours.values() if n.mac == op.obj.mac]
        for entry in answered:
            found = self.find(entry.ip)
            if found is not None and found.subnet in gone:
                assert entry.ip not in {n.ip for n in self.kernel.state.neighbours.values()}

    # ---- what must be so at any moment ---------------------------------------------------------

    def expected(self) -> dict[Prefix, Peer]:
        """Of hosts with one MAC only the machine that signed first, or that was written last where none did."""
        winner = {}
        for mac in {p.mac for p in self.leases.values()}:
            holders = [p for p in self.leases.values() if p.mac == mac]
            first = min((p for p in holders if p.identity), key=lambda p: (p.created, p.subnet), default=None)
            holders = [p for p in holders if first is None or p.identity == first.identity]
            winner[mac] = max(holders, key=lambda p: (p.revision, p.subnet)).public_ip
        return {s: p for s, p in self.leases.items() if winner[p.mac] == p.public_ip}

    def find(self, ip: IP) -> Peer | None:
        holders = [p for s, p in self.expected().items() if s.covers(ip)]
        return max(holders, key=lambda p: p.subnet.length, default=None)

    @invariant()
    def peers_are_those_that_can_work_and_the_others_are_told(self) -> None:
        assert self.pages.peers == self.expected()
        assert self.pages.notes.keys() == self.leases.keys() - self.expected().keys()

    @invariant()
    def what_is_wanted_follows_from_leases_and_residents_alone(self) -> None:
        assert self.pages.resident.keys() <= self.pages.peers.keys()
        scratch = State()
        for subnet in self.pages.resident:
            peer = self.expected()[subnet]
            for obj in OVERLAY.peer_objects(peer, self.direct.get(peer.public_ip, "")):
                scratch.add(obj)
        voids = {r for r in self.desired.routes if r.kind is RouteKind.UNREACHABLE}
        assert set(self.desired) - voids == set(scratch)
        assert len(self.desired.fdb) == len(scratch.fdb)

    @invariant()
    def direct_peers_are_always_in_the_tables(self) -> None:
        direct = {s for s, p in self.expected().items() if self.direct.get(p.public_ip)}
        assert direct <= self.pages.resident.keys()

    @invariant()
    def the_kernel_has_what_is_wanted(self) -> None:
        state = self.kernel.state
        assert dict(state.routes) == dict(self.desired.routes)
        missing = [str(obj) for obj in self.desired if obj not in state]
        assert missing == []

    @invariant()
    def refused_blocks_touch_no_peer_and_stay_few(self) -> None:
        voids = [r.dst for r in self.desired.routes if r.kind is RouteKind.UNREACHABLE]
        for void in voids:
            assert not [str(s) for s in self.pages.peers if s.overlaps(void)], str(void)
            assert NETWORK.covers(void)
            assert void != NETWORK
        # one for each length and side of each gap; a scan of everything costs no more
        assert len(voids) <= 2 * NETWORK.family.bits * (len(self.leases) + len(self.unserved) + 2)

    @precondition(lambda self: self.leases)
    @rule(ip=addresses)
    def the_longest_prefix_wins(self, ip: IP) -> None:
        assert self.pages.find(ip) == self.find(ip)


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Scan(NamedTuple):
    leased: list[str]
    at_most: int


SCANS = [Scan([], 5), Scan(["10.0.2.0/24"], 6), Scan([f"10.0.{n}.0/24" for n in (2, 5, 9, 14)], 14)]


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_of_the_whole_network_costs_one_entry_for_each_gap(scan: Scan) -> None:
    pages, desired, kernel = bed(0)
    leases = {
        Prefix.parse(text): Peer(Prefix.parse(text), MAC(bytes((2, 0, 0, 0, 0, 9 + n))), HOSTS[n % 4], 0)
        for n, text in enumerate(scan.leased)
    }
    pages.settle(leases, (), {})
    for value in range(NETWORK.first, NETWORK.last + 1):
        ip = IP(value.to_bytes(4, "big"))
        if any(r.dst.covers(ip) for r in kernel.state.routes):
            continue  # what an unreachable or a peer's own route covers asks no more
        ops = pages.answer_ip(ip)
        assert kernel.apply_now(ops) == []
    voids = [r for r in desired.routes if r.kind is RouteKind.UNREACHABLE]
    assert len(voids) <= scan.at_most
    assert len(pages.resident) == len(leases)
    free = NETWORK.size - sum(subnet.size for subnet in leases)
    assert sum(r.dst.size for r in voids) == free


def test_the_number_of_refused_blocks_is_bounded_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vxlan_pages, "MAX_VOIDS", 3)
    pages, desired, kernel = bed(0)
    leases = {
        s: Peer(s, MAC(bytes((2, 0, 0, 0, 1, n))), HOSTS[0], 0) for n, s in enumerate(NETWORK.subnets(24)) if n % 2
    }
    leases.pop(OWN, None)
    pages.settle(leases, (), {})
    gaps = [s for n, s in enumerate(NETWORK.subnets(24)) if not n % 2]
    for gap in gaps:
        ops = pages.answer_ip(gap.host(7))
        assert kernel.apply_now(ops) == []
        assert len(kernel.state.routes) <= 3
    assert [r.dst for r in desired.routes] == gaps[-3:]
    assert dict(kernel.state.routes) == dict(desired.routes)


def test_an_address_outside_the_network_is_refused_without_a_route() -> None:
    """Somebody routed it onto our device; the block is not ours to close."""
    pages, desired, _kernel = bed(0)
    pages.settle({}, (), {})
    [op] = pages.answer_ip(parse_ip("192.0.2.7"))
    assert op.obj == Neighbour("flannel.1", parse_ip("192.0.2.7"), MAC(b""), permanent=False)
    assert list(desired) == []


@pytest.mark.parametrize(
    ("there", "newcomer", "wins"),
    [
        ("a", "b", False),  # a stranger with a peer's MAC takes nothing from it
        ("a", "", False),
        ("a", "a", True),  # a machine that moved, or whose address changed
        ("", "", True),  # the same with Go flanneld, which says nothing of itself
        ("", "b", True),
    ],
)
def test_a_mac_stays_with_the_machine_that_signed_a_lease_with_it(there: str, newcomer: str, wins: bool) -> None:
    pages, _desired, _kernel = bed(8)
    old = Peer(BLOCKS[0], MACS[0], HOSTS[0], revision=5, created=5, identity=there)
    new = Peer(BLOCKS[1], MACS[0], HOSTS[1], revision=9, created=9, identity=newcomer)
    pages.settle({old.subnet: old, new.subnet: new}, (), {})
    assert list(pages.peers) == [new.subnet if wins else old.subnet]


def test_a_restart_takes_over_what_is_in_the_tables_and_changes_nothing() -> None:
    pages, _desired, kernel = bed(0)
    leases = {s: Peer(s, MAC(bytes((2, 0, 0, 0, 1, n))), HOSTS[n % 4], 0) for n, s in enumerate(BLOCKS[:6])}
    pages.settle(leases, (), {})
    for subnet in BLOCKS[:3]:
        kernel.apply_now(pages.answer_ip(subnet.host(9)))
    again, desired, _ = bed(0)
    again.settle(leases, (), {})
    again.adopt(kernel.state)
    assert again.resident == pages.resident
    assert set(desired) <= set(kernel.state)


def test_the_same_peers_are_paged_ahead_whatever_the_order_of_leases() -> None:
    chosen = set()
    leases = [Peer(s, MAC(bytes((2, 0, 0, 0, 1, n))), HOSTS[n % 4], 0) for n, s in enumerate(BLOCKS)]
    for turn in range(len(leases)):
        pages, _desired, _kernel = bed(3)
        pages.settle({p.subnet: p for p in leases[turn:] + leases[:turn]}, (), {})
        pages.fill()
        chosen.add(frozenset(pages.resident))
    assert len(chosen) == 1


@pytest.mark.parametrize("missed", ["10.0.9.9", "10.0.11.200"])
def test_a_block_out_of_reach_around_a_peer_never_closes_the_way_to_that_peer(missed: str) -> None:
    """A lease of another backend or of an earlier SubnetLen may hold a whole range in which a peer lives."""
    pages, desired, _kernel = bed(0)
    inside = Prefix.parse("10.0.8.0/24")
    pages.settle({inside: Peer(inside, MACS[0], HOSTS[0], 0)}, [Prefix.parse("10.0.8.0/22")], {})
    pages.answer_ip(parse_ip(missed))
    voids = [r.dst for r in desired.routes if r.kind is RouteKind.UNREACHABLE]
    assert voids
    assert not [str(void) for void in voids if void.overlaps(inside)]
    assert all(void.covers(parse_ip(missed)) for void in voids)


def test_a_void_vanishes_when_a_lease_comes_inside_it() -> None:
    pages, desired, _kernel = bed(0)
    outer, inside = Prefix.parse("10.0.8.0/22"), Prefix.parse("10.0.8.0/24")
    pages.settle({}, [outer], {})
    pages.answer_ip(parse_ip("10.0.9.9"))
    assert [r for r in desired.routes if r.dst.overlaps(inside)]
    pages.update({inside: Peer(inside, MACS[0], HOSTS[0], 0)}, [outer], {})
    assert not [r for r in desired.routes if r.kind is RouteKind.UNREACHABLE and r.dst.overlaps(inside)]


def test_voids_of_a_network_that_shrank_are_taken_back() -> None:
    pages, desired, _kernel = bed(0)
    pages.settle({}, (), {})
    pages.answer_ip(parse_ip("10.0.9.9"))
    pages.reload(OVERLAY._replace(network=Prefix.parse("10.0.0.0/21")))
    pages.settle({}, (), {})
    assert list(desired.routes) == []
