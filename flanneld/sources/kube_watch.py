"""Nodes as the API server tells of them: one list in pages, then a watch from there, for ever.

Tells what it hears in batches and holds nothing. Whatever happens to the watch, it goes on after the last revision
heard; only when the server has no history from there does ``Expired`` send the reader back to the list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import NamedTuple
from urllib.parse import quote, urlencode

from flanneld.errors import Unavailable
from flanneld.model.node_codec import Event, Node, decode_event, decode_node, decode_page
from flanneld.retry import backoff
from flanneld.sources.kube_http import KubeHttp, Refused, one_line, pause
from flanneld.sources.kube_wire import Broken, TooLarge
from flanneld.sources.outage import Outage

log = logging.getLogger("flanneld.kube")

NODES = "/api/v1/nodes"
_PAGE_BYTES = 16 << 20
"""Largest page taken; a larger one is asked for again in halves."""
_LINE_BYTES = 8 << 20
"""Longest line of a watch: one object, which etcd bounds to 1.5 MiB."""
BREATH = 64
"""Nodes decoded between two turns of the event loop: about four milliseconds at 25 KiB each."""

_END_OF_LIST = "k8s.io/initial-events-end"
"""Annotation of the bookmark after the last object of a streamed list. Source: Kubernetes KEP 3157."""
_SHORT_S = 1.0
"""A watch that ends sooner and without news is a failure: it must not be repeated at once."""


class Pace(NamedTuple):
    """How much at once, and how long to wait."""

    page_nodes: int = 200
    """Nodes asked for at once: 5 MiB where each carries 20 KiB of managed fields."""
    silence_s: float = 150.0
    """Longest time without a line. A server sends a bookmark a minute: this is two missed, and then some."""
    watch_s: tuple[int, int] = (300, 600)
    """How long one watch is asked to last: the range that client-go chooses from, so that clients spread."""


class Expired(Unavailable):
    """The server's history does not reach back to our revision: list again."""


class Silent(Broken):
    """A watch over which nothing came for too long."""


class Page(NamedTuple):
    """Part of a list."""

    nodes: list[Node]
    revision: str
    """That of the last part is the whole list's: a watch goes on from it."""
    gone: frozenset[str] = frozenset()
    """Nodes of earlier parts that were deleted while the list was told."""


class Batch(NamedTuple):
    """News that came together."""

    events: list[Event]
    """``ADDED``, ``MODIFIED`` and ``DELETED``, in order; may be none."""
    revision: str
    """A new watch goes on from it."""
    has_bookmark: bool
    completes_list: bool
    """Whether all that was there at the beginning has been told now; of streamed lists only."""


def node_path(name: str) -> str:
    """Where a node is found."""
    return f"{NODES}/{quote(name, safe='')}"


class NodeFeed:
    """All nodes, or one.

    Args:
        http: the way to the API server.
        name: of the one node; empty = all.
        pace: how much at once, and how long to wait.
    """

    def __init__(self, http: KubeHttp, name: str = "", pace: Pace = Pace()) -> None:  # noqa: B008 - immutable
        self._http = http
        self._selector = {"fieldSelector": f"metadata.name={name}"} if name else {}
        self._pace = pace
        self._garbage_noted = False

    async def nodes(self) -> AsyncGenerator[Page, None]:
        """All nodes of one moment, part by part; what a part held can be gone before the next one comes.

        Raises:
            Unavailable: no list now; begin again. Also when it took so long that its snapshot is gone (HTTP 410).
        """
        if not self._selector and self._http.streams_lists:
            try:
                async with contextlib.aclosing(self._streamed()) as pages:
                    async for page in pages:
                        yield page
                    return
            except Refused as error:
                if error.status not in (400, 422):
                    raise
                log.debug("the API server cannot stream lists, asking for pages reason=%s", error)
                self._http.streams_lists = False
        async with contextlib.aclosing(self._paged()) as pages:
            async for page in pages:
                yield page

    async def _streamed(self) -> AsyncGenerator[Page, None]:
        """A list in the form of a watch, which the server makes from its cache, object by object.

        Pages are read from etcd by most releases: a whole cluster of daemons that start together would ask it for
        each node once a daemon. Beta since Kubernetes 1.32; older servers refuse.
        """
        query = {
            "watch": "1",
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._pace.watch_s[0]),
        }
        async with contextlib.aclosing(self._events(query, "")) as batches:
            async for batch in batches:
                yield _as_page(batch)
                if batch.completes_list:
                    return
                if batch.has_bookmark:  # which comes in its time from servers that did not understand the question
                    self._http.streams_lists = False
                    raise Broken(f"{self._http.access.server} does not stream lists")
        raise Broken(f"{self._http.access.server} ended a list before it was complete")

    async def _paged(self) -> AsyncGenerator[Page, None]:
        token, limit = "", self._pace.page_nodes
        while True:
            query = {"limit": str(limit), **self._selector, **({"continue": token} if token else {})}
            try:
                raw = await self._page(f"{NODES}?{urlencode(query)}")
            except TooLarge:
                if limit == 1:
                    raise
                limit = max(limit // 2, 1)
                continue
            page, token = await self._decoded(raw)
            yield page
            if not token:
                return
            del raw, page  # megabytes, while the next one is on its way

    async def watch(self, revision: str) -> AsyncGenerator[Batch, None]:
        """What changes after a revision, for ever; reconnects by itself.

        Raises:
            Expired: the server does not know what happened since then.
        """
        outage = Outage(log, "watch of nodes broken, what we know stays in use", "watch of nodes works again")
        delays = backoff()
        while True:
            began, heard = time.monotonic(), False
            try:
                async with contextlib.aclosing(self._connected(revision)) as batches:
                    async for batch in batches:
                        outage.over()
                        revision, heard = batch.revision, True
                        yield batch
                if not heard and time.monotonic() - began < _SHORT_S:
                    raise Broken(f"{self._http.access.server} ends watches at once")
                outage.over()
                delays = backoff()
            except Expired:
                raise
            except Unavailable as error:
                if isinstance(error, Silent) and await self._is_older(revision):
                    raise Expired("the API server's data are older than what it told before") from error
                if heard:
                    delays = backoff()
                outage.failed(error)
                await asyncio.sleep(pause(error, delays))

    async def _page(self, target: str) -> bytearray:
        """Ask for one page, a few times: a list of many would otherwise never come from a server that is busy."""
        delays = backoff()
        for _ in range(3):
            try:
                return await self._http.call("GET", target, limit=_PAGE_BYTES)
            except TooLarge:
                raise
            except Unavailable as error:
                if isinstance(error, Refused) and error.status < 500 and error.status != 429:
                    raise
                await asyncio.sleep(pause(error, delays))
        return await self._http.call("GET", target, limit=_PAGE_BYTES)

    async def _decoded(self, raw: bytearray) -> tuple[Page, str]:
        """One page, and the token for the next one; empty after the last."""
        try:
            page = decode_page(raw)
        except ValueError as error:
            raise Unavailable(f"{self._http.access.server} lists nodes in a form unknown to us: {error}") from error
        nodes: list[Node] = []
        for count, item in enumerate(page.items or (), 1):
            try:
                nodes.append(decode_node(item))
            except ValueError as error:
                self._note_garbage(error)
            if count % BREATH == 0:
                await asyncio.sleep(0)
        return Page(nodes, page.metadata.resource_version), page.metadata.next_page

    async def _connected(self, revision: str) -> AsyncGenerator[Batch, None]:
        """One watch, up to its end."""
        query = {
            "watch": "1",
            "resourceVersion": revision,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*self._pace.watch_s)),  # noqa: S311 - no secret
            **self._selector,
        }
        try:
            async with contextlib.aclosing(self._events(query, revision)) as batches:
                async for batch in batches:
                    yield batch
        except Refused as error:
            if error.status in (400, 410, 422):  # 400 and 422: a revision that this server cannot even read
                raise Expired(str(error)) from error
            raise

    async def _events(self, query: Mapping[str, str], revision: str) -> AsyncGenerator[Batch, None]:
        """What one stream tells, as it comes."""
        async with (
            self._http.stream(f"{NODES}?{urlencode(query)}") as pieces,
            contextlib.aclosing(_in_lines(pieces, self._pace.silence_s)) as heard,
        ):
            async for lines in heard:
                batch = await self._batch(lines, revision)
                revision = batch.revision
                yield batch

    async def _batch(self, lines: list[bytes], revision: str) -> Batch:
        events: list[Event] = []
        has_bookmark = completes_list = False
        for count, line in enumerate(lines, 1):
            try:
                event = decode_event(line)
            except ValueError as error:  # a whole line, so no cut: skipping it harms one node at most
                self._note_garbage(error)
                continue
            if event.type == "ERROR":
                raise self._told(event.object)
            revision = event.object.metadata.resource_version or revision
            if event.type == "BOOKMARK":  # it looks like a node without a name
                has_bookmark = True
                completes_list |= _END_OF_LIST in event.object.annotations
            else:
                events.append(event)
            if count % BREATH == 0:
                await asyncio.sleep(0)
        return Batch(events, revision, has_bookmark, completes_list)

    def _told(self, status: Node) -> Unavailable:
        """The error that a server tells inside a watch that began with 200."""
        words = one_line(f"{status.code} {status.reason}: {status.message}")
        sentence = f"{self._http.access.server} ends the watch ({words})"
        if status.code == 410 or status.reason in ("Expired", "Gone"):
            return Expired(sentence)
        return Refused(sentence, status.code, status.reason)

    async def _is_older(self, revision: str) -> bool:
        """Whether the server's present is before our revision: it was restored from a backup, or is another one.

        A watch from the future is no error but silence, without bookmarks. Revisions grow within one store.
        """
        try:
            page, _ = await self._decoded(await self._http.call("GET", f"{NODES}?limit=1"))
        except Unavailable:  # then nobody knows; the next watch fails likewise, or works
            return False
        return revision_of(page.revision) < revision_of(revision)

    def _note_garbage(self, error: ValueError) -> None:
        if not self._garbage_noted:
            self._garbage_noted = True
            log.warning("a node in a form unknown to us is skipped, others are not affected reason=%s", error)


def revision_of(text: str) -> int:
    """A resource version as a number; 0 for one that is none, which no server is known to use."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _as_page(batch: Batch) -> Page:
    """Part of a streamed list, in which changes may stand between the objects and its end."""
    nodes: dict[str, Node] = {}
    gone: set[str] = set()
    for event in batch.events:
        name = event.object.metadata.name
        if event.type == "DELETED":
            nodes.pop(name, None)
            gone.add(name)
        else:
            nodes[name] = event.object
            gone.discard(name)
    return Page(list(nodes.values()), batch.revision, frozenset(gone))


async def _in_lines(pieces: AsyncIterator[bytes], silence_s: float) -> AsyncGenerator[list[bytes], None]:
    """Whole lines as they come together; pieces may be cut anywhere.

    Raises:
        Silent: no line was completed for so long.
        Broken: the stream was cut, or ended in the middle of a line.
        TooLarge: a line without end.
    """
    rest = bytearray()
    while True:
        lines: list[bytes] = []
        try:
            async with asyncio.timeout(silence_s):
                while not lines:
                    piece = await anext(pieces, None)
                    if piece is None:
                        if rest.strip():
                            raise Broken("the watch ended in the middle of a line")
                        return
                    rest += piece
                    if b"\n" in piece:
                        *lines, last = bytes(rest).split(b"\n")
                        rest = bytearray(last)
                        lines = [line for line in lines if line.strip()]
                    elif len(rest) > _LINE_BYTES:
                        raise TooLarge(f"the watch sends a line of more than {_LINE_BYTES >> 20} MiB")
        except TimeoutError as error:
            raise Silent(f"nothing came over the watch for {silence_s:.0f} s") from error
        yield lines
