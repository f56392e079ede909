"""What the probe measured and how it is told."""

from __future__ import annotations

import json
import time

import pytest

from tests.faults.inject import Result, Round
from tests.faults.probe import Late, Outcome, Probe, Route
from tests.faults.registry import fault
from tests.faults.report import markdown, text, to_json, verdict
from tests.support.netns import Netns

LOST = [Late(100.000 + ms / 1000, 100.050, True) for ms in range(10, 50)]
OUTCOME = Outcome("a to b", 1000, 0, (Late(99.0, 99.010, False), *LOST, Late(100.5, 100.520, False)))


def test_an_outage_is_the_longest_wait_and_counts_from_when_the_surroundings_are_whole() -> None:
    assert OUTCOME.lost() == 40
    assert OUTCOME.outage_ms() == pytest.approx(40)
    assert OUTCOME.lost(100.030) == 20
    assert OUTCOME.outage_ms(100.030) == pytest.approx(20)
    assert OUTCOME.outage_ms(100.6) == 0


def test_rows_say_what_is_wrong_and_what_is_slow() -> None:
    table, other = fault("FDB flushed"), fault("device deleted")
    assert verdict(Result(table, "vxlan", (Round(1, 1.0, 3.0),), ())) == "ok"
    assert verdict(Result(table, "vxlan", (Round(1, 1.0, 3.0), Round(80, 80.0, 90.0)), ())) == "ok, slow"
    assert verdict(Result(other, "vxlan", (Round(80, 80.0, 90.0),), ())) == "ok"
    assert verdict(Result(table, "vxlan", (), ("h1: the neighbour is not there",))).startswith("RED: h1: the neigh")


def test_tables_name_every_row_and_set_go_flanneld_beside_it() -> None:
    results = [
        Result(fault("main table flushed"), "host-gw", (Round(3, 3.0, 5.0), Round(9, 9.0, 11.0)), ()),
        Result(fault("FDB flushed"), "vxlan", (Round(1, 1.0, None),), ("broken",)),
    ]
    for shown in (text(results, ["head"]), markdown(results, ["head"])):
        assert "6.5 s" in shown
        assert "6 / 9" in shown
        assert "RED: broken" in shown
        assert "1 of 2 rows are as they must be" in shown
    assert json.loads(json.dumps(to_json(results)))[0]["rounds"][1]["repair_ms"] == 11.0


@pytest.mark.kernel
def test_the_probe_sees_every_packet_and_each_that_a_firewall_drops() -> None:
    with Netns("flprobe") as space:
        streams = [
            Route("steady", space.name, "127.0.0.1", space.name, "127.0.0.2"),
            Route("fresh", space.name, "127.0.0.1", space.name, "127.0.0.3", True, "127.0.0.1"),
        ]
        with Probe(streams) as probe:
            time.sleep(0.3)  # traffic; nothing is waited for
            steady, fresh = probe.end()
        assert steady.lost() == fresh.lost() == 0
        assert steady.sent + steady.skipped > 250
        with Probe(streams) as probe:
            space.run("ip", "route", "add", "blackhole", "127.0.0.2", "table", "local")
            space.run("ip", "route", "del", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
            begun = time.time()
            time.sleep(0.1)
            space.run("ip", "route", "add", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
            space.run("ip", "route", "del", "blackhole", "127.0.0.2", "table", "local")
            time.sleep(0.1)
            steady, _ = probe.end()
        assert steady.lost(begun) >= 90
        assert 90 <= steady.outage_ms(begun) < 5000
