"""A synchronous etcd client that knows when its bytes left: put, put many, delete ranges.

Not the daemon's own client, for two reasons: a measured latency must begin at a system call, not somewhere
in a queue of coroutines, and what is measured must not depend on what is measured with.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence

import h2.config
import h2.connection
import h2.events

from flanneld.errors import Unavailable
from flanneld.lab.netns import run_in

OPS_A_TXN = 128
"""etcd's default ``--max-txn-ops``."""
TIMEOUT_S = 30.0


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _field(number: int, value: bytes | int) -> bytes:
    """One protobuf field: bytes length-delimited, integers as varints."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _put(key: bytes, value: bytes, lease: int) -> bytes:
    return _field(1, key) + _field(2, value) + _field(3, lease)


class Store:
    """One connection to etcd, made inside a namespace.

    Field numbers are those of etcd's ``rpc.proto`` (etcdserverpb).
    """

    def __init__(self, netns: str, address: str, port: int) -> None:
        self._sock = run_in(netns, lambda: socket.create_connection((address, port), TIMEOUT_S))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._flush()
        self._authority = f"{address}:{port}"
        # A day is longer than any run; a key without a lease would be a reservation, another thing (contract 3.40).
        self.lease = 0x6265_6E63_6800 | (time.time_ns() & 0xFF)
        self._call("Lease/LeaseGrant", _field(1, 86_400) + _field(2, self.lease))

    def close(self) -> None:
        """Hang up; leases stay."""
        self._sock.close()

    def put(self, key: bytes, value: bytes) -> int:
        """Write a key; returns the ``monotonic_ns`` just before the request went out."""
        return self._call("KV/Put", _put(key, value, self.lease))

    def put_all(self, items: Iterable[tuple[bytes, bytes]]) -> int:
        """Write many keys, 128 in a transaction; returns when the first request went out."""
        ops = [_field(2, _field(2, _put(key, value, self.lease))) for key, value in items]
        started = 0
        for at in range(0, len(ops), OPS_A_TXN):
            sent = self._call("KV/Txn", b"".join(ops[at : at + OPS_A_TXN]))
            started = started or sent
        return started

    def delete(self, keys: Iterable[bytes]) -> None:
        """Delete some keys, 128 in a transaction."""
        ops = [_field(2, _field(3, _field(1, key))) for key in keys]
        for at in range(0, len(ops), OPS_A_TXN):
            self._call("KV/Txn", b"".join(ops[at : at + OPS_A_TXN]))

    def delete_ranges(self, ranges: Sequence[tuple[bytes, bytes]]) -> int:
        """Delete all keys of some half-open ranges at one revision; returns when the request went out."""
        ops = b"".join(_field(2, _field(3, _field(1, first) + _field(2, end))) for first, end in ranges)
        return self._call("KV/Txn", ops)

    def _call(self, method: str, message: bytes) -> int:
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, [
            (":method", "POST"), (":scheme", "http"), (":path", f"/etcdserverpb.{method}"),
            (":authority", self._authority), ("te", "trailers"), ("content-type", "application/grpc"),
        ])  # fmt: skip
        rest = b"\0" + len(message).to_bytes(4, "big") + message
        started = 0
        while rest or not started:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            piece, rest = rest[:room], rest[room:]
            self._h2.send_data(stream, piece, end_stream=not rest)
            request = self._h2.data_to_send()
            started = started or time.monotonic_ns()
            self._sock.sendall(request)
            if rest and not self._h2.local_flow_control_window(stream):
                self._receive(stream)
        while not self._receive(stream):
            pass
        return started

    def _receive(self, stream: int) -> bool:
        """Take what the server sends next; tells whether the call has ended."""
        received = self._sock.recv(1 << 16)
        if not received:
            raise Unavailable("etcd closed the connection of the benchmark")
        ended = False
        for event in self._h2.receive_data(received):
            if isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                headers = {str(name): str(value) for name, value in event.headers or ()}
                if headers.get("grpc-status", "0") != "0":
                    raise Unavailable(f"etcd refuses the benchmark: {headers.get('grpc-message')}")
            elif isinstance(event, h2.events.StreamEnded):
                ended = ended or event.stream_id == stream
            elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                raise Unavailable(f"etcd ended a call of the benchmark: {event}")
        self._flush()
        return ended

    def _flush(self) -> None:
        if pending := self._h2.data_to_send():
            self._sock.sendall(pending)
