"""``flannelctl health`` against the daemon's own health server (contract 10.1)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from flanneld.ctl import health as command
from flanneld.ctl.main import main
from flanneld.errors import Unavailable, UsageError
from flanneld.report.health import Health
from tests.support.wait import until


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLANNELD_HEALTHZ_IP", "FLANNELD_HEALTHZ_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def server() -> AsyncIterator[Health]:
    served = Health()
    task = asyncio.create_task(served.serve("127.0.0.1", 0))
    await until(lambda: served.port or task.done(), what="health server to listen")
    yield served
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def run(*words: str, process_1: str = "/sbin/init") -> int:
    """The command, in a thread because the server answers from this one."""
    return await asyncio.to_thread(command.main, words, process_1.split)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def test_says_the_daemons_answer_and_ends_by_it(server: Health, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"--url=http://127.0.0.1:{server.port}"
    assert await run(url) == 0
    assert capsys.readouterr().out == "flanneld is running\n"
    assert await run(url, "--ready") == 1
    assert capsys.readouterr().out == "flanneld is not ready yet\nstarting\n"
    server.set_ready([])
    assert await run(url, "--ready") == 0
    assert capsys.readouterr().out == "flanneld is ready\n"


async def test_a_path_in_the_url_is_asked(server: Health, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("--url", f"http://127.0.0.1:{server.port}/readyz") == 1
    assert "not ready yet" in capsys.readouterr().out


async def test_in_a_container_the_flags_of_process_1_tell_where(
    server: Health, capsys: pytest.CaptureFixture[str]
) -> None:
    # with an init before it, and the flag in its two-word form
    line = f"/sbin/docker-init -- /usr/bin/python3 -I /opt/bin/flanneld --ip-masq --healthz-port {server.port}"
    assert await run(process_1=line) == 0
    assert capsys.readouterr().out == "flanneld is running\n"


async def test_the_daemons_variables_tell_where(server: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_HEALTHZ_PORT", str(server.port))
    assert await run() == 0
    assert await run(process_1="/opt/bin/flanneld") == 0


async def test_a_daemon_without_health_server_is_running_but_not_known_ready(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await run(process_1="/opt/bin/flanneld --ip-masq") == 0
    assert "without a health server" in capsys.readouterr().out
    with pytest.raises(UsageError, match="start flanneld with --healthz-port"):
        await run("--ready", process_1="/opt/bin/flanneld --ip-masq")


async def test_no_daemon_and_no_address_is_a_question_back() -> None:
    with pytest.raises(UsageError, match="use --url"):
        await run()


def test_no_answer_is_one_sentence_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert main(["health", f"--url=http://127.0.0.1:{port}"]) == 1
    said = f"http://127.0.0.1:{port}/healthz gives no answer, does flanneld run there? (Connection refused)"
    assert capsys.readouterr().err == f"flannelctl: {said}\n"


async def test_what_is_not_http_is_no_answer() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="gives no answer"):
            await run(f"--url=http://127.0.0.1:{port}")


@pytest.mark.parametrize("url", ["127.0.0.1:8471", "https://h:1", "http://", "http://h:x", "http://h:0", ""])
def test_a_url_that_cannot_be_asked_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", f"--url={url}"]) == 2
    assert "use one such as http://127.0.0.1:8471" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ("--healthz-port=8081", ("127.0.0.1", 8081)),
        ("--healthz-ip=:: --healthz-port=8081", ("::1", 8081)),
        ("--healthz-ip=192.0.2.1 --healthz-port=1", ("192.0.2.1", 1)),
        ("--healthz-port=0", None),
        ("--no-such-flag --healthz-port=1", None),
    ],
)
def test_where_a_daemon_of_these_flags_is_reached(flags: str, where: tuple[str, int] | None) -> None:
    assert command.address(flags.split(), {}) == where
