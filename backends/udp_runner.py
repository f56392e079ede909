"""Chooses and runs what moves the udp backend's packets: the first data path that works.

``kernel``: programs in the kernel (``udp_fast.py``), with the pump as their slow path.
``gso``:    two threads of ours that gather datagrams (``udp_pump.py``).
``basic``:  the same, one datagram a call.

Owns the TUN and the socket. Why a path is not used is logged once and kept for the status line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from backends.udp_packet import PumpConfig, UdpPeer
from backends.udp_pump import Pump, probe_gso
from flanneld.contracts import Surroundings
from flanneld.errors import KernelError
from flanneld.kernel import tun
from flanneld.model.addr import Prefix, format_ip

if TYPE_CHECKING:
    from backends.udp import UdpConf, UdpNetwork
    from backends.udp_fast import FastConfig, FastPath

log = logging.getLogger("flanneld.udp")

DEVICE = "flannel0"


class UdpRunner:
    """See ``contracts.Runner``."""

    def __init__(self, path: UdpNetwork, settings: UdpConf, around: Surroundings) -> None:
        self._path, self._settings, self._around = path, settings, around
        self.kernel_rx = False
        """Whether our kernel receives: announced to peers."""
        self.rung = ""
        self.refusals: dict[str, str] = {}
        """Why better data paths are not used, by name."""
        self._fd = -1
        self._sock: socket.socket | None = None
        self._pump: Pump | None = None
        self._fast: FastPath | None = None
        self._bound = ""
        self._ended: BaseException | None = None
        self._applied: dict[Prefix, UdpPeer] | None = None

    def status(self) -> str:
        """The data path in use and why no better one is, for people."""
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"udp data path {self.rung or 'not started'}" + (f" ({why})" if why else "")

    # ---- called by the reconcile loop ---------------------------------------------------------

    def prepare(self) -> None:
        """Make the TUN if it is not there, so that the planner finds a device to work on.

        Raises:
            KernelError: no TUN can be had.
        """
        if self._fd >= 0 and self._ended is None and _exists(DEVICE):
            return
        self._stop_pump()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._fd = tun.open_tun(DEVICE)
        self._ended, self._applied = None, None

    def apply(self) -> None:
        """Start what is not running yet, follow the external interface, and hand over the peers.

        Raises:
            KernelError: no data path can be started, or the kernel refused the peers.
        """
        address = f"{format_ip(self._path.ext.ip)}" if self._path.ext.ip else ""
        where = f"{self._path.ext.name}/{self._path.ext.ifindex}/{address}"
        if self._pump is None or where != self._bound:
            self._start(address)
            self._bound = where
        if self._applied == self._path.peers:
            return
        peers = dict(self._path.peers)
        if self._fast is not None:
            self._fast.apply(peers)
        if self._pump is not None:
            self._pump.apply(peers)
        self._applied = dict(peers)

    def close(self) -> None:
        """The daemon ends: the kernel path stays and forwards for its successor, the pump's TUN goes."""
        self._stop_pump()
        if self._fast is not None:
            self._fast.stop(keep=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- the ladder ---------------------------------------------------------------------------

    def _start(self, address: str) -> None:
        self._stop_pump()
        cfg = self._fast_config()
        if self._fast is not None:
            self._fast.reattach(cfg)
        elif not self.rung:
            self._fast = self._try_kernel(cfg)
        gso = self._settings.data_path != "basic" and self._allowed("gso", probe_gso())
        self._sock = self._open_socket(address)
        config = PumpConfig(self._path.subnet.host(0), self._path.mtu, self._settings.port, self._settings.any_source)
        self._pump = Pump(self._fd, self._sock, config, gso=gso, gro=self._fast is None, ended=self._pump_ended())
        self._pump.start()
        self._applied = None
        rung = "kernel" if self._fast is not None else "gso" if gso else "basic"
        if rung != self.rung:
            self.rung = rung
            log.info("%s", self.status())
        if self.kernel_rx != (self._fast is not None):
            self.kernel_rx = self._fast is not None
            self._around.republish()

    def _try_kernel(self, cfg: FastConfig) -> FastPath | None:
        if self._settings.data_path not in ("auto", "kernel"):
            return None
        from backends.udp_fast import FastPath  # not needed, and not loaded, on the other rungs

        fast = FastPath()
        why = fast.probe(cfg)
        if why is None:
            try:
                tun.set_persist(self._fd, True)
                fast.start(cfg)
                fast.apply(dict(self._path.peers))
            except KernelError as exc:
                why = str(exc)
                fast.stop(keep=False)
                tun.set_persist(self._fd, False)
        if not self._allowed("kernel", why):
            return None
        return fast

    def _allowed(self, name: str, why: str | None) -> bool:
        """Note a refusal; a data path that was asked for by name must work."""
        if why is None:
            return True
        if name not in self.refusals:
            log.info("udp data path %s is not used: %s", name, why)
        self.refusals[name] = why
        if self._settings.data_path == name:
            raise KernelError(f'use the data path "{name}" that Backend.DataPath asks for', 0, why)
        return False

    def _fast_config(self) -> FastConfig:
        from backends.udp_fast import FastConfig

        path, settings = self._path, self._settings
        v4, ip = path.conf.v4, path.ext.ip
        if v4 is None or ip is None:
            raise KernelError("start the udp data path", errno.EADDRNOTAVAIL, "no IPv4 address")
        return FastConfig(
            DEVICE,
            path.subnet.host(0),
            path.ext.name,
            ip,
            settings.port,
            v4.network,
            v4.subnet_len,
            path.mtu,
            settings.compat_always,
            settings.hash_source_port,
            settings.beside_ipsec,
        )

    # ---- the pump -----------------------------------------------------------------------------

    def _open_socket(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind((address, self._settings.port))
        except OSError as exc:
            sock.close()
            remedy = "is another flanneld using it? Backend.Port chooses another, on every host"
            raise KernelError(f"listen on UDP {address}:{self._settings.port}", exc.errno or 0, remedy) from exc
        return sock

    def _pump_ended(self) -> Callable[[BaseException], None]:
        """What a dying pump thread calls: the loop looks again, makes the device anew and starts over."""
        loop = asyncio.get_running_loop()

        def ended(why: BaseException) -> None:
            self._ended = why
            loop.call_soon_threadsafe(self._around.look, f"udp pump ended: {why}")

        return ended

    def _stop_pump(self) -> None:
        if self._pump is not None:
            self._pump.stop()
            self._pump = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _exists(device: str) -> bool:
    try:
        socket.if_nametoindex(device)
    except OSError:
        return False
    return True
