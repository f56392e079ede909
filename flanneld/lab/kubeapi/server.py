"""The server: its socket, its connections, and what a test does to it. ``KubeApi`` is all that others need."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from flanneld.lab.kubeapi.access import Access
from flanneld.lab.kubeapi.connection import Connection
from flanneld.lab.kubeapi.faults import Faults, StreamEnd
from flanneld.lab.kubeapi.message import Answer, Request
from flanneld.lab.kubeapi.objects import MANAGED_FIELDS, Store, Stored
from flanneld.lab.kubeapi.patches import merge_patch
from flanneld.lab.kubeapi.routes import Dialect, Routes
from flanneld.lab.kubeapi.rules import NOT_READY_TAINT, normal_form
from flanneld.lab.kubeapi.tls import Certificates
from flanneld.lab.kubeapi.watches import Timing, Watch

Json = dict[str, Any]

FAREWELL_S = 1.0
"""What clients get to read the ends of their watches."""


class Seen(NamedTuple):
    """A request that was answered, for tests to read."""

    request: Request
    code: int
    """200 for a watch."""

    @property
    def verb(self) -> str:
        """get, list, watch, create, update, patch or delete."""
        return self.request.verb


class KubeApi:
    """A fake kube-apiserver in the event loop of its user, serving inside ``async with``.

    Args:
        host, port: where to listen; port 0 chooses one and keeps it over ``stop`` and ``start``.
        tls: certificate to serve with; None = plain HTTP.
        access: tokens and rights.
        timing: how long things take.
        ring_size: events that watches can resume from.
        dialect: the release whose answers are given where releases differ.
        store: objects to begin with.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Certificates | None = None,
        access: Access | None = None,
        timing: Timing | None = None,
        ring_size: int = 1000,
        dialect: Dialect = "1.36",
        store: Store | None = None,
    ) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._context = tls.context() if tls else None
        self.store = store or Store(ring_size)
        self.access = access or Access()
        self.faults = Faults()
        self.requests: deque[Seen] = deque(maxlen=10_000)
        """The last requests, oldest first; clear it as you like."""
        self._routes = Routes(self.store, self.access, self.faults, timing or Timing(), dialect)
        self._running = asyncio.Event()
        self._watches: set[Watch] = set()
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self.store.on_event.append(self._wake_watches)

    # life

    @property
    def url(self) -> str:
        """Where it serves, such as ``https://127.0.0.1:6443``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._port}"

    @property
    def ca_file(self) -> Path | None:
        """What a client verifies the server with; None without TLS."""
        return self._tls.ca_file if self._tls else None

    async def __aenter__(self) -> KubeApi:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; a port once chosen is taken again."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.create_server((self._host, self._port), family=family, backlog=1024)
        # asyncio does this for sockets that it makes; accepted ones inherit it. Without it each answer takes 40 ms
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port = self._socket.getsockname()[1]
        await self.resume()

    async def stop(self, reset: bool = False) -> None:
        """Vanish as by SIGKILL: connections end without a farewell, new ones are refused. Objects stay."""
        self._close_server()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        await self.drop_connections(reset)

    async def shut_down(self) -> None:
        """Stop as by SIGTERM: watches end in good order, then everything else."""
        self._close_server()
        going_on = list(self._watches)
        self.end_watches("finish")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                for watch in going_on:
                    await watch.has_ended.wait()
        await self.stop()

    async def restart(self) -> None:
        """Be killed and started: objects stay, the events and all streams are gone."""
        await self.stop()
        self.store.forget_events()
        await self.start()

    async def pause(self) -> None:
        """Be as a stopped process (SIGSTOP): the kernel still takes connections, nobody reads or writes."""
        self._running.clear()
        self._close_server()

    async def resume(self) -> None:
        """Go on after ``pause``."""
        if self._socket is None:
            raise RuntimeError("the server is stopped: start() it")
        self._running.set()
        if self._server is None:
            # a copy of the socket: closing the server must not close ours, or a pause would refuse connections
            self._server = await asyncio.start_server(self._accept, sock=self._socket.dup(), ssl=self._context)

    async def drop_connections(self, reset: bool = False) -> None:
        """Close every connection in the middle of whatever it does; with ``reset``, by RST."""
        connections = dict(self._connections)
        for task, connection in connections.items():
            connection.abort(reset)
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._socket is None:  # its TLS handshake was under way when we were killed
            writer.transport.abort()
            return
        connection = Connection(reader, writer, self._answer, self.faults, self._running, self._watches)
        task = asyncio.create_task(connection.serve())
        self._connections[task] = connection
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _answer(self, request: Request) -> Answer | Watch:
        answer = await self._routes.answer(request)
        self.requests.append(Seen(request, 200 if isinstance(answer, Watch) else answer.code))
        return answer

    def _wake_watches(self) -> None:
        for watch in self._watches:
            watch.wake()

    # what tests do to streams, certificates and events; faults of answers are in ``faults``

    @property
    def watches(self) -> int:
        """Number of watches that go on now."""
        return len(self._watches)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    def end_watches(self, how: StreamEnd = "finish") -> None:
        """End all watches: cleanly, without the final chunk, by RST, or in the middle of a line."""
        for watch in self._watches:
            watch.finish(how)

    def renew_certificate(self, tls: Certificates) -> None:
        """Serve new connections with another certificate; those that are open go on."""
        if self._context is None:
            raise RuntimeError("the server has no TLS")
        self._tls = tls
        self._context.load_cert_chain(tls.cert_file, tls.key_file)

    def repeat_event(self, name: str) -> None:
        """Announce a Node once more as MODIFIED, unchanged."""
        self.store.repeat(self.store.get("nodes", "", name))

    # objects, as an administrator has them

    def create_node(
        self,
        name: str,
        pod_cidrs: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        managed_fields_bytes: int = 0,
    ) -> Stored:
        """Make a Node.

        Args:
            name: its name.
            pod_cidrs: as the node IPAM controller gives them; none yet if empty.
            annotations, labels: of its metadata.
            managed_fields_bytes: size of its ``metadata.managedFields`` in JSON, about; 0 = a short one.
        """
        value = normal_form({
            "metadata": {"name": name, "annotations": dict(annotations or {}), "labels": dict(labels or {})},
            "spec": {"podCIDRs": list(pod_cidrs), "taints": [dict(NOT_READY_TAINT)]},
        })  # fmt: skip
        managed = managed_fields(managed_fields_bytes) if managed_fields_bytes else MANAGED_FIELDS
        return self.store.create("nodes", value, managed)

    def patch_node(self, name: str, patch: Mapping[str, Any]) -> Stored:
        """Change a Node by a JSON merge patch, any part of it; rules are not checked."""
        old = self.store.get("nodes", "", name)
        return self.store.replace(old, normal_form(merge_patch(old.value, dict(patch))))

    def annotate(self, name: str, annotations: Mapping[str, str | None]) -> Stored:
        """Change annotations of a Node; None removes one."""
        return self.patch_node(name, {"metadata": {"annotations": dict(annotations)}})

    def delete_node(self, name: str) -> None:
        """Delete a Node."""
        self.store.delete(self.store.get("nodes", "", name))

    def node(self, name: str) -> Json:
        """A copy of a Node."""
        return copy.deepcopy(self.store.get("nodes", "", name).value)

    def create_pod(self, namespace: str, name: str, node_name: str) -> Stored:
        """Make a Pod that runs on a Node; the fake gives it no defaults."""
        value = {"metadata": {"name": name, "namespace": namespace}, "spec": {"nodeName": node_name}, "status": {}}
        return self.store.create("pods", value)


_MANAGED: dict[int, bytes] = {}


def managed_fields(size: int) -> bytes:
    """``managedFields`` of about ``size`` bytes, as a kubelet that reports many images and conditions leaves them."""
    if size not in _MANAGED:
        fields: Json = {}
        while len(msgspec.json.encode(fields)) < size - 150:
            number = len(fields)
            fields |= {
                f'k:{{"type":"Condition{number + step}"}}': {".": {}, "f:lastHeartbeatTime": {}} for step in range(10)
            }
        entry = {"manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": "2026-01-01T00:00:00Z",
                 "fieldsType": "FieldsV1", "fieldsV1": {"f:status": fields}, "subresource": "status"}  # fmt: skip
        _MANAGED[size] = msgspec.json.encode([entry])
    return _MANAGED[size]
