"""Every way in which an API server fails, and that no peer is lost over it and no change missed (failures F24, F42).

Each scenario begins with a host at work and one peer, lets something go wrong, changes the cluster meanwhile, and
wants the change to arrive without a peer having left the table in between.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

import pytest

from flanneld.errors import Unavailable
from flanneld.lab.kubeapi import (
    INTERNAL_ERROR,
    STORE_TIMEOUT,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    Authority,
    KubeApi,
    Timing,
)
from flanneld.lab.kubeapi.faults import StreamEnd
from flanneld.lab.kubeapi.message import Answer
from tests.support.kube import BRISK, PREFIX, KubeHost, MakeKubeHost, Site, published, watching
from tests.support.wait import until, until_read

REFUSALS = {"429": TOO_MANY_REQUESTS, "500": INTERNAL_ERROR, "503": UNAVAILABLE, "504 without kind": STORE_TIMEOUT}
refusals = pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
both_dialects = pytest.mark.parametrize("server", ["1.36", "1.20"], indirect=True)
pages = pytest.mark.parametrize("server", ["1.20"], indirect=True)


class Scene:
    """A host at work on node a, with peer b."""

    def __init__(self, api: KubeApi, site: Site, host: KubeHost, log: pytest.LogCaptureFixture) -> None:
        self.api, self.site, self.host = api, site, host
        self._log = log

    def add(self, name: str, subnet: str) -> None:
        """Make a peer by the administrator's hand: the door may be shut."""
        texts = {key: text for key, text in published().items() if text}
        self.api.create_node(self.site.node(name), [subnet], texts)

    def remove(self, name: str) -> None:
        """Delete a node, likewise."""
        self.api.delete_node(self.site.node(name))

    async def told(self, text: str) -> None:
        """Wait until the log says something."""
        await until(lambda: text in self._log.text, what=text)

    def warnings(self) -> int:
        """How many lines the log has above INFO."""
        return sum(record.levelno > logging.INFO for record in self._log.records)

    async def goes_on(self) -> None:
        """A peer that comes now is heard of, and one that goes; nobody else was missing in between."""
        self.add("last", "10.5.99.0/24")
        await until(lambda: "last" in self.host.peers)
        self.remove("last")
        await until(lambda: "last" not in self.host.peers)
        assert set(self.host.peers) >= {"a", "b"}
        assert min(self.host.sizes) >= 2


@pytest.fixture
async def scene(fake: KubeApi, site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture) -> Scene:
    caplog.set_level(logging.INFO)
    await site.create("a", "10.5.1.0/24")
    await site.create("b", "10.5.2.0/24", annotations=published())
    a = host(request_s=1.0, pace=BRISK._replace(silence_s=2.0), grace_s=2.0)
    await a.run()
    await watching(fake)
    await until(lambda: set(a.peers) == {"a", "b"})
    a.sizes.clear()
    return Scene(fake, site, a, caplog)


# ---- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["finish", "cut", "reset", "half_line"])
async def test_a_watch_that_ends_goes_on_where_it_was(end: StreamEnd, scene: Scene) -> None:
    lists = len(scene.host.changes)
    for number in range(3, 6):
        scene.api.end_watches(end)
        scene.add(f"n{number}", f"10.5.{number}.0/24")
        await until(lambda n=number: f"n{n}" in scene.host.peers)  # type: ignore[misc]
    await scene.goes_on()
    assert "leases listed" not in scene.host.changes[lists:]


async def test_watches_that_a_load_balancer_ends_all_the_time_lose_nothing_and_fill_no_log(scene: Scene) -> None:
    scene.api.faults.end_watches_after_s = 0.05
    scene.api.end_watches()
    for number in range(3, 8):
        scene.add(f"n{number}", f"10.5.{number}.0/24")
        await until(lambda n=number: f"n{n}" in scene.host.peers)  # type: ignore[misc]
    await scene.goes_on()
    assert scene.warnings() <= 1


async def test_a_watch_that_falls_silent_is_left(scene: Scene) -> None:
    """A half-dead server: the connection stands, and no bookmark comes."""
    scene.api.faults.mute_watches = True
    scene.add("c", "10.5.3.0/24")
    await scene.told("nothing came over the watch for 2 s")
    scene.api.faults.clear()
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()


async def test_a_stopped_server_is_survived(scene: Scene) -> None:
    """SIGSTOP: its kernel takes connections and acknowledges, nobody reads."""
    await scene.api.pause()
    scene.add("c", "10.5.3.0/24")
    await scene.told("watch of nodes broken")
    assert set(scene.host.peers) == {"a", "b"}
    await scene.api.resume()
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()


async def test_a_killed_server_is_survived(scene: Scene) -> None:
    await scene.api.stop()
    scene.add("c", "10.5.3.0/24")
    await scene.told("watch of nodes broken")
    await scene.api.start()
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()


async def test_an_event_told_twice_is_no_change(scene: Scene) -> None:
    before = list(scene.host.changes)
    for _ in range(5):
        scene.api.repeat_event(scene.site.node("b"))
    revision = scene.api.store.version
    await until(lambda: scene.host.table.revision >= revision)
    assert scene.host.changes == before
    await scene.goes_on()


async def test_revisions_may_jump(scene: Scene) -> None:
    scene.api.store.advance_to(scene.api.store.version + 5_000_000)
    await scene.goes_on()


# ---- history that is gone -----------------------------------------------------------------------------------------


@both_dialects
async def test_after_a_restart_the_nodes_are_listed_again_and_deletions_are_seen(scene: Scene) -> None:
    """The usual end of a resumed watch: an ERROR with code 410 inside an answer of 200."""
    scene.add("c", "10.5.3.0/24")
    await until(lambda: "c" in scene.host.peers)
    await scene.api.stop()
    scene.remove("c")
    scene.add("d", "10.5.4.0/24")
    scene.api.store.forget_events()
    await scene.api.start()
    await until(lambda: set(scene.host.peers) == {"a", "b", "d"})
    assert "leases listed" in scene.host.changes
    await scene.goes_on()


async def test_an_answer_410_to_a_watch_lists_again(scene: Scene) -> None:
    gone = b'{"kind":"Status","apiVersion":"v1","status":"Failure","message":"too old","reason":"Gone","code":410}'
    scene.api.faults.refuse(Answer.json([gone], 410), times=1, verbs={"watch"})
    scene.host.changes.clear()
    scene.add("c", "10.5.3.0/24")
    scene.api.end_watches("cut")
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()
    assert 410 in {seen.code for seen in scene.api.requests}


async def test_a_cluster_restored_from_a_backup_is_noticed_and_costs_no_peer_at_once(
    scene: Scene, authority: Authority
) -> None:
    """A watch from the future is no error but silence (failure F16)."""
    scene.add("c", "10.5.3.0/24")
    await until(lambda: "c" in scene.host.peers)
    scene.api.store.advance_to(1000)
    await scene.goes_on()
    await scene.api.stop()
    port = int(scene.api.url.rpartition(":")[2])
    async with KubeApi(tls=authority.issue("127.0.0.1"), port=port, timing=Timing(bookmark_s=1.0)) as restored:
        texts = {key: text for key, text in published().items() if text}
        restored.create_node(scene.site.node("a"), ["10.5.1.0/24"])
        restored.create_node(scene.site.node("b"), ["10.5.2.0/24"], texts)
        await scene.told("older than before")
        assert set(scene.host.peers) == {"a", "b", "c"}
        await until(lambda: set(scene.host.peers) == {"a", "b"})  # c never came back
        await until_read(lambda: scene.site.annotations("a"), lambda found: found.get("public-ip") == "192.0.2.1")


# ---- refusals and delays ------------------------------------------------------------------------------------------


@both_dialects
@refusals
async def test_a_server_that_refuses_for_a_while_is_survived(refusal: Answer, scene: Scene) -> None:
    scene.api.faults.refuse(refusal, times=3)
    scene.api.store.forget_events()
    scene.add("c", "10.5.3.0/24")
    scene.api.end_watches("cut")
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()


async def test_a_server_that_refuses_for_long_fills_no_log(scene: Scene) -> None:
    scene.api.faults.refuse(UNAVAILABLE)
    scene.api.end_watches("cut")
    await until(lambda: sum(seen.code == 503 for seen in scene.api.requests) >= 5)
    assert scene.warnings() == 1
    scene.api.faults.clear()
    await scene.goes_on()
    await scene.told("watch of nodes works again")


async def test_headers_that_drip_are_cut_off(scene: Scene) -> None:
    scene.api.faults.drip_s = 0.05
    with pytest.raises(Unavailable, match="does not answer within 1 s"):
        await scene.host.store.operator_addresses()
    scene.api.end_watches("cut")
    await scene.told("watch of nodes broken")
    scene.api.faults.clear()
    await scene.goes_on()


@pytest.mark.parametrize("greeting", ["silent", "reset"])
async def test_connections_that_lead_nowhere_are_left(greeting: Literal["silent", "reset"], scene: Scene) -> None:
    scene.api.faults.on_connect = greeting
    await scene.api.drop_connections(reset=True)
    await scene.told("watch of nodes broken")
    scene.api.faults.clear()
    await scene.goes_on()


@pages
async def test_a_list_cut_in_the_middle_is_asked_for_again(scene: Scene) -> None:
    scene.api.faults.cut_body_after = 300
    scene.add("c", "10.5.3.0/24")
    await scene.api.restart()
    await until(lambda: sum(seen.verb == "list" for seen in scene.api.requests) >= 4)
    assert set(scene.host.peers) == {"a", "b"}
    scene.api.faults.clear()
    await until(lambda: "c" in scene.host.peers)
    await scene.goes_on()


async def test_an_interrupted_stream_of_the_list_is_begun_again(scene: Scene) -> None:
    for number in range(3, 9):
        scene.add(f"n{number}", f"10.5.{number}.0/24")
    await until(lambda: len(scene.host.peers) == 8)
    scene.api.faults.piece_bytes = 200
    scene.api.store.forget_events()
    await scene.api.restart()
    for _ in range(4):
        await until(lambda: scene.api.watches)
        scene.api.end_watches("cut")
    scene.api.faults.clear()
    await scene.goes_on()
    assert len(scene.host.peers) == 8


# ---- our own node -------------------------------------------------------------------------------------------------


@refusals
async def test_writes_that_are_refused_are_repeated(refusal: Answer, scene: Scene) -> None:
    scene.api.faults.refuse(refusal, times=2, verbs={"patch"})
    await scene.host.store.network_is_up()
    assert (await scene.site.condition("a") or {})["status"] == "False"
    scene.api.faults.refuse(refusal, times=1, verbs={"get", "patch"})
    scene.api.annotate(scene.site.node("a"), {PREFIX + "public-ip": "203.0.113.1"})
    await until(
        lambda: scene.api.node(scene.site.node("a"))["metadata"]["annotations"][PREFIX + "public-ip"] == "192.0.2.1"
    )


async def test_a_write_whose_answer_got_lost_is_repeated_without_harm(scene: Scene) -> None:
    scene.api.faults.cut_body_after = 10
    up = asyncio.create_task(scene.host.store.network_is_up())
    await until(lambda: sum(seen.verb == "get" for seen in scene.api.requests) >= 3)
    scene.api.faults.clear()
    await up
    assert (await scene.site.condition("a") or {})["status"] == "False"
    await scene.goes_on()


async def test_a_host_that_starts_before_the_api_server_waits(
    fake: KubeApi, site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """All start orders work (failure F42)."""
    await site.create("a", "10.5.1.0/24")
    await fake.stop()
    a = host(request_s=1.0)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await a.store.operator_addresses()
    acquiring = asyncio.create_task(a.acquire())
    a.follow()
    await until(lambda: "waiting for our subnet" in caplog.text and "nodes cannot be listed" in caplog.text)
    await fake.start()
    assert (await acquiring).lease.name() == "10.5.1.0/24"
    await until(lambda: "a" in a.peers)
