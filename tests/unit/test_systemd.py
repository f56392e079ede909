"""sd_notify over real datagram sockets, by path and abstract (contract 0.5)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld.report.systemd import Notifier


class Systemd:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(2)

    def heard(self) -> str:
        return self.socket.recv(4096).decode()

    def notifier(self, **environ: str) -> Notifier:
        return Notifier({"NOTIFY_SOCKET": self.address, **environ})


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    manager = Systemd(str(tmp_path / "notify") if request.param == "path" else f"@flanneld-test-{secrets.token_hex(8)}")
    yield manager
    manager.socket.close()


def test_each_state_is_heard(systemd: Systemd) -> None:
    notifier = systemd.notifier()
    notifier.ready("312 peers")
    assert systemd.heard() == "READY=1\nSTATUS=312 peers"
    notifier.ready()
    assert systemd.heard() == "READY=1"
    notifier.status("waiting for etcd\nREADY=1")
    assert systemd.heard() == "STATUS=waiting for etcd READY=1"
    notifier.reloading()
    reloading, stamp = systemd.heard().split("\n")
    assert reloading == "RELOADING=1"
    assert stamp.removeprefix("MONOTONIC_USEC=").isdecimal()
    notifier.stopping()
    assert systemd.heard() == "STOPPING=1"


@pytest.mark.parametrize("pid", ["", str(os.getpid())], ids=["anybody", "this process"])
async def test_watchdog_is_fed_twice_in_its_time(systemd: Systemd, pid: str) -> None:
    notifier = systemd.notifier(WATCHDOG_USEC="20000", WATCHDOG_PID=pid)
    assert notifier.watchdog_s == 0.01
    notifier.ready()
    assert systemd.heard() == "READY=1"
    feeding = asyncio.create_task(notifier.feed_watchdog())
    for _ in range(3):
        assert await asyncio.to_thread(systemd.heard) == "WATCHDOG=1"
    feeding.cancel()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "9" * 30},
        {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"},
    ],
)
async def test_without_watchdog_feeding_ends_at_once(systemd: Systemd, environ: dict[str, str]) -> None:
    notifier = systemd.notifier(**environ)
    notifier.ready()
    async with asyncio.timeout(1):
        await notifier.feed_watchdog()


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "20000"}])
async def test_a_start_that_takes_long_gets_more_time(systemd: Systemd, environ: dict[str, str]) -> None:
    notifier = systemd.notifier(**environ)
    feeding = asyncio.create_task(notifier.feed_watchdog())
    assert "EXTEND_TIMEOUT_USEC=60000000" in await asyncio.to_thread(systemd.heard)
    feeding.cancel()


def test_reload_before_the_start_is_over_does_not_end_the_start(systemd: Systemd) -> None:
    notifier = systemd.notifier()
    notifier.reloaded()
    notifier.status("waiting for a lease")
    assert systemd.heard() == "STATUS=waiting for a lease"
    notifier.ready("done")
    assert systemd.heard() == "READY=1\nSTATUS=done"
    notifier.reloaded()
    assert systemd.heard() == "READY=1"


async def test_without_systemd_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000"})
    notifier.ready("x")
    notifier.stopping()
    await notifier.feed_watchdog()
    assert not caplog.records


@pytest.mark.parametrize("address", ["/nonexistent/notify", "vsock:2:1", "@" + "x" * 200])
def test_unusable_socket_is_told_once(address: str, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    with caplog.at_level(logging.WARNING):
        notifier.ready()
        notifier.stopping()
    assert len(caplog.records) == 1
    assert "systemd cannot be notified at NOTIFY_SOCKET" in caplog.text


def test_systemd_that_does_not_read_does_not_stop_us(systemd: Systemd) -> None:
    notifier = systemd.notifier()
    for _ in range(5000):
        notifier.status("x" * 100)
