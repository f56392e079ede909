"""The faults of the fake do what they say, seen from the wire; no recording reaches them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from flanneld.lab.kubeapi import (
    ADMIN_TOKEN,
    FLANNEL_TOKEN,
    INTERNAL_ERROR,
    STORE_TIMEOUT,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    Authority,
    KubeApi,
    Timing,
)
from tests.support.http1 import Reply, exchange
from tests.support.wait import until

NODES = "/api/v1/nodes"
WATCH = f"{NODES}?watch=1&allowWatchBookmarks=true&resourceVersion="


@pytest_asyncio.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with KubeApi(timing=Timing(pace=20), ring_size=8) as served:
        served.create_node("n1", ["10.244.1.0/24"])
        yield served


async def get(api: KubeApi, target: str = NODES, token: str = FLANNEL_TOKEN, **how: Any) -> Reply:
    ca_file = str(api.ca_file) if api.ca_file else None
    return await exchange(api.url, "GET", target, {"Authorization": f"Bearer {token}"}, ca_file=ca_file, **how)


@contextlib.asynccontextmanager
async def watching(api: KubeApi, query: str = "0") -> AsyncIterator[Reply]:
    """A watch that goes on beside the test; it must have ended, or be ended, by the end of the block."""
    reply = Reply()
    before = api.watches
    task = asyncio.create_task(get(api, WATCH + query, reply=reply))
    await until(lambda: api.watches > before, what="the watch began")
    try:
        yield reply
        await until(task.done, what="the watch ended")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def kinds(reply: Reply) -> list[str]:
    return [line["type"] for line in reply.lines()]


@pytest.mark.parametrize(
    ("how", "is_complete", "has_rest", "error"),
    [
        ("finish", True, False, ""),
        ("cut", False, False, "peer closed connection"),
        ("reset", False, False, "ConnectionResetError"),
        ("half_line", False, True, "peer closed connection"),
    ],
)
async def test_a_watch_ends_in_each_way(api: KubeApi, how: Any, is_complete: bool, has_rest: bool, error: str) -> None:
    async with watching(api) as reply:
        await until(lambda: reply.body)
        api.end_watches(how)
    assert reply.is_complete is is_complete
    assert bool(reply.body.rpartition(b"\n")[2]) is has_rest
    assert error in reply.error
    assert kinds(reply) == ["ADDED"]


@pytest.mark.parametrize("answer", [TOO_MANY_REQUESTS, INTERNAL_ERROR, UNAVAILABLE, STORE_TIMEOUT])
async def test_a_refusal_is_given_as_often_as_told_and_only_to_its_verb(api: KubeApi, answer: Any) -> None:
    api.faults.refuse(answer, times=1, verbs={"list"})
    assert (await get(api, f"{NODES}/n1")).status == 200
    refused = await get(api)
    assert (refused.status, bytes(refused.body)) == (answer.code, b"".join(answer.body))
    assert (await get(api)).status == 200


async def test_headers_can_drip(api: KubeApi) -> None:
    api.faults.drip_s = 0.001
    reply = await get(api)
    assert reply.is_complete
    assert reply.took_s > 0.1  # more than a hundred bytes of head


async def test_answers_can_be_late(api: KubeApi) -> None:
    api.faults.delay_s = 0.2
    assert (await get(api)).took_s >= 0.2
    api.faults.clear()
    assert (await get(api)).took_s < 0.2


async def test_a_list_can_stop_in_the_middle(api: KubeApi) -> None:
    whole = await get(api)
    api.faults.cut_body_after = 100
    part = await get(api)
    assert (bytes(part.body), part.is_complete) == (bytes(whole.body[:100]), False)


async def test_lines_can_come_in_pieces(api: KubeApi) -> None:
    api.annotate("n1", {"long": "x" * 3000})  # long enough to be chunked
    api.faults.piece_bytes = 7
    reply = await get(api)
    assert max(len(data) for _, data in reply.arrivals) == 7
    assert reply.json()["items"][0]["metadata"]["name"] == "n1"


async def test_a_muted_watch_says_nothing_and_catches_up_afterwards(api: KubeApi) -> None:
    async with watching(api, f"{api.store.version}") as reply:
        api.faults.mute_watches = True
        api.annotate("n1", {"a": "b"})
        assert (await get(api)).status == 200  # the rest of the server is well
        assert not reply.body
        api.faults.clear()
        await until(lambda: reply.body, what="the event that was held back")
        api.end_watches()
    assert kinds(reply) == ["MODIFIED"]


async def test_watches_can_be_ended_every_so_often(api: KubeApi) -> None:
    api.faults.end_watches_after_s = 0.05
    async with watching(api) as reply:
        pass
    assert reply.is_complete


async def test_a_restart_forgets_events_and_keeps_objects(api: KubeApi) -> None:
    before = api.store.version
    async with watching(api) as reply:
        api.annotate("n1", {"a": "b"})
        await until(lambda: "MODIFIED" in kinds(reply))
        await api.restart()
    assert not reply.is_complete
    resumed = await get(api, f"{WATCH}{before}")
    assert resumed.lines()[0]["object"]["reason"] == "Expired"
    assert (await get(api)).json()["items"][0]["metadata"]["annotations"] == {"a": "b"}


async def test_a_stopped_server_refuses_connections_and_comes_back_on_its_port(api: KubeApi) -> None:
    await api.stop()
    with pytest.raises(ConnectionRefusedError):
        await get(api)
    await api.start()
    assert (await get(api)).status == 200


async def test_a_paused_server_takes_connections_and_answers_later(api: KubeApi) -> None:
    await api.pause()
    asking = asyncio.create_task(get(api))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await asyncio.shield(asking)
    await api.resume()
    assert (await asking).status == 200


@pytest.mark.parametrize("fault", ["silent", "reset"])
async def test_connections_can_be_taken_and_not_served(api: KubeApi, fault: Any) -> None:
    api.faults.on_connect = fault
    if fault == "reset":
        assert "ConnectionResetError" in (await get(api)).error
    else:
        with pytest.raises(TimeoutError):
            await get(api, timeout_s=0.1)


async def test_an_event_can_come_twice(api: KubeApi) -> None:
    async with watching(api) as reply:
        await until(lambda: reply.body)
        api.repeat_event("n1")
        await until(lambda: len(reply.lines()) == 2)
        api.end_watches()
    first, second = reply.lines()
    assert second == {"type": "MODIFIED", "object": first["object"]}


async def test_a_watch_that_left_the_ring_is_told_to_list_again(api: KubeApi) -> None:
    version = api.store.version
    for number in range(20):
        api.annotate("n1", {"tick": str(number)})
    reply = await get(api, f"{WATCH}{version}")
    assert [(line["type"], line["object"]["code"]) for line in reply.lines()] == [("ERROR", 410)]


async def test_a_jump_of_the_counter_shows_in_the_next_event(api: KubeApi) -> None:
    async with watching(api, f"{api.store.version}") as reply:
        api.store.advance_to(10**6)
        api.annotate("n1", {"a": "b"})
        await until(lambda: reply.body)
        api.end_watches()
    assert reply.lines()[0]["object"]["metadata"]["resourceVersion"] == str(10**6 + 1)


async def test_a_rotated_token_replaces_the_old_one(api: KubeApi) -> None:
    api.access.rotate(FLANNEL_TOKEN, "fresh")
    assert (await get(api)).status == 401
    assert (await get(api, token="fresh")).status == 200


async def test_a_new_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    async with KubeApi(tls=old.issue("127.0.0.1")) as api:
        assert (await get(api)).status == 200
        api.renew_certificate(new.issue("127.0.0.1"))
        assert (await get(api)).status == 200  # get trusts whatever signed the present one
        with pytest.raises(ssl.SSLCertVerificationError):
            await exchange(api.url, "GET", "/readyz", ca_file=str(old.ca_file))


async def test_a_client_certificate_names_the_user(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with KubeApi(tls=authority.issue("127.0.0.1")) as api:
        api.create_node("n1")
        client = authority.issue_client("admin")
        context = ssl.create_default_context(cafile=api.ca_file)
        context.load_cert_chain(client.cert_file, client.key_file)
        assert await _status(api, f"{NODES}/n1", context) == b"HTTP/1.1 200"
        assert await _status(api, f"{NODES}/n1", ssl.create_default_context(cafile=api.ca_file)) == b"HTTP/1.1 403"


async def _status(api: KubeApi, target: str, context: ssl.SSLContext) -> bytes:
    parts = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    line = await reader.readexactly(12)
    writer.transport.abort()
    return line


async def test_two_requests_share_a_connection_with_a_watch_between(api: KubeApi) -> None:
    parts = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    for target in (f"{NODES}/n1", f"{WATCH}1&timeoutSeconds=2", f"{NODES}/n1"):
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FLANNEL_TOKEN}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        if b"chunked" in head:
            await reader.readuntil(b"0\r\n\r\n")
        else:
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            await reader.readexactly(length)
    writer.transport.abort()


async def test_a_watcher_that_leaves_is_forgotten_at_once(api: KubeApi) -> None:
    with pytest.raises(TimeoutError):
        await get(api, WATCH + "0", timeout_s=0.2)
    await until(lambda: not api.watches and not api.connections)


async def test_five_thousand_heavy_nodes_are_listed_quickly() -> None:
    async with KubeApi() as api:
        for number in range(5000):
            api.create_node(f"n{number}", [f"10.{number >> 8}.{number & 255}.0/24"], managed_fields_bytes=20480)
        reply = await get(api, NODES + "?resourceVersion=0")
    assert len(reply.body) > 100_000_000
    assert reply.took_s < 10  # 0.4 s where nothing else runs


async def test_pages_of_a_list_show_one_version_whatever_happens_between(api: KubeApi) -> None:
    api.create_node("n2")
    first = (await get(api, f"{NODES}?limit=1")).json()
    api.delete_node("n2")
    api.create_node("n3")
    rest = (await get(api, f"{NODES}?limit=1&continue={first['metadata']['continue']}")).json()
    assert [item["metadata"]["name"] for item in first["items"] + rest["items"]] == ["n1", "n2"]
    assert first["metadata"]["resourceVersion"] == rest["metadata"]["resourceVersion"]


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ([{"op": "replace", "path": "/metadata/labels/x", "value": "2"}], {"x": "2", "y": "1"}),
        ([{"op": "remove", "path": "/metadata/labels/x"}], {"y": "1"}),
        ([{"op": "move", "from": "/metadata/labels/x", "path": "/metadata/labels/z"}], {"y": "1", "z": "1"}),
        ([{"op": "copy", "from": "/metadata/labels/x", "path": "/metadata/labels/z"}], {"x": "1", "y": "1", "z": "1"}),
        ([{"op": "remove", "path": "/metadata/labels/absent"}], None),
        ([{"op": "nonsense", "path": "/metadata"}], None),
    ],
)
async def test_json_patch_operations(api: KubeApi, patch: Any, expected: dict[str, str] | None) -> None:
    api.patch_node("n1", {"metadata": {"labels": {"x": "1", "y": "1"}}})
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": "application/json-patch+json"}
    reply = await exchange(api.url, "PATCH", f"{NODES}/n1", headers, json.dumps(patch).encode())
    if expected is None:
        assert (reply.status, reply.json()["reason"]) == (422, "Invalid")
    else:
        assert reply.json()["metadata"]["labels"] == expected
