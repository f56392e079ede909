"""Streams that a real server may send and the fake does not: written out byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flanneld.errors import Unavailable
from flanneld.model.lease import LeaseTable
from flanneld.sources.kube import KubeStore
from flanneld.sources.kube_access import Access
from flanneld.sources.kube_config import find_settings
from flanneld.sources.kube_http import KubeHttp, Refused, pause
from flanneld.sources.kube_watch import Pace
from tests.support.kube import NAMES, published
from tests.support.wait import until

Script = Callable[[str], Sequence[bytes]]
"""From the target of a request to the lines of the answer's body."""
STAY = b"<stay>"
"""Instead of a line: no more, and no end either."""


def event(kind: str, name: str, revision: int, number: int = 1, **metadata: Any) -> bytes:
    """A line about a node with subnet 10.5.NUMBER.0/24."""
    texts = {key: text for key, text in published(f"192.0.2.{number}").items() if text}
    node = {
        "metadata": {"name": name, "resourceVersion": str(revision), "annotations": texts, **metadata},
        "spec": {"podCIDR": f"10.5.{number}.0/24"},
    }
    return json.dumps({"type": kind, "object": node}).encode() + b"\n"


def bookmark(revision: int, *, ends_list: bool = False) -> bytes:
    annotations = {"k8s.io/initial-events-end": "true"} if ends_list else {}
    node = {"metadata": {"resourceVersion": str(revision), "annotations": annotations}, "spec": {}}
    return json.dumps({"type": "BOOKMARK", "object": node}).encode() + b"\n"


def page(revision: int, *lines: bytes) -> bytes:
    """A list in one page, of the objects in these lines."""
    items = [json.loads(line)["object"] for line in lines]
    return json.dumps({"metadata": {"resourceVersion": str(revision)}, "items": items}).encode()


class Scripted:
    """Answers each request as the script says; all connections end with it."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.targets: list[str] = []
        self.serving: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.serving.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                target = head.split()[1].decode()
                self.targets.append(target)
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for line in self._script(target):
                    if line == STAY:
                        await reader.read()
                        return
                    writer.write(b"%x\r\n%b\r\n" % (len(line), line))
                writer.write(b"0\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client is gone
        finally:
            writer.transport.abort()


@asynccontextmanager
async def following(script: Script) -> AsyncIterator[tuple[LeaseTable, Scripted]]:
    """A store that follows a scripted server."""
    scripted = Scripted(script)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    http = KubeHttp(Access(lambda: find_settings(url, "", {})), request_s=2.0)
    store = KubeStore(http, {"NODE_NAME": "a"}, NAMES, "/nonexistent", pace=Pace(silence_s=1.0))
    table = LeaseTable()
    task = asyncio.create_task(store.follow(table, lambda _reason: None))
    try:
        yield table, scripted
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await store.close()
        server.close()
        await asyncio.gather(*scripted.serving)


async def test_changes_between_the_objects_of_a_streamed_list_count() -> None:
    """The end of the list is told when the server's cache has come so far; events may stand before it (KEP 3157)."""

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" not in target:
            return [STAY]
        return [
            event("ADDED", "b", 3, 2),
            event("ADDED", "c", 4, 3),
            event("ADDED", "d", 5, 4),
            event("MODIFIED", "b", 6, 7),
            event("DELETED", "c", 7, 3),
            event("DELETED", "d", 8, 4),
            event("ADDED", "d", 9, 9),
            bookmark(9, ends_list=True),
            STAY,
        ]

    async with following(script) as (table, scripted):
        await until(lambda: table.complete)
        assert {name: lease.name() for name, lease in table.items()} == {"b": "10.5.7.0/24", "d": "10.5.9.0/24"}
        await until(lambda: any("resourceVersion=9" in target for target in scripted.targets))


async def test_a_server_that_ignores_the_wish_for_a_streamed_list_is_asked_for_pages() -> None:
    """Before Kubernetes 1.19 unknown parameters were ignored: all objects come, and no end of them."""

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" in target:
            return [event("ADDED", "b", 3), bookmark(5), STAY]
        return [STAY] if "watch=1" in target else [page(5, event("ADDED", "b", 3))]

    async with following(script) as (table, scripted):
        await until(lambda: table.complete)
        assert [name for name, _ in table.items()] == ["b"]
        assert sum("sendInitialEvents" in target for target in scripted.targets) == 1


async def test_a_server_without_any_history_is_not_stormed_with_lists() -> None:
    status = {"kind": "Status", "status": "Failure", "message": "", "reason": "Expired", "code": 410}
    error = json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"

    def script(target: str) -> Sequence[bytes]:
        return [bookmark(5, ends_list=True)] if "sendInitialEvents" in target else [error]

    async with following(script) as (_, scripted):
        began = asyncio.get_running_loop().time()
        await until(lambda: len(scripted.targets) >= 10)
        assert asyncio.get_running_loop().time() - began > 0.5


@pytest.mark.parametrize("code", [500, 504, 429])
async def test_an_error_inside_a_watch_that_is_not_about_history_resumes_it(code: int) -> None:
    status = {"kind": "Status", "status": "Failure", "message": "etcd", "reason": "InternalError", "code": code}
    error = json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
    watches: list[str] = []

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" in target:
            return [event("ADDED", "b", 3), bookmark(5, ends_list=True)]
        watches.append(target)
        return [event("ADDED", "c", 7, 3), error] if len(watches) == 1 else [event("ADDED", "d", 8, 4), STAY]

    async with following(script) as (table, scripted):
        await until(lambda: len(table) == 3)
        assert "resourceVersion=5" in watches[0]
        assert "resourceVersion=7" in watches[1]
        assert sum("sendInitialEvents" in target for target in scripted.targets) == 1


async def test_a_line_that_nobody_understands_is_skipped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    nonsense = event("MODIFIED", "b", 6, labels=1).replace(b'"annotations": {', b'"annotations": [], "x": {')

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" in target:
            return [event("ADDED", "b", 3), nonsense, bookmark(5, ends_list=True)]
        return [nonsense, b"\n", b"garbage\n", event("ADDED", "c", 7, 3), STAY]

    async with following(script) as (table, _):
        await until(lambda: len(table) == 2)
    assert caplog.text.count("in a form unknown to us is skipped") == 1


async def test_a_line_without_end_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("flanneld.sources.kube_watch._LINE_BYTES", 10_000)
    watches: list[str] = []

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" in target:
            return [event("ADDED", "b", 3), bookmark(5, ends_list=True)]
        watches.append(target)
        return [b"x" * 20_000, STAY] if len(watches) == 1 else [event("ADDED", "c", 7, 3), STAY]

    async with following(script) as (table, _):
        await until(lambda: len(table) == 2)
    assert "sends a line of more than" in caplog.text


async def test_half_a_line_and_then_nothing_is_silence(caplog: pytest.LogCaptureFixture) -> None:
    """The deadline is about whole lines, so that bytes now and then do not move it."""
    caplog.set_level(logging.INFO)
    watches: list[str] = []

    def script(target: str) -> Sequence[bytes]:
        if "sendInitialEvents" in target:
            return [event("ADDED", "b", 3), bookmark(5, ends_list=True)]
        if "watch=1" not in target:
            return [page(5)]
        watches.append(target)
        return [b'{"type":', STAY] if len(watches) == 1 else [event("ADDED", "c", 7, 3), STAY]

    async with following(script) as (table, _):
        await until(lambda: len(table) == 2)
    assert "nothing came over the watch" in caplog.text


async def test_a_login_page_is_no_list() -> None:
    def script(_target: str) -> Sequence[bytes]:
        return [b"<!DOCTYPE html>\n<html>log in</html>\n"]

    async with following(script) as (table, scripted):
        await until(lambda: len(scripted.targets) >= 3)
        assert not table.complete


def test_a_server_that_asks_for_a_pause_gets_it() -> None:
    def wait_s(retry_after_s: float) -> float:
        return pause(Refused("busy", 429, retry_after_s=retry_after_s), iter([0.1]))

    assert (wait_s(0.0), wait_s(1.0), wait_s(1e9)) == (0.1, 1.0, 60.0)
    assert pause(Unavailable("away"), iter([0.1])) == 0.1
