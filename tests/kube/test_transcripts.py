"""The fake answers what kube-apiserver 1.36.2 answered: every recording is replayed and compared."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flanneld.lab.kubeapi import FLANNEL_TOKEN, KubeApi, Timing
from tests.kube import replay
from tests.kube.replay import PACE, Outcome
from tests.support.http1 import exchange
from tests.support.wait import until

UNSUPPORTED: dict[str, str] = {}
"""Recordings that the fake does not answer alike, and why."""
ELSEWHERE = {"16-stream-ends"}
"""No exchange but what was seen on the raw socket; it has its own test."""
FREE_MESSAGES = {
    "05-patch-annotation-nonstring": "the real server prints the whole object in Go's words",
    "05-patch-badjson-400": "the words are those of Go's JSON parser",
    "05-patch-unknown-field": "the real server prints the whole object in Go's words",
}
HEADERS = ("content-type", "retry-after", "warning")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What the fake answered to all of them."""

    async def both() -> dict[str, Outcome]:
        new, old = await asyncio.gather(replay.replay_all(), replay.replay_old())
        return {**new, **old}

    return asyncio.run(both())


def _requests() -> list[str]:
    return [name for name in replay.names() if name not in ELSEWHERE]


@pytest.mark.parametrize("name", _requests())
def test_the_fake_answers_as_recorded(name: str, outcomes: dict[str, Outcome]) -> None:
    if name in UNSUPPORTED:
        pytest.skip(f"{name}: {UNSUPPORTED[name]}")
    recorded, reply = outcomes[name]
    expected = recorded["response"]
    assert reply.status == expected["status"]
    wanted = {key.lower(): value for key, value in expected["headers"].items() if key.lower() in HEADERS}
    assert {key: value for key, value in reply.headers.items() if key in HEADERS} == wanted
    if "watch_lines" in expected:
        events = [line["event"] for line in expected["watch_lines"]]
        assert _comparable(reply.lines()) == _comparable(events)
        assert reply.is_complete is (name != "13-watch-server-killed")
    elif isinstance(expected["body"], str):
        assert reply.body.decode() == expected["body"]
    else:
        assert _narrowed(name, reply.json()) == _narrowed(name, expected["body"])


def test_every_recording_is_replayed(outcomes: dict[str, Outcome]) -> None:
    assert set(outcomes) | set(ELSEWHERE) == set(replay.names())


@pytest.mark.parametrize(
    "name",
    [
        "04-list-rv-too-large-504",
        "11-watch-events",
        "11-watch-rv-future",
        "13-watch-server-shutdown",
        "14-etcd-stalled-get",
    ],
)
def test_what_takes_time_takes_as_long_as_recorded(name: str, outcomes: dict[str, Outcome]) -> None:
    recorded, reply = outcomes[name]
    expected = recorded["response"]
    took_s = expected["stream_end"]["t"] if "stream_end" in expected else expected["t"]
    # a busy machine may be late, and the shutdown followed the bookmark at once
    assert took_s - 2.0 <= reply.took_s * PACE <= took_s + 2.0 * PACE


async def test_streams_end_as_seen_on_the_raw_socket() -> None:
    ends = replay.load("16-stream-ends")["ends"]
    seen: dict[str, bool] = {}
    head = {"Authorization": f"Bearer {FLANNEL_TOKEN}"}
    watch = "/api/v1/nodes?watch=1&resourceVersion="

    async def watched(what: str, query: str) -> None:
        reply = await exchange(api.url, "GET", watch + query, head)
        assert reply.status == 200
        seen[what] = reply.is_complete

    async with KubeApi(timing=Timing(pace=PACE)) as api, asyncio.TaskGroup() as group:
        api.create_node("node-a")
        api.store.compact()
        await watched("watch timeoutSeconds=2", "0&timeoutSeconds=2")
        await watched("watch 410 error event", "1&timeoutSeconds=5")
        group.create_task(watched("SIGTERM of server during watch (default flags)", "0"))
        await until(lambda: api.watches)
        api.end_watches("finish")
        await until(lambda: not api.watches)
        group.create_task(watched("SIGKILL of server during watch", "0"))
        await until(lambda: api.watches)
        await api.stop()
    assert seen == {what: end["has_final_chunk"] for what, end in ends.items()}


def _narrowed(name: str, body: Any) -> Any:
    """What of a body is compared."""
    if name == "01-version":
        return {key: body[key] for key in ("major", "minor", "gitVersion")}
    if name == "08-get-pod-nodename":  # the fake keeps Pods as they are made, without defaults
        kept = {"spec": {"nodeName": body["spec"]["nodeName"]}}
        return {"kind": body["kind"], "metadata": {**_comparable(body["metadata"]), "generation": 1}, **kept}
    body = _comparable(body)
    if name in FREE_MESSAGES:
        body = {**body, "message": ""}
        for cause in body.get("details", {}).get("causes", ()):
            cause["message"] = ""
    return body


def _comparable(value: Any) -> Any:
    """Without what is new in each run: times of creation, uids, who manages which field, continue tokens."""
    match value:
        case dict():
            left_out = {"uid", "creationTimestamp", "managedFields"}
            kept = {key: _comparable(inner) for key, inner in value.items() if key not in left_out}
            return {**kept, "continue": "<continue-token>"} if "continue" in kept else kept
        case list():
            return [_comparable(inner) for inner in value]
        case _:
            return value
