"""The recordings once more, against the fake: every request in the order in which it was recorded.

The fake's counter is set to what the recording shows before each exchange, so that resourceVersions can be
compared too. What happened between the recorded requests (another Node made, a watch stirred) is done here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from flanneld.lab.kubeapi import ADMIN_TOKEN, FLANNEL_TOKEN, NOBODY_TOKEN, TOO_MANY_REQUESTS, KubeApi, Timing
from tests.support.http1 import Reply, exchange
from tests.support.wait import until

TRANSCRIPTS = Path(__file__).with_name("transcripts")
PACE = 15
"""How much faster than recorded."""
TOKENS = {
    "<admin>": ADMIN_TOKEN,
    "<flannel>": FLANNEL_TOKEN,
    "<sa>": FLANNEL_TOKEN,
    "<nobody>": NOBODY_TOKEN,
    "<bad>": "no-such-token",
}
ANNOTATIONS = {
    "flannel.alpha.coreos.com/backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}',
    "flannel.alpha.coreos.com/backend-type": "vxlan",
    "flannel.alpha.coreos.com/kube-subnet-manager": "true",
    "flannel.alpha.coreos.com/public-ip": "127.0.0.11",
}
PUBLIC_IP = "flannel.alpha.coreos.com/public-ip"

Json = dict[str, Any]
Beside = Callable[[Reply], Coroutine[None, None, None]]


class Outcome(NamedTuple):
    """A recording and what the fake made of it."""

    recorded: Json
    reply: Reply


def names() -> list[str]:
    """All recordings, by path without suffix."""
    return sorted(str(path.relative_to(TRANSCRIPTS).with_suffix("")) for path in TRANSCRIPTS.rglob("*.json"))


def load(name: str) -> Json:
    """One recording."""
    recorded: Json = json.loads((TRANSCRIPTS / f"{name}.json").read_text())
    return recorded


class Replay:
    """One server and what it has answered so far."""

    def __init__(self, api: KubeApi) -> None:
        self.api = api
        self.outcomes: dict[str, Outcome] = {}
        self._continue = ""

    async def step(self, *names: str, beside: Beside | None = None) -> None:
        """Replay recordings; ``beside`` runs while the answer arrives."""
        for name in names:
            recorded = load(name)
            reply = Reply()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(recorded["request"], reply))
                if beside is not None:
                    group.create_task(beside(reply))
            self.outcomes[name] = Outcome(recorded, reply)
            self._remember_token(recorded["request"], reply)

    async def take_token(self) -> None:
        """Fetch the first page of a list, for its continue token only."""
        request, reply = load("04-list-limit1")["request"], Reply()
        await self._send(request, reply)
        self._remember_token(request, reply)

    def _remember_token(self, request: Json, reply: Reply) -> None:
        if reply.status == 200 and "limit=1" in request["path"]:
            self._continue = reply.json()["metadata"].get("continue", self._continue)

    async def _send(self, request: Json, reply: Reply) -> None:
        headers = dict(request.get("headers", {}))
        if scheme_and_token := headers.pop("Authorization", ""):
            headers["Authorization"] = f"Bearer {TOKENS[scheme_and_token.split()[1]]}"
        target = request["path"].replace("<continue-token>", self._continue)
        body = request.get("body")
        raw = body if isinstance(body, str) else "" if body is None else json.dumps(body)
        raw = raw.replace("<270000 x>", "x" * 270_000)
        await exchange(self.api.url, request["method"], target, headers, raw.encode(), reply=reply)


async def replay_all() -> dict[str, Outcome]:
    """All recordings of 1.36, in the order in which they were made."""
    async with KubeApi(timing=Timing(pace=PACE)) as api:
        replay = Replay(api)
        for part in (_reading, _patching, _watching, _forgetting, _failing):
            await part(replay)
        return replay.outcomes


async def _reading(replay: Replay) -> None:
    api, store = replay.api, replay.api.store
    store.advance_to(205)  # an earlier node-a, which 11-watch-rv1-history-still-cached shows
    api.create_node("node-a", ["10.244.1.0/24", "fd00:10:244:1::/64"], labels={"kubernetes.io/hostname": "node-a"})
    store.advance_to(251)
    api.delete_node("node-a")
    await replay.step("01-readyz", "01-version")
    await replay.step("02-create-node", "02-create-node-exists-409", "02-create-node-invalid-422")
    await replay.step("03-get-401", "03-get-403", "03-get-anonymous-403", "03-get-node-404", "03-get-node")
    await replay.step("03-get-node-sa-token")
    api.create_node("node-b", ["10.244.2.0/24"], labels={"kubernetes.io/hostname": "node-b"})
    await replay.step("04-list", "04-list-403", "04-list-406", "04-list-badfieldselector-400", "04-list-fieldselector")
    await replay.step("04-list-limit-rv0", "04-list-limit1", "04-list-continue", "04-list-metadata-only")
    await replay.step("04-list-rv-garbage-400", "04-list-rv0")
    store.advance_to(255)
    await replay.step("04-list-rv-too-large-504")


async def _patching(replay: Replay) -> None:
    await replay.step("05-patch-nodes-403", "05-patch-status-annotations-strategic")
    await replay.step("05-patch-status-annotations-noop", "05-patch-status-merge")
    await replay.step("05-patch-status-merge-delete-annotation", "05-patch-status-smp-delete-annotation")
    await replay.step("05-patch-status-jsonpatch", "05-patch-jsonpatch-test-fails-422", "05-patch-415")
    await replay.step("05-patch-badjson-400", "05-patch-empty-400", "05-patch-404", "05-patch-403-nobody")
    await replay.step("05-patch-stale-rv-409", "05-patch-badannotation-key-422", "05-patch-annotation-nonstring")
    await replay.step("05-patch-annotation-toolong-422", "05-patch-status-ignores-spec", "05-patch-status-labels")
    await replay.step("05-patch-main-ignores-status", "05-patch-podcidr-change-422")
    await replay.step("05-patch-unknown-field", "05-patch-unknown-field-warn")
    await replay.step("06-conditions-smp-1", "06-conditions-smp-2-NetworkUnavailable", "06-conditions-smp-3-update")
    await replay.step("06-conditions-smp-4-delete", "06-conditions-merge-replaces", "06-conditions-badstatus")
    await replay.step("07-apply-nomanager", "07-apply", "07-method-405", "07-notfound-path-404", "07-put-stale-409")
    replay.api.create_pod("kube-flannel", "kube-flannel-ds-x1", "node-a")
    await replay.step("08-get-pod-nodename")


async def _watching(replay: Replay) -> None:
    api, store = replay.api, replay.api.store

    async def life_of_node_c(_: Reply) -> None:
        await until(lambda: api.watches, what="the watch began")
        api.create_node("node-c")
        await replay.step("11-set-podcidr")
        api.annotate("node-c", ANNOTATIONS)
        api.annotate("node-c", ANNOTATIONS)  # no event
        await replay.step("12-delete-node")

    async def label_on_and_off(_: Reply) -> None:
        await until(lambda: api.watches, what="the watch began")
        api.patch_node("node-b", {"metadata": {"labels": {"pool": "p"}}})
        api.patch_node("node-b", {"metadata": {"labels": {"pool": None}}})

    store.advance_to(285)
    await replay.step("10-list-before-watch")
    await replay.step("11-watch-events", beside=life_of_node_c)
    await replay.step("11-watch-no-bookmarks", "11-watch-rv0", "11-watch-rv-unset", "11-watch-fieldselector-name")
    store.advance_to(293)
    await replay.step("11-watch-initial-events", "11-watch-401", "11-watch-403")
    await replay.step("11-watch-rv-future", "11-watch-rv-garbage")
    store.advance_to(295)
    await replay.step("11-watch-labelselector-transition", beside=label_on_and_off)
    await replay.step("11-watch-rv1-history-still-cached")


async def _forgetting(replay: Replay) -> None:
    api, store = replay.api, replay.api.store

    async def shut_down(reply: Reply) -> None:
        await until(lambda: api.watches, what="the watch began")
        store.advance_to(315)
        await until(lambda: reply.body, what="the bookmark")
        api.end_watches("finish")

    store.advance_to(308)
    await replay.step("13-watch-server-shutdown", beside=shut_down)
    store.advance_to(316)
    await api.restart()
    await replay.step("13-watch-410-too-old", "13-list-exact-rv-410")
    await replay.take_token()
    store.advance_to(317)
    store.compact()
    await replay.step("13-list-continue-410")


async def _failing(replay: Replay) -> None:
    api, store = replay.api, replay.api.store

    async def kill(_: Reply) -> None:
        await until(lambda: api.watches, what="the watch began")
        await api.stop()

    store.advance_to(326)
    api.annotate("node-a", {"tick": "3"})
    store.advance_to(328)
    api.faults.store_stalled = True
    await replay.step("14-etcd-stalled-get", "14-etcd-stalled-list", "14-etcd-stalled-list-rv0")
    await replay.step("14-etcd-stalled-patch", "14-etcd-stalled-readyz")
    api.faults.clear()
    store.advance_to(352)
    await replay.step("13-watch-server-killed", beside=kill)
    await api.start()
    api.faults.refuse(TOO_MANY_REQUESTS)
    await replay.step("15-too-many-requests-429")


async def replay_old() -> dict[str, Outcome]:
    """The recordings of 1.20, which are only those that differ."""
    async with KubeApi(timing=Timing(pace=PACE), dialect="1.20") as api:
        replay = Replay(api)
        labels = {"kubernetes.io/hostname": "node-a", "x": "y"}
        annotations = {key: text for key, text in ANNOTATIONS.items() if not key.endswith("backend-type")}
        api.store.advance_to(201)
        api.create_node("node-a", ["10.244.1.0/24"], {**annotations, PUBLIC_IP: "127.0.0.13"}, labels)
        await replay.step(*(name for name in names() if name.startswith("v1.20-differs/")))
        return replay.outcomes
