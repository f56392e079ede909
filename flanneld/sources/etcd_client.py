"""A thin etcd v3 client: compare-and-swap writes, leases, lists and watches that survive the loss of members.

Knows nothing of subnets. Every request has a deadline and tries each member within it; a watch never ends by
itself. The connections stand in ``etcd_wire.py``, tokens in ``etcd_auth.py``, certificates in ``etcd_endpoint.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import Message
from grpclib.const import Status

from flanneld.errors import ConfigError, Unavailable
from flanneld.retry import backoff
from flanneld.sources import etcd_pb2 as pb
from flanneld.sources.etcd_auth import Credentials, Tokens
from flanneld.sources.etcd_endpoint import TLS, Endpoint, TLSFiles, parse_endpoints
from flanneld.sources.etcd_values import KV, Age, Batch, Compacted, Event, LeaseGone, Listing, TxnResult
from flanneld.sources.etcd_wire import Broken, Method, Refused, Wire
from flanneld.sources.outage import Outage
from flanneld.wake import heard

__all__ = [
    "KV",
    "Batch",
    "Compacted",
    "Credentials",
    "Endpoint",
    "EtcdClient",
    "Event",
    "LeaseGone",
    "Listing",
    "TLSFiles",
    "TxnResult",
    "parse_endpoints",
]

log = logging.getLogger(__name__)

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)

_RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
_PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest, pb.PutResponse)
_DELETE = Method("/etcdserverpb.KV/DeleteRange", pb.DeleteRangeRequest, pb.DeleteRangeResponse)
_TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
_TTL = Method("/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse)
_WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)

# Keys per answer of a list: about 1 MB of leases, decoded in some 10 ms during which the loop stands still. Anybody
# may have written values of a megabyte, so it begins with fewer, and goes on with fewer where they are large.
_PAGE = 4096
_FIRST_PAGE = 512
_SMALL_PAGE = 16
_LARGE_BYTES = 4 << 20

VALUE_BYTES = 64 << 10
"""Of values in lists and in watches of a prefix, so much is kept; no lease is as long."""

# A watch that broke after less than this counts as one that never worked, so that etcd accepting and dropping us in
# a circle is met with growing pauses (failures F26).
_STEADY_S = 5.0

# Nobody answers in less, so when no more is left, as after a moment in which this machine stood still, nobody is asked.
_LEAST_S = 0.05

# Longest pause of a watch: what a host knows may be so much older than an outage. It costs a stream on a connection
# that is there, or an attempt at one, every 2 s on average.
_PAUSE_S = 3.0


class EtcdClient:
    """Talks to one etcd cluster.

    Args:
        endpoints: members, tried in turn from a random one, which spreads a cluster's hosts over them.
        tls: certificate files, used for ``https`` endpoints only (contract 3.4).
        credentials: user and password; exchanged for a token when first needed.
        request_timeout_s: for one request with all its tries at all members.

    Raises:
        ConfigError: certificate files that cannot be used.

    Every request raises ``Unavailable`` when it should be tried again later and ``ConfigError`` when etcd refuses the
    user. A request that failed with ``Unavailable`` may have been carried out.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tls: TLSFiles = TLSFiles(),  # noqa: B008 (immutable)
        credentials: Credentials | None = None,
        *,
        request_timeout_s: float = 5.0,
    ) -> None:
        if not endpoints:
            raise ConfigError("--etcd-endpoints names no endpoint")
        self._tls = TLS(tls)
        if any(endpoint.scheme == "https" for endpoint in endpoints):
            self._tls.context()
        self._wires = [Wire(endpoint, self._tls) for endpoint in endpoints]
        self._at = random.randrange(len(self._wires))  # noqa: S311 (spreads load)
        self._tokens = Tokens(credentials)
        self._timeout_s = request_timeout_s
        self.outage = Outage(log, "etcd cannot be watched, trying for as long as it takes", "etcd is back")
        """Of all watches together."""
        self._found_working = asyncio.Event()

    async def get(self, key: bytes) -> Listing:
        """Read one key, linearizably; no entry when it does not exist."""
        reply, _ = await self._ask(_RANGE, pb.RangeRequest(key=key), key)
        return Listing(_kvs(reply.kvs), _age(reply.header))

    async def list(self, prefix: bytes) -> Listing:
        """Read all keys with a prefix as they stood at one revision, linearizably, in pages."""
        while True:
            listing = await self._list_pages(prefix)
            if listing is not None:
                return listing
            log.debug("history was compacted between two pages of a list, reading again")

    async def _list_pages(self, prefix: bytes) -> Listing | None:
        request = pb.RangeRequest(key=prefix, range_end=_after(prefix), limit=_FIRST_PAGE)
        kvs: list[KV] = []
        while True:
            try:
                reply, _ = await self._ask(_RANGE, request, prefix)
            except Refused as exc:
                if exc.status is Status.OUT_OF_RANGE and request.revision:
                    return None
                raise
            kvs += _kvs(reply.kvs, VALUE_BYTES)
            if not reply.more or not reply.kvs:
                return Listing(kvs, _age(reply.header)._replace(revision=request.revision or reply.header.revision))
            request.limit = _SMALL_PAGE if reply.ByteSize() > _LARGE_BYTES else _PAGE
            request.revision = request.revision or reply.header.revision
            request.key = kvs[-1].key + b"\0"
            await asyncio.sleep(0)

    async def written_since(self, prefix: bytes, revision: int) -> Listing:
        """Keys below a prefix that were written after a revision: what a watch may still have under way.

        Deletions do not show. One page at most: whoever is that far behind has to list anyway.
        """
        request = pb.RangeRequest(key=prefix, range_end=_after(prefix), limit=_PAGE, min_mod_revision=revision + 1)
        reply, _ = await self._ask(_RANGE, request, prefix)
        return Listing(_kvs(reply.kvs, VALUE_BYTES), _age(reply.header))

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Write a key whatever it holds now.

        Returns:
            The revision of the write. After a broken connection it may have been written twice.

        Raises:
            LeaseGone: the lease is not there any more.
        """
        try:
            reply, _ = await self._ask(_PUT, pb.PutRequest(key=key, value=value, lease=lease), key)
        except Refused as exc:
            _raise_if_lease_gone(exc, lease)
            raise
        return reply.header.revision

    async def delete(self, key: bytes) -> int:
        """Delete a key whatever it holds; one that is not there is success.

        Returns:
            The store's revision after it.
        """
        reply, _ = await self._ask(_DELETE, pb.DeleteRangeRequest(key=key), key)
        return reply.header.revision

    async def put_if(self, key: bytes, value: bytes, lease: int, *, mod_revision: int) -> TxnResult:
        """Write a key if it has not changed since we read it.

        A write whose answer got lost is tried again: if it had been carried out, the comparison fails and shows
        our own value under our own lease at a newer revision, which is success. The same holds when the caller
        repeats a call that ended in ``Unavailable``, as long as it names a lease (a lease is only ours).

        Args:
            key: key.
            value: new value.
            lease: etcd lease to attach it to; 0 = none.
            mod_revision: revision of the last write we know; 0 = the key must not exist.

        Raises:
            LeaseGone: the lease is not there any more.
        """
        write = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        try:
            result, repeated = await self._swap(key, mod_revision, write)
        except Refused as exc:
            _raise_if_lease_gone(exc, lease)
            raise
        if not result.succeeded and (repeated or lease):
            for now in result.kvs:
                if now.value == value and now.lease == lease and now.mod_revision > mod_revision:
                    return TxnResult(True, now.mod_revision, [])
        return result

    async def delete_if(self, key: bytes, *, mod_revision: int) -> TxnResult:
        """Delete a key if it has not changed since we read it.

        After a lost answer, a key that is gone counts as deleted by us: it makes no difference.
        """
        write = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
        result, repeated = await self._swap(key, mod_revision, write)
        if repeated and not result.kvs:
            return TxnResult(True, result.revision, [])
        return result

    async def _swap(self, key: bytes, mod_revision: int, write: pb.RequestOp) -> tuple[TxnResult, bool]:
        if mod_revision:
            compare = pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=mod_revision)
        else:
            compare = pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=0)
        read = pb.RequestOp(request_range=pb.RangeRequest(key=key))
        request = pb.TxnRequest(compare=[compare], success=[write], failure=[read])
        reply, repeated = await self._ask(_TXN, request, key)
        found = [] if reply.succeeded else [kv for said in reply.responses for kv in _kvs(said.response_range.kvs)]
        return TxnResult(reply.succeeded, reply.header.revision, found), repeated

    async def grant(self, ttl_s: int) -> int:
        """Make a lease.

        Args:
            ttl_s: seconds to live, at least 1; etcd raises very short ones to its own minimum of about 2.

        Returns:
            Its id. We choose it, so that a repeated try leaves no orphan behind (contract 11.47).
        """
        lease = int.from_bytes(os.urandom(8), "big") >> 1 or 1
        try:
            await self._ask(_GRANT, pb.LeaseGrantRequest(TTL=ttl_s, ID=lease), _lease_name(lease))
        except Refused as exc:
            if exc.message != "etcdserver: lease already exists":
                raise
        return lease

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that is gone already is success."""
        try:
            await self._ask(_REVOKE, pb.LeaseRevokeRequest(ID=lease), _lease_name(lease))
        except Refused as exc:
            if exc.status is not Status.NOT_FOUND:
                raise

    async def time_to_live(self, lease: int) -> int:
        """Seconds a lease has left; -1 when it is gone."""
        reply, _ = await self._ask(_TTL, pb.LeaseTimeToLiveRequest(ID=lease), _lease_name(lease))
        return reply.TTL

    async def watch(self, prefix_or_key: bytes, *, prefix: bool, start_revision: int) -> AsyncGenerator[Batch, None]:
        """Follow a key or all keys with a prefix, for ever: each change once, in order, whichever member fails.

        What breaks it is logged (a line when it starts and one when it ends) and tried again with growing pauses,
        a refused password too. Leave it through ``contextlib.aclosing`` or by cancelling the task.

        Args:
            prefix_or_key: what to follow.
            prefix: whether it is a prefix.
            start_revision: first revision of interest, at least 1: that of the list plus one.

        Raises:
            Compacted: the history from where we are has been thrown away, or the store is behind it; nothing else.
        """
        if start_revision < 1:
            raise ValueError(f"a watch cannot start at revision {start_revision}")
        create = pb.WatchCreateRequest(
            key=prefix_or_key,
            range_end=_after(prefix_or_key) if prefix else b"",
            start_revision=start_revision,
            progress_notify=True,
        )
        pauses, failures, loop = backoff(cap_s=_PAUSE_S), 0, asyncio.get_running_loop()
        while True:
            wire, working_since = self._wires[self._at], None
            try:
                async with contextlib.aclosing(self._watch_once(wire, create)) as batches:
                    async for batch in batches:
                        if working_since is None:
                            working_since = loop.time()
                            self.outage.over()
                            self._works_again()
                        if batch.revision >= create.start_revision:
                            create.start_revision = batch.revision + 1
                            yield batch
            except Compacted:
                raise
            except (Unavailable, ConfigError) as exc:
                if working_since is not None and loop.time() - working_since >= _STEADY_S:
                    pauses, failures = backoff(cap_s=_PAUSE_S), 0
                failures += 1
                if failures >= len(self._wires):  # a member lost while others live is no outage
                    self.outage.failed(exc)
                else:
                    log.debug("watch moves to another member key=%s reason=%s", _show(prefix_or_key), exc)
            self._rotate(wire)
            await self._pause(next(pauses))

    def _works_again(self) -> None:
        """Wake all watches that pause: what one of them found working need not be found by each."""
        self._found_working.set()
        self._found_working.clear()

    async def _pause(self, seconds: float) -> None:
        await heard(self._found_working, seconds)

    async def _watch_once(self, wire: Wire, create: pb.WatchCreateRequest) -> AsyncGenerator[Batch, None]:
        """Watch through one member until it fails; the first batch, without news, tells that it works."""
        metadata = await self._tokens.metadata(wire, self._timeout_s)
        # without "hasleader" a member that lost its quorum keeps the watch open and silent
        metadata["hasleader"] = "true"
        revision = create.start_revision - 1
        request = pb.WatchRequest(create_request=create)
        async with contextlib.aclosing(
            wire.stream(_WATCH, request, timeout_s=self._timeout_s, metadata=metadata)
        ) as replies:
            async for reply in replies:
                if reply.canceled:
                    self._raise_canceled(wire, reply, create.key, metadata)
                if reply.created and reply.header.revision < revision:
                    # a store that lost its data, or an old backup: it would be silent until it gets that far
                    raise Compacted(f"etcd is at revision {reply.header.revision}, we have seen {revision}: list again")
                if reply.events:
                    longest = VALUE_BYTES if create.range_end else None
                    events = [Event(_kv(event.kv, longest), event.type == pb.Event.DELETE) for event in reply.events]
                    # Resume after what was delivered, never after what a header says: a member that still replays
                    # history names its newest revision there, and what lies between would be lost.
                    revision = events[-1].kv.mod_revision
                    yield Batch(events, revision)
                else:
                    if not reply.created:  # then it is progress: nothing happened up to the header's revision
                        revision = max(revision, reply.header.revision)
                    yield Batch([], revision)

    def _raise_canceled(self, wire: Wire, reply: pb.WatchResponse, key: bytes, metadata: dict[str, str]) -> None:
        if reply.compact_revision:
            raise Compacted(f"etcd has compacted its history up to revision {reply.compact_revision}: list again")
        # A dead token shows here, not as an error of the call; etcd 3.4 says Unauthenticated, 3.5 PermissionDenied.
        if metadata.get("token"):
            self._tokens.refused(metadata)
        raise Broken(wire.endpoint, f"it refuses {self._tokens.who} to watch {_show(key)}: {reply.cancel_reason}")

    def reload(self) -> None:
        """Read the certificate files again; connections made from now on use them. Never raises, but logs."""
        self._tls.reload()

    def describe(self) -> str:
        """The endpoints, for sentences."""
        return ",".join(str(wire.endpoint) for wire in self._wires)

    @property
    def endpoint(self) -> Endpoint:
        """The member that is asked first now."""
        return self._wires[self._at].endpoint

    async def close(self) -> None:
        """Close all connections; leases stay."""
        await asyncio.gather(*(wire.close() for wire in self._wires))

    async def _ask(self, method: Method[Request, Reply], request: Request, about: bytes) -> tuple[Reply, bool]:
        """Ask member after member until one answers.

        Returns:
            The answer, and whether an earlier try may have been carried out too.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout_s
        failures: dict[Endpoint, str] = {}
        token_renewed = False
        pauses = backoff(0.05, 0.5)
        # one try more than members: an idle connection's death often shows only when it is used
        for tries_left in range(len(self._wires) + 1, 0, -1):
            if failures and deadline - clock() < _LEAST_S * tries_left:
                break
            wire = self._wires[self._at]
            try:
                while True:
                    budget_s = max((deadline - clock()) / tries_left, _LEAST_S)
                    metadata = await self._tokens.metadata(wire, budget_s)
                    try:
                        return await wire.call(method, request, timeout_s=budget_s, metadata=metadata), bool(failures)
                    except Refused as exc:
                        if not exc.wants_token or token_renewed:
                            raise
                        self._tokens.refused(metadata)
                        token_renewed = True
            except Broken as exc:
                if isinstance(exc, Refused) and exc.status is Status.PERMISSION_DENIED:
                    raise ConfigError(
                        f"etcd refuses {self._tokens.who} access to {_show(about)}: grant a role with that permission"
                    ) from exc
                if isinstance(exc, Refused) and exc.is_final and not exc.wants_token:
                    raise
                failures[wire.endpoint] = exc.reason
                self._rotate(wire)
            if len(failures) == len(self._wires) and tries_left > 1:
                await asyncio.sleep(next(pauses))
        said = (f"{w.endpoint}: {failures[w.endpoint]}" for w in self._wires if w.endpoint in failures)
        raise Unavailable("etcd at " + "; ".join(said))

    def _rotate(self, failed: Wire) -> None:
        if self._wires[self._at] is failed:  # else another call has moved on already
            self._at = (self._at + 1) % len(self._wires)


def _age(header: pb.ResponseHeader) -> Age:
    return Age(header.revision, header.cluster_id, header.raft_term)


def _kv(kv: pb.KeyValue, longest: int | None) -> KV:
    return KV(kv.key, kv.value[:longest], kv.mod_revision, kv.lease, kv.version, kv.create_revision)


def _kvs(kvs: Iterable[pb.KeyValue], longest: int | None = None) -> list[KV]:
    return [_kv(kv, longest) for kv in kvs]


def _after(prefix: bytes) -> bytes:
    """The first key behind all that begin with a prefix; etcd reads a single NUL as "to the end"."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"


def _show(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _lease_name(lease: int) -> bytes:
    return b"lease %x" % lease


def _raise_if_lease_gone(exc: Refused, lease: int) -> None:
    if exc.message == "etcdserver: requested lease not found":
        raise LeaseGone(f"etcd lease {lease:x} has expired or been revoked: grant a new one") from exc
