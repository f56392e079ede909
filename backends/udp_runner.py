"""Chooses and runs what moves the udp backend's packets: the first data path that works.

``kernel``: programs in the kernel (``udp_fast.py``), with the pump as their slow path.
``gso``:    two threads of ours that gather datagrams (``udp_pump.py``).
``basic``:  the same, one datagram a call.

Owns the TUN and the socket. Why a path is not used is logged once and kept for the status line.

What stays when the daemon ends, by SIGTERM or otherwise:

- on the kernel path everything: the TUN, made persistent, with address and route, the pair ``flannel0c0`` and
  ``flannel0c1``, and the filters. Packets flow on, and the next daemon takes over without losing one. Only what the
  programs leave to the slow path (destinations without a lease) is dropped meanwhile. A next daemon on another path
  removes the pair, the filters and the persistence; ``udp_fast.remove_leftovers`` does that. The ``clsact``
  qdiscs stay, others may use them;
- on the other paths nothing: the TUN goes with the process that holds it, as with Go flanneld, and its route with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from backends.udp_fast import FastConfig, FastPath, remove_leftovers
from backends.udp_packet import PumpConfig, UdpPeer
from backends.udp_pump import Pump, probe_gso
from backends.udp_repairs import MapWatch, Repairs
from flanneld.contracts import Surroundings
from flanneld.errors import KernelError
from flanneld.kernel import tc, tun
from flanneld.kernel.listen import HookListener
from flanneld.model.addr import Prefix, format_ip

if TYPE_CHECKING:
    from backends.udp import UdpConf, UdpNetwork

log = logging.getLogger("flanneld.udp")

DEVICE = "flannel0"

_REMEDIES = {
    errno.EADDRINUSE: "is another flanneld using it? Backend.Port chooses another, on every host",
    errno.EADDRNOTAVAIL: "the address has just left this host",
}


class _Ground(NamedTuple):
    """What a data path is built on; when any of it changes, it is built again."""

    ifindex: int
    """Of the external interface: one that comes back under its old name is another one."""
    cfg: FastConfig


class UdpRunner:
    """See ``contracts.Runner``.

    Args:
        path: whose packets are moved.
        settings: from the network configuration.
        around: what the data path is built on.
        announced: whether our lease says already that our kernel receives.
    """

    def __init__(self, path: UdpNetwork, settings: UdpConf, around: Surroundings, *, announced: bool = False) -> None:
        self._path, self._settings, self._around = path, settings, around
        self.kernel_rx = announced
        """Whether our kernel receives: announced to peers."""
        self.rung = ""
        self.refusals: dict[str, str] = {}
        """Why better data paths are not used, by name."""
        self._fd = -1
        self._sock: socket.socket | None = None
        self._pump: Pump | None = None
        self._fast: FastPath | None = None
        self._hooks: HookListener | None = None
        self._ground: _Ground | None = None
        self._torn = False
        self._ended: BaseException | None = None
        self._applied: dict[Prefix, UdpPeer] | None = None
        self._repairs: Repairs | None = None
        self._maps: MapWatch | None = None

    def status(self) -> str:
        """The data path in use and why no better one is, for people."""
        why = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"udp data path {self.rung or 'not started'}" + (f" ({why})" if why else "")

    # ---- called by the reconcile loop ---------------------------------------------------------

    def prepare(self) -> None:
        """Make the TUN if it is not there, so that the planner finds a device to work on; look at filters and routes.

        Raises:
            KernelError: no TUN can be had, or the kernel cannot be asked.
        """
        if self._fd < 0 or self._ended is not None or not _exists(DEVICE):
            self._stop_pump()
            self._close_tun()
            self._fd = tun.open_tun(DEVICE)
            self._ended = None
        if self._fast is not None:
            tun.set_persist(self._fd, True)
            self._torn = not self._fast.is_intact()
            if not self._torn:
                self._fast.follow_routes()

    def apply(self) -> None:
        """Start what is not running, follow the external interface, repair, and hand over the peers.

        Raises:
            KernelError: no data path can be started, or the kernel refused the peers.
        """
        ground = self._wanted()
        if self._pump is None or ground != self._ground:
            self._start(ground)
            self._ground = ground
        elif self._fast is not None and self._torn:
            self._hang_again(self._fast, ground.cfg)
        self._torn = False
        if self._maps is not None and not self._maps.is_waiting:
            self._maps.look()
        if self._applied == self._path.peers:
            return
        peers = dict(self._path.peers)
        if self._fast is not None:
            self._fast.apply(peers)
        if self._pump is not None:
            self._pump.apply(peers)
        self._applied = peers

    def _hang_again(self, fast: FastPath, cfg: FastConfig) -> None:
        """Attach what somebody removed or replaced."""
        if self._repairs is not None and self._repairs.may("filters and devices"):
            fast.reattach(cfg)
            self._watch_hooks(fast)
            self._repairs.tell(
                "restored the udp data path's filters and devices: somebody had removed or changed some of them"
            )

    def close(self) -> None:
        """The daemon ends: the kernel path stays and forwards for its successor, the pump's TUN goes."""
        for watch in (self._maps, self._repairs, self._hooks):
            if watch is not None:
                watch.close()
        self._stop_pump()
        if self._fast is not None:
            self._fast.stop(keep=True)
        self._close_tun()

    # ---- the ladder ---------------------------------------------------------------------------

    def _start(self, ground: _Ground) -> None:
        """Bring up the best data path that works; the first start decides which, later ones move it.

        The socket comes first: a port that another daemon holds must be found before our filters take its packets.
        """
        self._stop_pump()
        sock = self._sock = self._open_socket(ground.cfg)
        if self._fast is not None:
            self._fast.reattach(ground.cfg)
        elif not self.rung:
            self._fast = self._try_kernel(ground.cfg)
        gso = self._settings.data_path != "basic" and self._allowed("gso", probe_gso())
        config = PumpConfig(ground.cfg.tun_ip, ground.cfg.mtu, ground.cfg.port, self._settings.any_source)
        self._pump = Pump(self._fd, sock, config, gso=gso, gro=self._fast is None, ended=self._pump_ended())
        self._pump.apply(self._path.peers)
        self._pump.start()
        self._applied = None
        if self._fast is not None:
            self._watch_hooks(self._fast)
            self._watch_maps(self._fast)
        elif not self.rung:
            self._remove_kernel_path()
        self._told("kernel" if self._fast is not None else "gso" if gso else "basic")

    def _told(self, rung: str) -> None:
        if rung != self.rung:
            self.rung = rung
            log.info("%s", self.status())
        if self.kernel_rx != (rung == "kernel"):
            self.kernel_rx = rung == "kernel"
            self._around.republish()

    def _try_kernel(self, cfg: FastConfig) -> FastPath | None:
        if self._settings.data_path not in ("auto", "kernel"):
            return None
        fast = FastPath()
        why = fast.probe(cfg)
        if why is None:
            try:
                tun.set_persist(self._fd, True)
                fast.start(cfg)
                fast.apply(self._path.peers)
            except KernelError as exc:
                why = str(exc)
                with contextlib.suppress(KernelError):
                    fast.stop(keep=False)
        return fast if self._allowed("kernel", why) else None

    def _remove_kernel_path(self) -> None:
        """A former daemon may have left one, which would go on with the peers of its time."""
        remove_leftovers(DEVICE)
        tun.set_persist(self._fd, False)

    def _watch_hooks(self, fast: FastPath) -> None:
        """Have the loop look when somebody removes a device, qdisc or filter that packets flow through."""
        if self._hooks is None:
            self._hooks = HookListener(lambda: self._around.look("udp filters"), tc.PRIORITIES, fast.port_id)
            self._hooks.start()
        self._hooks.devices, self._hooks.kept = fast.devices(), fast.pair()

    def _watch_maps(self, fast: FastPath) -> None:
        """Look into the maps now and then, and as soon as the pump gets a packet that was not for it."""
        if self._maps is None:
            self._repairs = Repairs(self._around)
            self._maps = MapWatch(fast, self._repairs, self._expect_strays, lambda: self._around.look("udp maps"))

    def _expect_strays(self) -> None:
        if self._pump is not None and self._fast is not None and self._maps is not None:
            loop, stray = asyncio.get_running_loop(), self._maps.stray
            self._pump.call_at_stray(partial(loop.call_soon_threadsafe, stray), self._fast.left_to_pump())

    def _allowed(self, name: str, why: str | None) -> bool:
        """Note a refusal; a data path that was asked for by name must work."""
        if why is None:
            return True
        told, self.refusals[name] = self.refusals.get(name), why
        if self._settings.data_path == name:
            raise KernelError(f'use the data path "{name}", as Backend.DataPath says', 0, f"{why}; auto takes the next")
        if told != why:
            log.info("udp data path %s is not used: %s", name, why)
        return False

    def _wanted(self) -> _Ground:
        path, settings = self._path, self._settings
        v4, ip = path.conf.v4, path.ext.ip
        if v4 is None or ip is None:
            raise KernelError("start the udp data path", errno.EADDRNOTAVAIL, "no IPv4 address")
        cfg = FastConfig(
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
        return _Ground(path.ext.ifindex, cfg)

    # ---- the pump -----------------------------------------------------------------------------

    def _open_socket(self, cfg: FastConfig) -> socket.socket:
        address, port = format_ip(cfg.ext_ip), cfg.port
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind((address, port))
        except OSError as exc:
            sock.close()
            raise KernelError(
                f"listen on UDP {address}:{port}", exc.errno or 0, _REMEDIES.get(exc.errno or 0, "")
            ) from exc
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

    def _close_tun(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _exists(device: str) -> bool:
    try:
        socket.if_nametoindex(device)
    except OSError:
        return False
    return True
