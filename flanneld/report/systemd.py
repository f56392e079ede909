"""Tells systemd how we are, by sd_notify's protocol; without ``NOTIFY_SOCKET`` it does nothing.

Source: sd_notify(3), sd_watchdog_enabled(3). Never fails: a supervisor that does not listen is logged once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping

_log = logging.getLogger(__name__)

ASK_S = 10.0
"""Seconds between two requests for more time to start …"""
MORE_S = 60
"""… each of which asks for so many: a request that comes late ends nothing."""


class Notifier:
    """The way to the service manager.

    Args:
        environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are looked up.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _socket_address(environ.get("NOTIFY_SOCKET", ""))
        self._warned = False
        self._was_ready = False
        self.watchdog_s = _watchdog_s(environ) if self._address else None
        """Seconds between two signs of life, half of what systemd allows; None = it wants none."""

    def ready(self, status: str = "") -> None:
        """Started up."""
        self._was_ready = True
        self._send("READY=1", f"STATUS={_line(status)}" if status else "")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        """Reading the configuration again; ``reloaded`` ends it."""
        # The time stamp is what Type=notify-reload demands since systemd 253.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        """Done with reloading; says nothing of a start that is not over yet, though systemd uses one word for both."""
        if self._was_ready:
            self._send("READY=1")

    def stopping(self) -> None:
        """Shutting down."""
        self._send("STOPPING=1")

    async def feed_watchdog(self) -> None:
        """Send signs of life for ever, from the event loop, so that a stuck loop is noticed.

        Until the start is over they ask for more time as well: a host waits for etcd as long as that takes, and
        systemd, whose watchdog sleeps till then, ends the start only of a process that is stuck. Returns when
        systemd wants nothing more.
        """
        while self._address and (self.watchdog_s or not self._was_ready):
            pause_s, alive = (self.watchdog_s, "WATCHDOG=1") if self.watchdog_s else (ASK_S, "")
            if self._was_ready:
                self._send(alive)
            else:
                self._send(alive, f"EXTEND_TIMEOUT_USEC={MORE_S * 1_000_000}")
                pause_s = min(pause_s, ASK_S)
            await asyncio.sleep(pause_s)

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)  # a service manager that does not read must not stop us
                sock.sendto("\n".join(filter(None, lines)).encode(errors="replace"), self._address)
        except OSError as error:
            if not self._warned:
                _log.warning("systemd cannot be notified at NOTIFY_SOCKET: %s", error.strerror or error)
            self._warned = True


def _socket_address(text: str) -> str | bytes:
    """The address to send to; a leading @ stands for the abstract namespace's NUL."""
    return b"\0" + os.fsencode(text[1:]) if text.startswith("@") else text


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Half of the time that systemd waits for a sign of life, if it waits for this process."""
    if environ.get("WATCHDOG_PID", "") not in ("", str(os.getpid())):
        return None
    text = environ.get("WATCHDOG_USEC", "")
    allowed_us = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    return allowed_us / 2_000_000 if allowed_us else None


def _line(text: str) -> str:
    return " ".join(text.split())
