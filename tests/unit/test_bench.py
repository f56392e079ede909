"""The benchmark's own arithmetic: what it would print is true of what it has seen."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from types import SimpleNamespace
from typing import cast

import pytest

from flanneld.kernel import neigh_codec, route_codec
from flanneld.model.addr import IP, MAC, Prefix
from flanneld.model.lease_codec import decode_attrs, parse_key
from flanneld.model.objects import Fdb, Neighbour, Route
from tests.bench.cases import percentile
from tests.bench.hollow import MAX_PEERS, Peer, peers
from tests.bench.metrics import GO, METRICS, TARGETS
from tests.bench.observe import Goal, Watcher
from tests.bench.plot import plots
from tests.bench.report import Results, figure, markdown, verdict

PEER = Peer.number(258)
ROUTE = route_codec.route(Route(Prefix(IP(PEER.subnet), 24), "flannel.1", IP(PEER.subnet), onlink=True), 3)
NO_ROUTE = route_codec.route(
    Route(Prefix(IP(PEER.subnet), 24), "flannel.1", IP(PEER.subnet), onlink=True), 3, delete=True
)
NEIGHBOUR = neigh_codec.neighbour(Neighbour("flannel.1", IP(PEER.subnet), MAC(PEER.mac)), 3)
FDB = neigh_codec.fdb(Fdb("flannel.1", MAC(PEER.mac), IP(PEER.public_ip)), 3)


def watcher(*datagrams: bytes) -> Watcher:
    """A watcher to which these came, a nanosecond apart."""
    return cast(Watcher, SimpleNamespace(arrived=list(enumerate(datagrams, 1))))


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp", "alloc"])
def test_a_hollow_lease_reads_like_a_real_one(backend: str) -> None:
    subnet, _ = parse_key(PEER.key)
    attrs = decode_attrs(PEER.value(backend))
    assert str(subnet) == "10.1.2.0/24"
    assert attrs.where() == "198.19.1.2"
    assert attrs.backend_type == ("" if backend in ("udp", "alloc") else backend)
    assert attrs.data == (b'{"VNI":1,"VtepMAC":"02:be:0c:00:01:02"}' if backend == "vxlan" else b"")


def test_no_two_hollow_peers_share_anything() -> None:
    everyone = peers(1, MAX_PEERS)
    for column in zip(*everyone, strict=True):
        assert len(set(column)) == MAX_PEERS


def test_the_daemons_own_subnet_is_left_to_it() -> None:
    assert PEER.subnet not in {peer.subnet for peer in peers(250, 20, but=PEER.subnet)}


def test_a_peer_is_programmed_when_its_last_entry_has_come() -> None:
    goal = Goal(PEER.kernel_keys("vxlan"))
    assert not goal.look(watcher(FDB, NEIGHBOUR))
    assert goal.look(watcher(FDB, NEIGHBOUR, ROUTE))
    assert goal.reached_ns == 3


def test_an_entry_that_goes_again_counts_as_missing() -> None:
    goal = Goal(PEER.kernel_keys("host-gw"))
    seen = watcher(ROUTE, NO_ROUTE)
    assert not goal.look(seen)
    seen.arrived.append((9, ROUTE))
    assert goal.look(seen)
    assert goal.reached_ns == 9


def test_the_kernel_is_clean_when_every_entry_has_gone() -> None:
    goal = Goal(PEER.kernel_keys("host-gw"), present=False)
    assert not goal.look(watcher(ROUTE))
    assert goal.look(watcher(ROUTE, NO_ROUTE))


def test_entries_of_others_do_not_count() -> None:
    assert not Goal(Peer.number(7).kernel_keys("host-gw")).look(watcher(ROUTE, ROUTE))


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100)])
def test_percentiles_are_nearest_ranks(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_a_missed_target_says_by_how_much() -> None:
    assert verdict(METRICS["env"], 0.4, 0.4) == "ok"
    assert verdict(METRICS["env"], 0.8, 0.4) == "missed ×2.00"
    assert verdict(METRICS["tcp_share"], 0.5, 1.0) == "missed ×2.00"
    assert verdict(METRICS["env"], None, 0.4) == "missed"
    assert verdict(METRICS["misses_lost"], 3.0, 0.0) == "missed"


def test_every_target_and_reference_is_of_a_known_metric() -> None:
    assert {cell[0] for cell in (*TARGETS, *GO)} <= METRICS.keys()


def results() -> Results:
    """Two daemons at two sizes, one figure not in time."""
    found = Results(["ours", "go"])
    for size in (10, 50_000):
        for daemon, factor in (("ours", 1), ("go", 3)):
            found.add(("programmed", "vxlan", size), daemon, size * factor / 1e4)
    found.add(("programmed", "vxlan", 50_000), "go", None)
    found.add(("programmed", "vxlan", 50_000), "go", None)
    return found


def test_a_figure_that_mostly_did_not_come_has_no_median() -> None:
    (line,) = [line for line in markdown(results(), [], []).splitlines() if "50000" in line]
    assert "not in time" in line
    assert "| 5 |" in line


def test_plots_are_images_with_a_point_for_each_figure() -> None:
    ((name, svg),) = plots(results())
    assert name == "programmed.svg"
    shapes = [element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()]
    assert shapes.count("circle") == 3
    assert shapes.count("polyline") == 2


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0123456, "0.0123"), (12.34, "12.3"), (5000.0, "5000"), (1234.5, "1234"), (0.0, "0")]
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert figure(value) == shown
