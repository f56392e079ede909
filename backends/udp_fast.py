"""The ``kernel`` rung of the udp backend's ladder: packets flow through eBPF programs and never see user space.

What is in the kernel, and how a fresh process knows that it is ours:

- filters on the TUN (egress), on the external interface (ingress) and on the far end of the compat pair: by name,
  ``flanneld-udp-<TUN>-encap``, ``-decap``, ``-compat`` and ``-split``;
- a veth pair ``<TUN>c0`` and ``<TUN>c1``, for what must be finished or split in software: by name;
- maps and programs: by the filters that hold them; nothing is pinned.

The filters hold everything, so forwarding goes on when this process is killed. The next one builds its own maps,
fills them at the first ``apply`` and only then swaps the programs in place: there is no moment without a data path,
and nothing has to be understood of what an older version left. Packets that the programs leave alone reach the TUN's
descriptor and the backend's socket, which are the pump's. The TUN itself (making it, keeping it, its address, its
route) is the backend's. That socket must not enable UDP_GRO while this rung runs: the kernel would merge datagrams
before ``decap`` sees them.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from backends import udp_programs as programs
from backends.udp_decap import Decap, decap
from backends.udp_encap import Encap, encap
from backends.udp_packet import UdpPeer
from backends.udp_tables import Shape, Tables, counters_of, make_counters, totals
from backends.udp_trial import scratch_names, try_in_scratch
from flanneld.errors import KernelError
from flanneld.kernel import tc
from flanneld.kernel.bpf import Loaded, Map
from flanneld.kernel.egress import egress_interfaces
from flanneld.kernel.nlsocket import Socket
from flanneld.kernel.tc import Direction
from flanneld.kernel.veth import ensure_pair, is_as_made, link_header_bytes, remove_pair
from flanneld.kernel.xfrm import has_policies
from flanneld.model.addr import IP, Prefix, format_ip

NAME_BYTES = 13
"""Longest TUN name: the pair's names are two longer."""


class FastConfig(NamedTuple):
    """What the data path is built on."""

    tun: str
    """Device name; it must exist from ``start`` on."""
    tun_ip: IP
    ext: str
    """External interface."""
    ext_ip: IP
    """Its IPv4 address: source of what we send, destination of what we take."""
    port: int
    network: Prefix
    """The cluster's IPv4 network."""
    subnet_len: int
    """Usual length of peers' subnets."""
    mtu: int
    """Of the TUN, in bytes."""
    compat_always: bool = False
    """Finish every packet in software, for network cards that do it wrongly."""
    hash_source_port: bool = False
    """Spread flows over source ports, so that a receiver's card spreads load; firewalls may expect flannel's one."""
    ignore_xfrm: bool = False
    """Use this rung beside IPsec policies, which it goes around."""


class FastPath:
    """One data path on one TUN; methods are called from one thread."""

    name = "kernel"

    def __init__(self) -> None:
        self._cfg: FastConfig | None = None
        self._sock: Socket | None = None
        self._counters: Map | None = None
        self._tables: Tables | None = None
        self._peers: dict[Prefix, UdpPeer] = {}
        self._elsewhere: dict[IP, bool] = {}
        """By public address of a peer, whether it is reached through another than the external interface."""
        self._attached: dict[tuple[str, Direction, str], tuple[int, int]] = {}
        """By device, direction and name of our filters: interface index and program."""
        self._pair: frozenset[int] = frozenset()

    def probe(self, cfg: FastConfig) -> str | None:
        """Find out by doing it: build, load, run and attach everything, on a scratch pair of devices.

        Returns:
            None if this host can; else why not, in one sentence.
        """
        try:
            if why := _obstacle(cfg):
                return why
            with contextlib.closing(Socket()) as sock:
                return try_in_scratch(sock, cfg.tun, cfg.ext, cfg.ext_ip, cfg.port)
        except KernelError as exc:
            return str(exc)

    def start(self, cfg: FastConfig) -> None:
        """Get ready. Packets flow from the first ``apply`` on, so that a predecessor's path is not cut before.

        Raises:
            KernelError: the kernel refuses.
        """
        self._sock = Socket()
        self._cfg = cfg
        self._counters = self._adopted_counters() or make_counters()

    def apply(self, peers: Mapping[Prefix, UdpPeer]) -> None:
        """Make this the whole set of peers, writing only the difference.

        Raises:
            KernelError: refused; the next call tries again.
        """
        self._peers = dict(peers)
        left = self._reached_elsewhere(peers)
        if self._tables is not None and self._tables.shape.fits(peers):
            self._tables.apply(peers, left)
            return
        cfg, fresh = self._running, Tables(Shape.of(peers, self._running.subnet_len))
        try:
            fresh.apply(peers, left)
            self._attach(cfg, fresh)
        except BaseException:
            fresh.close()
            raise
        if self._tables is not None:
            self._tables.close()
        self._tables = fresh

    def is_intact(self) -> bool:
        """Whether all that was attached still is; if not, ``reattach`` repairs it.

        Somebody may have removed a qdisc with everybody's filters, made a device again under its old name, or taken an
        end of the pair down.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        if self._sock is None:
            return False
        for (device, direction, name), (ifindex, program) in self._attached.items():
            try:
                present = tc.find(self._sock, ifindex, direction, name)
                if present is None or present.program_id != program or socket.if_nametoindex(device) != ifindex:
                    return False
            except OSError:
                return False
        return self._cfg is not None and is_as_made(self._sock, *_pair_names(self._cfg.tun))

    def pair(self) -> frozenset[int]:
        """Interface indexes of the compat pair."""
        return self._pair

    def devices(self) -> frozenset[int]:
        """Interface indexes of the devices that packets flow through."""
        return self._pair.union(ifindex for ifindex, _program in self._attached.values())

    @property
    def port_id(self) -> int:
        """Netlink port from which filters are attached, so that others' doing can be told from ours."""
        return self._sock.port_id if self._sock is not None else 0

    def left_to_pump(self) -> frozenset[str]:
        """Public addresses of the peers whose packets are the pump's, as text."""
        return frozenset(format_ip(ip) for ip, elsewhere in self._elsewhere.items() if elsewhere)

    def reattach(self, cfg: FastConfig) -> None:
        """Take another external interface, address, port or switch; or repair what is not intact.

        Programs are swapped in place, so no packet is lost that still can arrive. The TUN's name stays.

        Raises:
            KernelError: refused; the next call tries again.
        """
        self._cfg = cfg
        if self._tables is not None:
            self._attach(cfg, self._tables)
        self.follow_routes()

    def follow_routes(self) -> None:
        """Look up again through which interface each peer is reached, after the routing table changed.

        Raises:
            KernelError: refused; the next call tries again.
        """
        self._elsewhere.clear()
        if self._tables is not None:
            self._tables.apply(self._peers, self._reached_elsewhere(self._peers))

    def is_filled(self) -> bool:
        """Whether the tables of peers are as they were written.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        return self._tables is None or self._tables.is_filled()

    def mend(self) -> int:
        """Put right what somebody else did to the tables of peers; how many entries were wrong.

        Raises:
            KernelError: refused; the next call tries again.
        """
        return self._tables.mend() if self._tables is not None else 0

    def stats(self) -> dict[str, int]:
        """What was counted since the data path was made, restarts of the daemon included.

        Raises:
            KernelError: the counters cannot be read.
        """
        return totals(self._counters) if self._counters is not None else {}

    def stop(self, keep: bool) -> None:
        """Let go.

        Args:
            keep: leave everything in place, forwarding, for a successor. Otherwise remove all of it but the qdiscs,
                which others may be using.

        Raises:
            KernelError: something could not be removed.
        """
        try:
            if not keep and self._cfg and self._sock:
                _remove(self._sock, self._cfg.tun)
        finally:
            for held in (self._tables, self._counters, self._sock):
                if held is not None:
                    held.close()
            self._tables = self._counters = self._sock = self._cfg = None
            self._attached, self._peers, self._elsewhere = {}, {}, {}

    # ---- attaching -----------------------------------------------------------------------------

    @property
    def _running(self) -> FastConfig:
        if self._cfg is None:
            raise RuntimeError("the data path has not been started")
        return self._cfg

    def _reached_elsewhere(self, peers: Mapping[Prefix, UdpPeer]) -> set[IP]:
        """Peers that the pump must send to.

        The programs send through the external interface whatever the routing table says, and where it says something
        else the packets would vanish. Each address is looked up once; one without any route counts as reached.
        """
        if self._sock is None or self._cfg is None:
            raise RuntimeError("the data path has not been started")
        current = {peer.ip for peer in peers.values() if len(peer.ip) == 4}
        if len(self._elsewhere) > 2 * len(current):
            self._elsewhere.clear()  # rather than keep all who ever were; they are looked up again
        if fresh := [ip for ip in current if ip not in self._elsewhere]:
            ext = _index(self._cfg.ext)
            ways = egress_interfaces(self._sock, fresh, self._cfg.ext_ip)
            self._elsewhere |= {ip: ways.get(ip, ext) != ext for ip in fresh}
        return {ip for ip, elsewhere in self._elsewhere.items() if elsewhere}

    def _attach(self, cfg: FastConfig, tables: Tables) -> None:
        """Receive first, then transmit from the wire backwards: nobody is given a packet who is not ready for it."""
        sock, counters = self._sock, self._counters
        if sock is None or counters is None:
            raise RuntimeError("the data path has not been started")
        tun, ext = _index(cfg.tun), _index(cfg.ext)
        near_name, far_name = _pair_names(cfg.tun)
        near, far = ensure_pair(sock, near_name, far_name)
        self._pair = frozenset({near, far})
        link_header = link_header_bytes(cfg.ext)
        split = Decap(tables.sources.fd, counters.fd, cfg.ext_ip, cfg.port, tun, programs.ETHERNET, far_end=True)
        receive = split._replace(link_header=link_header, split_ifindex=near if link_header else 0, far_end=False)
        compat = Encap(
            tables.peers.fd,
            counters.fd,
            cfg.ext_ip,
            ext,
            cfg.port,
            tables.shape.prefix_length,
            hash_source_port=cfg.hash_source_port,
        )
        transmit = compat._replace(compat_ifindex=near, compat_always=cfg.compat_always)
        attached = {}
        for program, device, ifindex, direction, priority in (
            (decap("split", split), far_name, far, Direction.INGRESS, tc.PRIORITY - 1),
            (decap("decap", receive), cfg.ext, ext, Direction.INGRESS, tc.PRIORITY),
            (encap("compat", compat), far_name, far, Direction.INGRESS, tc.PRIORITY),
            (encap("encap", transmit), cfg.tun, tun, Direction.EGRESS, tc.PRIORITY),
        ):
            name = _filter_name(cfg.tun, program.name)
            tc.ensure_clsact(sock, ifindex)
            with contextlib.closing(Loaded.load(f"flannel_{program.name}", program.code())) as loaded:
                tc.attach(sock, ifindex, direction, loaded.fd, name, priority)
                attached[device, direction, name] = ifindex, loaded.info().id
        self._attached = attached
        _detach_decap(sock, cfg.tun, but=ext)

    def _adopted_counters(self) -> Map | None:
        """The predecessor's, found through its filter; a new one where it cannot be had."""
        cfg, sock = self._running, self._sock
        try:
            present = tc.find(sock, _index(cfg.tun), Direction.EGRESS, _filter_name(cfg.tun, "encap")) if sock else None
            if present is None:
                return None
            with contextlib.closing(Loaded.by_id(present.program_id)) as program:
                return counters_of(program)
        except KernelError:
            return None


def remove_leftovers(tun: str) -> None:
    """Remove the data path that a killed daemon left on a TUN; for a daemon that runs on another rung now.

    Raises:
        KernelError: something could not be removed.
    """
    with contextlib.closing(Socket()) as sock:
        _remove(sock, tun)


def find_leftovers(tun: str) -> dict[str, Callable[[], None]]:
    """What there is of the data path of a TUN, in words, and how to remove each; for cleanup.

    A ``clsact`` qdisc is among it where nothing but our filter hangs on it: the kernel does not tell who made it,
    and without a filter it does nothing.

    Raises:
        KernelError: the kernel cannot be asked.
    """
    found: dict[str, Callable[[], None]] = {}
    name = _filter_name(tun, "decap")
    with contextlib.closing(Socket()) as sock:
        for ifindex, device in socket.if_nameindex():
            if tc.find(sock, ifindex, Direction.INGRESS, name) is None:
                continue
            found[f"filter {name} on {device} and its eBPF programs"] = partial(_detach, ifindex, name)
            if tc.is_idle(sock, ifindex, name):
                found[f"qdisc clsact on {device}, where only that filter was"] = partial(_remove_clsact, ifindex, name)
    devices = {device for _ifindex, device in socket.if_nameindex()}
    for left, right in ((f"{tun}c0", f"{tun}c1"), scratch_names(tun)):
        if left in devices:
            found[f"links {left} and {right}"] = partial(_remove_links, left)
    return found


def _detach(ifindex: int, name: str) -> None:
    with contextlib.closing(Socket()) as sock:
        tc.detach(sock, ifindex, Direction.INGRESS, name)


def _remove_clsact(ifindex: int, name: str) -> None:
    with contextlib.closing(Socket()) as sock:
        if tc.is_idle(sock, ifindex, name):  # somebody may have hung his program there meanwhile
            tc.remove_clsact(sock, ifindex)


def _remove_links(left: str) -> None:
    with contextlib.closing(Socket()) as sock:
        remove_pair(sock, left)


def _remove(sock: Socket, tun: str) -> None:
    with contextlib.suppress(OSError):  # without the TUN its filter is gone too
        tc.detach(sock, socket.if_nametoindex(tun), Direction.EGRESS, _filter_name(tun, "encap"))
    remove_pair(sock, f"{tun}c0")
    remove_pair(sock, scratch_names(tun)[0])
    _detach_decap(sock, tun)


def _detach_decap(sock: Socket, tun: str, *, but: int = 0) -> None:
    """Remove what an earlier external interface still has, ours or a predecessor's."""
    for ifindex, _name in socket.if_nameindex():
        if ifindex != but:
            tc.detach(sock, ifindex, Direction.INGRESS, _filter_name(tun, "decap"))


def _obstacle(cfg: FastConfig) -> str | None:
    """What speaks against this rung before anything is tried."""
    if len(cfg.tun.encode()) > NAME_BYTES:
        return f"the TUN's name {cfg.tun} is longer than {NAME_BYTES} bytes, which leaves no names for the compat pair"
    if not cfg.ignore_xfrm and has_policies():
        return "this host has IPsec policies, which the kernel data path would go around"
    _index(cfg.ext)
    return None


def _pair_names(tun: str) -> tuple[str, str]:
    return f"{tun}c0", f"{tun}c1"


def _filter_name(tun: str, role: str) -> str:
    return f"flanneld-udp-{tun}-{role}"


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as exc:
        raise KernelError(f"find device {name}", errno.ENODEV) from exc
