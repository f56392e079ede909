"""The health server, asked over a real socket (contract 10.1, failures F41)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from flanneld.errors import ConfigError
from flanneld.report.health import Health
from tests.support.wait import until


@pytest.fixture
async def health() -> AsyncIterator[Health]:
    server = Health()
    task = asyncio.create_task(server.serve("127.0.0.1", 0))
    await until(lambda: server.port or task.done(), what="health server to listen")
    yield server
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def talk(server: Health, request: bytes) -> bytes:
    """Everything the server sends to one request, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    async with asyncio.timeout(3):
        answer = await reader.read()
    writer.close()
    return answer


async def ask(server: Health, path: str, method: str = "GET") -> tuple[int, str]:
    answer = await talk(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: text/plain" in head
    return int(head.split()[1]), body.decode()


async def test_alive_before_ready(health: Health) -> None:
    assert await ask(health, "/healthz") == (200, "flanneld is running")
    assert await ask(health, "/readyz") == (503, "flanneld is not ready yet\nstarting")


async def test_readiness_comes_and_goes_with_its_reasons(health: Health) -> None:
    health.set_ready([])
    assert await ask(health, "/readyz") == (200, "flanneld is ready")
    health.set_ready(["subnet.env is not written", "2 peers cannot be reached"])
    status, body = await ask(health, "/readyz")
    assert status == 503
    assert body.splitlines() == ["flanneld is not ready yet", "subnet.env is not written", "2 peers cannot be reached"]
    assert await ask(health, "/healthz") == (200, "flanneld is running")


async def test_a_reason_that_quotes_somebody_is_one_line_without_terminal_codes(health: Health) -> None:
    health.set_ready(["etcd says: gone\nflanneld is ready\x1b[2J"])
    _, body = await ask(health, "/readyz")
    assert body.splitlines() == ["flanneld is not ready yet", r"etcd says: gone\nflanneld is ready\x1b[2J"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
async def test_any_method_will_do(health: Health, method: str) -> None:
    assert await ask(health, "/healthz?verbose", method) == (200, "flanneld is running")


async def test_head_has_no_body(health: Health) -> None:
    assert await ask(health, "/healthz", "HEAD") == (200, "")


@pytest.mark.parametrize("path", ["/", "/healthz/", "/metrics", "/healthzz"])
async def test_other_paths_are_not_found(health: Health, path: str) -> None:
    assert (await ask(health, path))[0] == 404


async def test_bare_line_feeds_are_understood(health: Health) -> None:
    assert (await talk(health, b"GET /healthz HTTP/1.0\n\n")).endswith(b"\r\n\r\nflanneld is running")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/2.0\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\na: " + b"x" * 20_000 + b"\r\n\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
    ],
)
async def test_bad_requests_get_an_answer_and_do_no_harm(health: Health, request_bytes: bytes, status: bytes) -> None:
    assert (await talk(health, request_bytes)).split()[1] == status
    assert (await ask(health, "/healthz"))[0] == 200


async def test_answer_to_a_large_post_is_not_cut_off(health: Health) -> None:
    request = b"POST /healthz HTTP/1.1\r\nContent-Length: 500000\r\n\r\n" + b"x" * 500_000
    assert (await talk(health, request)).endswith(b"flanneld is running")


async def test_silent_clients_do_not_keep_others_out(health: Health) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", health.port) for _ in range(30)]
    assert (await ask(health, "/healthz"))[0] == 200
    for _, writer in silent:
        writer.close()


async def test_whoever_holds_connections_open_loses_the_oldest_and_keeps_no_probe_out(health: Health) -> None:
    """A pod that could make the kubelet's probe fail could have the daemon restarted for as long as it likes."""
    flood = [await asyncio.open_connection("127.0.0.1", health.port) for _ in range(300)]
    assert (await ask(health, "/healthz"))[0] == 200
    async with asyncio.timeout(3):
        assert await flood[0][0].read() == b""
    for _, writer in flood:
        writer.close()


async def test_a_client_that_sends_without_end_is_cut_off(health: Health) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", health.port)
    writer.write(b"POST /healthz HTTP/1.1\r\n\r\n")
    sent = 0
    with suppress(ConnectionError):
        while sent < 1 << 26:
            writer.write(bytes(1 << 16))
            sent += 1 << 16
            await writer.drain()
    assert sent < 1 << 26, "the bound, and what the kernel's buffers hold"
    assert (await ask(health, "/healthz"))[0] == 200
    writer.transport.abort()


async def test_stop_does_not_wait_for_a_client_that_never_finishes_asking() -> None:
    server = Health()
    task = asyncio.create_task(server.serve("127.0.0.1", 0))
    await until(lambda: server.port or task.done())
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz")
    await ask(server, "/healthz")  # so that the half request has been seen
    loop = asyncio.get_running_loop()
    began = loop.time()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert loop.time() - began < 3  # contract 10.1
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_idle_server_stops_at_once() -> None:
    server = Health()
    task = asyncio.create_task(server.serve("127.0.0.1", 0))
    await until(lambda: server.port or task.done())
    task.cancel()
    async with asyncio.timeout(1):
        with suppress(asyncio.CancelledError):
            await task


async def test_busy_port_is_named_with_its_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            await Health().serve("127.0.0.1", port)
    assert str(caught.value) == (
        f"the health server cannot listen on 127.0.0.1 port {port}, another program does "
        f"(ss -ltnp 'sport = :{port}' shows it): choose another --healthz-port"
    )


async def test_foreign_address_is_named_with_its_remedy() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 port 0, this host does not have that address: .*--healthz-ip"):
        await Health().serve("192.0.2.1", 0)


async def test_double_colon_listens_for_both_families() -> None:
    server = Health()
    task = asyncio.create_task(server.serve("::", 0))
    await until(lambda: server.port or task.done())
    assert (await ask(server, "/healthz"))[0] == 200
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
