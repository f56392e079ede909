"""Tells whoever asks over HTTP whether the daemon lives and whether the network works (contract 10.1).

``/healthz`` answers as long as the event loop turns; ``/readyz`` says what the reconcile loop last concluded
and, unlike Go flannel's, turns false again (failures F41). It decides nothing itself.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence

from flanneld.errors import ConfigError
from flanneld.model.plain import plain
from flanneld.report.pages import Page, PageServer

_log = logging.getLogger(__name__)


class Health:
    """The health server and the state it shows."""

    def __init__(self) -> None:
        self._reasons: tuple[str, ...] = ("starting",)
        self._remarks: tuple[str, ...] = ()
        self.port = 0
        """The port listened on; 0 until it is."""

    @property
    def ready(self) -> bool:
        """What ``/readyz`` says."""
        return not self._reasons

    def set_ready(self, reasons: Sequence[str], remarks: Sequence[str] = ()) -> None:
        """Say what keeps the daemon from being ready, one sentence each; nothing = ready.

        Args:
            reasons: why it is not ready.
            remarks: what is not as it should be all the same.
        """
        # some sentences quote a server, and are read by people at terminals
        self._reasons, self._remarks = tuple(map(plain, reasons)), tuple(map(plain, remarks))

    async def serve(self, ip: str, port: int) -> None:
        """Answer until cancelled, then finish the answers under way.

        Args:
            ip: address of this host to listen on; 0.0.0.0 and :: mean all.
            port: TCP port.

        Raises:
            ConfigError: that address and port cannot be listened on.
        """
        try:
            sock = _listen(ip, port)
            self.port = sock.getsockname()[1]
            _log.info("health server listens ip=%s port=%d", ip, self.port)
            await PageServer(self._answer).serve(sock)
        except OSError as error:
            raise ConfigError(_refused(ip, port, error)) from error

    def _answer(self, path: bytes) -> Page:
        """The first line of each body is flannel's, byte for byte."""
        if path == b"/healthz":
            return Page(200, "flanneld is running")
        if path != b"/readyz":
            return Page(404, "there is /healthz and /readyz\n")
        if self.ready:
            return Page(200, "\n".join(("flanneld is ready", *self._remarks)))
        return Page(503, "\n".join(("flanneld is not ready yet", *self._reasons, *self._remarks)))


def _listen(ip: str, port: int) -> socket.socket:
    """A listening socket; ``::`` takes IPv4 too, as Go's net.Listen has it and asyncio has not."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    return socket.create_server((ip, port), family=family, dualstack_ipv6=ip == "::")


def _refused(ip: str, port: int, error: OSError) -> str:
    where = f"the health server cannot listen on {ip} port {port}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where}, another program does (ss -ltnp 'sport = :{port}' shows it): choose another --healthz-port"
        case errno.EADDRNOTAVAIL:
            return f"{where}, this host does not have that address: choose another --healthz-ip"
        case errno.EACCES:
            return f"{where}, it may not use ports below 1024: choose another --healthz-port"
        case _:
            return f"{where} ({error.strerror or error}): choose another --healthz-ip or --healthz-port"
