"""Peers on the nodes of a cluster: what a node means, and that no change is missed (contract 9.6 to 9.12, 11.13)."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from flanneld.lab.kubeapi import KubeApi
from flanneld.model.lease import Lease
from flanneld.sources.kube_watch import Pace
from tests.support.hosts import net_conf
from tests.support.kube import BRISK, CONF, KubeHost, MakeKubeHost, Site, published
from tests.support.wait import until

both_dialects = pytest.mark.parametrize("server", ["1.36", "1.20"], indirect=True)
"""With a server that streams lists, and one that gives pages only."""
pages = pytest.mark.parametrize("server", ["1.20"], indirect=True)


async def following(host: KubeHost, peers: int) -> KubeHost:
    """Begin to follow, and wait for so many peers of this test."""
    host.follow()
    await until(lambda: host.table.complete and len(host.peers) == peers)
    return host


@both_dialects
async def test_a_cluster_without_peers_is_a_complete_list(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", "10.5.1.0/24")
    await following(host(), 0)


@both_dialects
async def test_all_nodes_of_many_pages_are_listed(site: Site, host: MakeKubeHost) -> None:
    for number in range(5):
        await site.create(f"n{number}", f"10.5.{number}.0/24", annotations=published(f"192.0.2.{number + 1}"))
    a = await following(host(), 5)
    assert a.subnets() == {f"n{number}": f"10.5.{number}.0/24" for number in range(5)}


async def test_nodes_come_change_and_go(site: Site, host: MakeKubeHost) -> None:
    a = await following(host(), 0)
    await site.create("b", "10.5.2.0/24", annotations=published())
    await until(lambda: a.subnets() == {"b": "10.5.2.0/24"})
    await site.annotate("b", published("192.0.2.10"))
    await until(lambda: a.peers["b"].attrs.where() == "192.0.2.10")
    await site.annotate("b", published("192.0.2.10", backend_data='{"VNI":2}'))
    await until(lambda: a.peers["b"].attrs.data == b'{"VNI":2}')
    await site.delete("b")
    await until(lambda: not a.peers)


async def test_a_node_whose_managed_annotation_is_removed_is_no_peer_any_more(site: Site, host: MakeKubeHost) -> None:
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = await following(host(), 1)
    await site.annotate("b", published(kube_subnet_manager=None))
    await until(lambda: not a.peers)
    await site.annotate("b", published())
    await until(lambda: a.peers)


async def test_a_pod_cidr_that_comes_later_than_the_annotations_counts(site: Site, host: MakeKubeHost) -> None:
    await site.create("b", annotations=published())
    a = await following(host(), 0)
    await site.assign("b", "10.5.2.0/24")
    await until(lambda: a.subnets() == {"b": "10.5.2.0/24"})


async def test_a_node_made_anew_with_another_pod_cidr_has_that_one(site: Site, host: MakeKubeHost) -> None:
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = await following(host(), 1)
    await site.delete("b")
    await site.create("b", "10.5.7.0/24", annotations=published())
    await until(lambda: a.subnets() == {"b": "10.5.7.0/24"})


async def test_a_dual_stack_update_of_one_family_is_not_lost(site: Site, host: MakeKubeHost) -> None:
    dual = published(public_ipv6="2001:db8::9", backend_v6_data='{"VNI":1,"VtepMAC":"02:00:00:00:00:0a"}')
    await site.create("b", "10.5.2.0/24", "fd00:5:0:2::/64", annotations=dual)
    a = await following(host(), 1)
    assert a.subnets() == {"b": "10.5.2.0/24+fd00:5:0:2::/64"}
    await site.annotate("b", {"flannel.alpha.coreos.com/public-ipv6": "2001:db8::10"})
    await until(lambda: a.peers["b"].attrs.where() == "192.0.2.9+2001:db8::10")
    await site.annotate("b", {"flannel.alpha.coreos.com/public-ip": "192.0.2.10"})
    await until(lambda: a.peers["b"].attrs.where() == "192.0.2.10+2001:db8::10")


@pytest.mark.parametrize(
    "bad",
    [
        {"public_ip": "192.0.2.300"},
        {"public_ip": "2001:db8::1"},
        {"backend_data": '{"VNI":'},
        {"backend_data": "[" * 5000},
        {"public_ip": None},
    ],
)
async def test_a_node_that_says_nonsense_costs_itself_and_one_log_line(
    bad: dict[str, Any], site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("bad", "10.5.2.0/24", annotations={k: v for k, v in published(**bad).items() if v})
    await site.create("good", "10.5.3.0/24", annotations=published())
    a = await following(host(), 1)
    await site.patch("bad", {"metadata": {"labels": {"x": "y"}}})
    await site.create("last", "10.5.4.0/24", annotations=published())
    await until(lambda: set(a.peers) == {"good", "last"})
    assert sum(site.node("bad") in record.getMessage() for record in caplog.records) == 1
    await site.annotate("bad", published())
    await until(lambda: "bad" in a.peers)


async def test_heartbeats_and_bookmarks_change_nothing(site: Site, host: MakeKubeHost) -> None:
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = await following(host(), 1)
    before = list(a.changes)
    await site.patch("b", {"metadata": {"labels": {"beat": "1"}}})
    at = int((await site.get("b"))["metadata"]["resourceVersion"])
    await until(lambda: a.table.revision >= at)
    assert a.changes == before
    assert a.subnets() == {"b": "10.5.2.0/24"}


async def test_the_table_says_up_to_which_revision_it_is_current(site: Site, host: MakeKubeHost) -> None:
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = await following(host(), 1)
    assert a.store.mark == str(a.table.revision) != "0"
    await site.create("c", "10.5.3.0/24", annotations=published())
    revision = int((await site.get("c"))["metadata"]["resourceVersion"])
    await until(lambda: a.table.revision >= revision)


async def test_with_alloc_only_the_own_node_is_watched(site: Site, host: MakeKubeHost) -> None:
    """There are no peers to tell of (contract 9.12)."""
    await site.create("a", "10.5.1.0/24")
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = host()
    await a.run(net_conf(CONF.v4)._replace(backend_type="alloc"))
    await until(lambda: a.subnets() == {"a": "10.5.1.0/24"})


@pages
async def test_a_page_that_is_too_large_is_asked_for_again_in_halves(
    fake: KubeApi, site: Site, host: MakeKubeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flanneld.sources.kube_watch._PAGE_BYTES", 40_000)
    for number in range(8):
        fake.create_node(site.node(f"n{number}"), [f"10.5.{number}.0/24"], _texts(published()), None, 10_000)
    a = await following(host(pace=Pace(page_nodes=8)), 8)
    limits = [int(seen.request.query["limit"]) for seen in fake.requests if "limit" in seen.request.query]
    assert limits[0] == 8
    assert limits[-1] == 2
    assert len(a.peers) == 8


@pages
async def test_a_page_whose_snapshot_is_gone_begins_the_list_anew(
    fake: KubeApi, site: Site, host: MakeKubeHost
) -> None:
    """HTTP 410 for a ``continue`` token: the list took longer than the server's history."""
    for number in range(6):
        fake.create_node(site.node(f"n{number}"), [f"10.5.{number}.0/24"], _texts(published()))
    fake.faults.delay_s = 0.05
    a = host(pace=BRISK._replace(page_nodes=1))
    a.follow()
    await until(lambda: len(fake.requests) > 2)
    fake.create_node(site.node("late"), ["10.5.9.0/24"], _texts(published()))
    fake.store.compact()
    await until(lambda: a.table.complete)
    assert len(a.peers) == 7
    assert 410 in {seen.code for seen in fake.requests}


async def test_a_node_with_a_very_long_line_is_read(fake: KubeApi, site: Site, host: MakeKubeHost) -> None:
    a = await following(host(), 0)
    fake.faults.piece_bytes = 1000
    fake.create_node(site.node("big"), ["10.5.2.0/24"], _texts(published()), None, 300_000)
    await until(lambda: a.subnets() == {"big": "10.5.2.0/24"})


async def test_lines_may_be_cut_anywhere(fake: KubeApi, site: Site, host: MakeKubeHost) -> None:
    fake.faults.piece_bytes = 7
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = await following(host(), 1)
    await site.annotate("b", published("192.0.2.10"))
    await until(lambda: _where(a.peers.get("b")) == "192.0.2.10")


async def test_an_old_revision_seen_by_an_earlier_run_keeps_peers_for_a_while(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster restored from a backup must not take working peers away at once (failure F16)."""
    await site.create("b", "10.5.2.0/24", annotations=published())
    await site.create("c", "10.5.3.0/24", annotations=published())
    a = await following(host(grace_s=1.5), 2)
    remembered = dict(a.table.items())
    await site.delete("c")
    again = host("again", grace_s=1.5)
    again.table.restore(remembered)
    again.store.expect(str(a.table.revision + 1_000_000))
    again.follow()
    await until(lambda: again.table.complete)
    assert set(again.peers) == {"b", "c"}
    assert "older than before" in caplog.text
    await until(lambda: set(again.peers) == {"b"})


def _texts(annotations: dict[str, str | None]) -> dict[str, str]:
    return {name: text for name, text in annotations.items() if text is not None}


def _where(lease: Lease | None) -> str:
    return lease.attrs.where() if lease else ""


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
