"""Two daemons that must not run side by side on one host, told by nothing but the host."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from pathlib import Path

import pytest

from flanneld.errors import ConfigError
from flanneld.report.host_lock import hold_host


@pytest.fixture
def network() -> str:
    return f"/test/{secrets.token_hex(8)}"


async def test_second_daemon_of_a_network_is_refused_by_pid(network: str, tmp_path: Path) -> None:
    with hold_host(network, tmp_path / "a.env"):
        for _ in range(40):  # more than the queue holds
            with (
                pytest.raises(
                    ConfigError, match=rf"another flanneld \(pid {os.getpid()}\) serves the network {network}"
                ),
                hold_host(network, tmp_path / "b.env"),
            ):
                pass
            await asyncio.sleep(0)


async def test_second_daemon_with_the_same_subnet_file_is_refused_however_it_is_spelled(
    network: str, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(tmp_path)
    with (
        hold_host(network, tmp_path / "a.env"),
        pytest.raises(ConfigError, match="give one of them its own --subnet-file"),
        hold_host(network + "b", tmp_path / "other" / "a.env"),
    ):
        pass


async def test_two_networks_with_files_of_their_own_run_side_by_side(network: str, tmp_path: Path) -> None:
    with hold_host(network, tmp_path / "a.env"), hold_host(network + "b", tmp_path / "b.env"):
        pass


async def test_what_is_let_go_can_be_held_again(network: str, tmp_path: Path) -> None:
    for _ in range(2):
        with hold_host(network, tmp_path / "a.env"):
            pass


async def test_socket_of_another_user_does_not_keep_us_from_working(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of abstract sockets are free for all users of the host."""
    with hold_host(network, tmp_path / "a.env"):
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with hold_host(network, tmp_path / "b.env"):
            assert "cannot make sure that no other flanneld serves the network" in caplog.text


async def test_host_without_abstract_sockets_costs_a_line(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    def refuse(_sock: socket.socket, _address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with hold_host(network, tmp_path / "a.env"):
        assert "reason=Permission denied" in caplog.text
