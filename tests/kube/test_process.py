"""The fake as a process, as the lab runs it: what its signals do, and what it keeps on disk."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from flanneld.lab.kubeapi import ADMIN_TOKEN
from flanneld.lab.kubeapi.journal import Journal
from flanneld.lab.kubeapi.objects import Store
from flanneld.lab.kubeapi.rules import normal_form
from tests.support.http1 import Reply, exchange
from tests.support.wait import until

NODES = "/api/v1/nodes"
HEADERS = {"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": "application/json"}


class Process(NamedTuple):
    url: str
    child: asyncio.subprocess.Process

    async def make_node(self, name: str) -> None:
        body = json.dumps({"metadata": {"name": name}}).encode()
        assert (await exchange(self.url, "POST", NODES, HEADERS, body)).status == 201

    async def nodes(self) -> list[str]:
        return [item["metadata"]["name"] for item in (await exchange(self.url, "GET", NODES, HEADERS)).json()["items"]]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Reply]:
        reply = Reply()
        task = asyncio.create_task(exchange(self.url, "GET", f"{NODES}?watch=1", HEADERS, reply=reply))
        try:
            await until(lambda: reply.body, what="the watch began")
            yield reply
            await until(task.done, what="the watch ended")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def serving(state_dir: Path) -> AsyncIterator[Process]:
    argv = (sys.executable, "-m", "flanneld.lab.kubeapi", "--listen=127.0.0.1:0", f"--state-dir={state_dir}")
    child = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    try:
        assert child.stderr is not None
        said = (await child.stderr.readline()).decode()
        assert said.startswith("serving on "), said
        yield Process(said.split()[-1], child)
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_objects_outlive_the_process(tmp_path: Path, number: signal.Signals) -> None:
    async with serving(tmp_path) as first:
        await first.make_node("n1")
        async with first.watching() as reply:
            first.child.send_signal(number)
        assert reply.is_complete is (number == signal.SIGTERM)
        await first.child.wait()
    async with serving(tmp_path) as second:
        assert await second.nodes() == ["n1"]


async def test_sighup_restarts_without_leaving(tmp_path: Path) -> None:
    async with serving(tmp_path) as process:
        await process.make_node("n1")
        async with process.watching() as reply:
            process.child.send_signal(signal.SIGHUP)
        assert not reply.is_complete
        assert await process.nodes() == ["n1"]


def test_a_journal_whose_last_line_was_cut_off_gives_back_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "objects.jsonl"
    store = Store()
    journal = Journal(path, store)
    for name in ("n1", "n2", "n3"):
        store.create("nodes", normal_form({"metadata": {"name": name}}))
    store.delete(store.get("nodes", "", "n1"))
    journal.close()
    path.write_bytes(path.read_bytes() + msgspec.json.encode({"version": 99, "key": ["nodes", "", "n4"]})[:-9])

    again = Store()
    Journal(path, again).close()
    assert [stored.key[2] for stored in again.all("nodes")] == ["n2", "n3"]
    assert again.version == store.version
