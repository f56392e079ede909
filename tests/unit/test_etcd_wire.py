"""An etcd, or what stands in its place, that says things no etcd says: one sentence, and no harm.

The server here is grpclib's, on loopback.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest
from google.protobuf.message import Message
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from flanneld.errors import FlannelError, Unavailable
from flanneld.sources import etcd_pb2 as pb
from flanneld.sources.etcd_client import Credentials, EtcdClient, parse_endpoints

WORDS = "first\nsecond \x1b[2J\u202e" + "y" * 5000


class Liar:
    """Refuses in words that were made for a terminal, gives tokens with a line end, swaps without telling."""

    def __mapping__(self) -> dict[str, Handler]:
        unary = Cardinality.UNARY_UNARY
        return {
            "/etcdserverpb.KV/Range": Handler(self._refuse, unary, pb.RangeRequest, pb.RangeResponse),
            "/etcdserverpb.KV/Txn": Handler(self._nothing, unary, pb.TxnRequest, pb.TxnResponse),
            "/etcdserverpb.Auth/Authenticate": Handler(
                self._token, unary, pb.AuthenticateRequest, pb.AuthenticateResponse
            ),
        }

    async def _refuse(self, stream: Stream[Message, Message]) -> None:
        await stream.recv_message()
        raise GRPCError(Status.INTERNAL, WORDS)

    async def _nothing(self, stream: Stream[Message, Message]) -> None:
        await stream.recv_message()
        await stream.send_message(pb.TxnResponse())

    async def _token(self, stream: Stream[Message, Message]) -> None:
        await stream.recv_message()
        await stream.send_message(pb.AuthenticateResponse(token="s3cret\nline"))


@pytest.fixture
async def endpoints() -> AsyncIterator[str]:
    server = Server([Liar()])
    await server.start("127.0.0.1", 0)
    [sock] = server._server.sockets  # type: ignore[union-attr]
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.close()
    await server.wait_closed()


async def test_a_servers_words_come_up_as_one_bounded_line_without_terminal_codes(endpoints: str) -> None:
    client = EtcdClient(parse_endpoints(endpoints))
    try:
        with pytest.raises(Unavailable) as refusal:
            await client.get(b"/x")
    finally:
        await client.close()
    text = str(refusal.value)
    assert "first" in text
    assert text.isprintable()
    assert len(text) < 1000


async def test_a_token_that_cannot_be_sent_is_neither_sent_nor_shown(endpoints: str) -> None:
    client = EtcdClient(parse_endpoints(endpoints), credentials=Credentials("u", "p"))
    try:
        with pytest.raises(FlannelError, match="token that cannot be sent back") as refusal:
            await client.get(b"/x")
    finally:
        await client.close()
    assert "s3cret" not in str(refusal.value)


async def test_a_refused_swap_that_does_not_tell_what_is_there_is_a_key_that_is_not(endpoints: str) -> None:
    client = EtcdClient(parse_endpoints(endpoints))
    try:
        assert (await client.put_if(b"/x", b"v", 7, mod_revision=3)).kvs == []
    finally:
        await client.close()


async def test_a_machine_that_stood_still_says_how_long_it_waited_and_not_no_time_at_all() -> None:
    """A suspended host, or one without a processor for a while: all the time of a request is over at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = EtcdClient(parse_endpoints(f"http://127.0.0.1:{silent.getsockname()[1]}"), request_timeout_s=1.0)
        asyncio.get_running_loop().call_later(0.1, time.sleep, 1.2)
        with pytest.raises(Unavailable, match=r"no answer within 0\.5 s$"):
            await client.get(b"/key")
        await client.close()
