"""One watch: which lines it says and when. Writes nothing itself; the connection does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import msgspec

from flanneld.lab.kubeapi import status
from flanneld.lab.kubeapi.faults import Faults, StreamEnd
from flanneld.lab.kubeapi.lists import Selects, version_of
from flanneld.lab.kubeapi.message import Request, Target
from flanneld.lab.kubeapi.objects import KINDS, Event, Store, Stored
from flanneld.lab.kubeapi.rules import normal_form

LAST_BOOKMARK_BEFORE_END_S = 1.5
"""And none at all in a watch of 4 s (11-watch-events, 11-watch-initial-events)."""


@dataclass(frozen=True)
class Timing:
    """How long things take, in seconds; tests make them shorter."""

    bookmark_s: float = 60.0
    watch_timeout_s: float = 1800.0
    """Of a watch that names no ``timeoutSeconds``."""
    future_list_s: float = 3.0
    """How long a list waits for a version that has not come."""
    request_timeout_s: float = 60.0
    """Of a request that names no ``timeout``, while the store is stalled."""
    pace: float = 1.0
    """All of these, and what clients ask for, pass so many times faster."""

    def lasts(self, seconds: float) -> float:
        """What a duration of the protocol takes on our clock."""
        return seconds / self.pace


class Watch:
    """A stream of events to one client.

    Raises:
        Refused: the parameters are wrong.
    """

    def __init__(
        self, store: Store, request: Request, target: Target, selects: Selects, faults: Faults, timing: Timing
    ) -> None:
        try:
            self._asked = version_of(request.query.get("resourceVersion", ""))
        except ValueError as error:
            raise status.internal(str(error)) from None
        self._store, self._target, self._selects = store, target, selects
        self._faults, self._timing = faults, timing
        self._wants_bookmarks = request.asks("allowWatchBookmarks")
        self._wants_list = request.asks("sendInitialEvents")
        self._ends_in_s = timing.lasts(float(request.query.get("timeoutSeconds") or timing.watch_timeout_s))
        self._sequence = 0
        self._silent_until = self._asked if self._asked > store.version else 0
        """A version from the future is waited for, without an error (11-watch-rv-future)."""
        self._woken = asyncio.Event()
        self.end: StreamEnd | None = None
        """How it ends; None while it goes on."""
        self.has_ended = asyncio.Event()
        """Set by the connection when it has written the end."""

    def wake(self) -> None:
        """There may be news."""
        self._woken.set()

    def finish(self, how: StreamEnd) -> None:
        """End it."""
        self.end = how
        self.wake()

    async def lines(self) -> AsyncIterator[bytes]:
        """What to send, one or more whole lines at a time, until ``end`` says how it ends."""
        for line in self._first_lines():
            yield line
        begun = time.monotonic()
        bookmarked = begun
        while self.end is None:
            self._woken.clear()
            now = time.monotonic()
            ends_at = begun + (self._faults.end_watches_after_s or self._ends_in_s)
            if self._faults.mute_watches:
                await self._sleep(0.05)
                continue
            if news := self._news():
                yield news
                continue
            if now >= ends_at:
                self.end = "finish"
                break
            bookmark_at = self._bookmark_at(begun, bookmarked)
            if self._wants_bookmarks and now >= bookmark_at:
                bookmarked = now
                if self._asked <= self._store.version:
                    yield self._bookmark()
                continue
            await self._sleep(min(ends_at, bookmark_at if self._wants_bookmarks else ends_at) - now)

    def last_line(self) -> bytes:
        """A whole line, to be cut in half."""
        return self._bookmark()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._woken.wait()
        except TimeoutError:
            pass

    def _bookmark_at(self, begun: float, last: float) -> float:
        """Once a period, and once shortly before the client's own end."""
        regular = last + self._timing.lasts(self._timing.bookmark_s)
        final = begun + self._ends_in_s - self._timing.lasts(LAST_BOOKMARK_BEFORE_END_S)
        if last < final and self._ends_in_s > self._timing.lasts(4.0):
            return min(regular, final)
        return regular

    def _first_lines(self) -> Iterator[bytes]:
        store = self._store
        if self._asked == 0 or self._wants_list:
            self._sequence = store.sequence
            end_of_list = self._bookmark({"k8s.io/initial-events-end": "true"})
            for stored in store.all(self._target.plural):
                if self._selects(stored):
                    yield _line("ADDED", stored)
            if self._wants_list:
                yield end_of_list
        elif self._asked < store.oldest_version:
            self.end = "finish"
            gone = status.expired_watch(self._asked, store.oldest_version)
            yield b'{"type":"ERROR","object":%b}\n' % msgspec.json.encode(gone)
        else:
            self._sequence = store.sequence_at(self._asked)

    def _news(self) -> bytes:
        events = self._store.events_after(self._sequence)
        self._sequence = self._store.sequence
        if events is None:  # we were too slow for the ring; the client must begin again
            self.end = "finish"
            return b""
        return b"".join(filter(None, map(self._say, events)))

    def _say(self, event: Event) -> bytes:
        """An event as this watch sees it: leaving its selection is a deletion (11-watch-labelselector-transition)."""
        current, previous = event.current, event.previous
        if current.plural != self._target.plural or current.version <= self._silent_until:
            return b""
        was = previous is not None and self._selects(previous)
        is_now = event.type != "DELETED" and self._selects(current)
        if is_now:
            return _line("MODIFIED" if was else "ADDED", current)
        if was and previous is not None:
            return _line("DELETED", previous.at_version(current.version))
        return b""

    def _bookmark(self, annotations: dict[str, str] | None = None) -> bytes:
        """The version so far; its object looks like one without anything in it (11-watch-events)."""
        metadata: dict[str, object] = {"resourceVersion": str(self._store.version)}
        if annotations:
            metadata["annotations"] = annotations
        plural = self._target.plural
        empty = normal_form({}) if plural == "nodes" else {"spec": {"containers": None}, "status": {}}
        body = {"kind": KINDS[plural], "apiVersion": "v1", **empty, "metadata": metadata}
        return b'{"type":"BOOKMARK","object":%b}\n' % msgspec.json.encode(body)


def _line(kind: str, stored: Stored) -> bytes:
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), stored.as_object())
