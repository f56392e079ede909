"""The udp backend's packet path in user space: two threads between the TUN and the socket.

It is the ``gso`` and the ``basic`` rung of the ladder, and the slow path under the ``kernel`` rung, which leaves
it what the programs in the kernel do not take. It owns neither the TUN nor the socket, decides nothing about
peers, and never touches the event loop: what it has to say goes through ``stats`` and one callback.

What costs is the number of system calls, not the language (measured: a thread pair that moves single packets is
level with Go flanneld). So packets are read one after the other into one buffer, where neighbours of equal size
to one peer already lie as UDP_SEGMENT wants them, and leave by one call; UDP_GRO gives the same on the way in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Set
from io import FileIO

from backends.udp_icmp import Unreachable
from backends.udp_packet import (
    COUNTERS,
    PeerTable,
    PumpConfig,
    Target,
    UdpPeer,
    complete_checksum,
    destination,
    fault,
    take_hop,
)
from flanneld.errors import KernelError
from flanneld.kernel.privileges import keep_nothing
from flanneld.model.addr import Prefix

# include/uapi/linux/udp.h, include/uapi/linux/in.h; the socket module of Python 3.11 names none of them
UDP_SEGMENT, UDP_GRO = 103, 104
IP_MTU_DISCOVER, IP_PMTUDISC_WANT, IP_PMTUDISC_DO = 10, 1, 2

MAX_SEGMENTS = 64
"""Datagrams in one call; newer kernels take 128. Source: UDP_MAX_SEGMENTS, include/linux/udp.h of Linux 5.x."""
MAX_PAYLOAD = 65535 - 28
"""Bytes in one call: the limit of an IPv4 packet, segmented or not."""
SLOT = 65536
"""Room for one packet of any size, so that none is silently truncated (Go flanneld's are, contract 6.50)."""
RECEIVE_ROOM = 4 * 65536
"""For one aggregate; the kernel ends it at ``gro_ipv4_max_size``, by default 65536 bytes."""
SOCKET_BUFFER = 4 << 20
"""Bytes asked for each way, which the kernel doubles; at 768 for a small packet a tenth of a second of a flood."""
SEND_TIMEOUT_S = 1
"""How long a full device queue may hold up the sending thread; back-pressure is better than loss, up to here."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter once another asks for it; see ``Pump.start``."""
JOIN_TIMEOUT_S = 5.0

_DEFECTS = frozenset({errno.EBADF, errno.EBADFD, errno.ENOTSOCK, errno.EFAULT})
"""What no other packet or later moment cures: the descriptor is gone or the call is wrong."""

Ended = Callable[[BaseException], None]
"""Told, in the dying thread, why one ended without being asked to: the daemon must not go on as if it forwarded."""


class Pump:
    """Moves packets between a TUN and a UDP socket until stopped.

    Args:
        tun_fd: non-blocking, without packet information or vnet headers; stays the caller's.
        sock: UDP over IPv4, bound to our address and port (contract 6.49); stays the caller's, who leaves it
            alone while the pump runs. The pump sets its options.
        cfg: what to know of this host.
        gso: gather with UDP_SEGMENT, receive with UDP_GRO; see ``probe_gso``.
        gro: receive with UDP_GRO. To be False under the kernel rung: the kernel would merge datagrams before
            its programs see them.
        ended: told when a thread dies of a defect or a vanished TUN.

    It must be made in the network namespace of the TUN.
    """

    def __init__(
        self, tun_fd: int, sock: socket.socket, cfg: PumpConfig, *, gso: bool, ended: Ended, gro: bool = True
    ) -> None:
        configure(sock, gso=gso, gro=gso and gro)
        self._icmp = Unreachable(cfg)
        self._wake = _Wake()
        self._sender = _Sender(tun_fd, sock, cfg, self._wake, self._icmp, MAX_SEGMENTS if gso else 1)
        self._receiver = _Receiver(tun_fd, sock, cfg, self._wake)
        self._ended = ended
        self._threads = [
            threading.Thread(target=self._run, args=(part,), name=name, daemon=True)
            for part, name in ((self._sender, "udp-tun-to-peers"), (self._receiver, "udp-peers-to-tun"))
        ]

    def start(self) -> None:
        """Begin to move packets.

        The threads share the interpreter with the event loop, and each packet is a system call, after which its
        thread has to get the interpreter back: from a loop that computes, only by the switch interval. A ping
        through two pumps behind a computing loop took 2.7 to 8.7 ms at Python's 5 ms and 1.5 to 3.1 ms at ours
        (means of 200, two rounds on a busy machine). The loop's own lag under a flood did not differ.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        for thread in self._threads:
            thread.start()

    def apply(self, peers: Mapping[Prefix, UdpPeer]) -> None:
        """Take the whole set of peers, our own subnet not among them; each packet sees the old set or the new."""
        table = PeerTable(peers)
        self._sender.table = table
        self._receiver.table = table

    def call_at_stray(self, tell: Callable[[], object], but: Set[str]) -> None:
        """Call once, from one of the threads, when a packet comes by that programs in the kernel should have taken.

        Args:
            tell: what to call.
            but: public addresses of peers whose packets are the pump's anyway.
        """
        for part in (self._sender, self._receiver):
            part.usual = but
            part.stray = tell

    def stats(self) -> dict[str, int]:
        """Counters since start, by the names of ``udp_packet.COUNTERS``."""
        sent, received = self._sender.counts, self._receiver.counts
        return {name: sent[name] + received[name] for name in COUNTERS}

    def stop(self) -> None:
        """End both threads and wait for them; may be called twice, and before ``start``.

        Raises:
            KernelError: one hangs in a system call, so its descriptors must not be closed.
        """
        self._wake.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_TIMEOUT_S)
            if thread.is_alive():
                raise KernelError(f"end the thread {thread.name}", errno.ETIMEDOUT, "the kernel holds its packet")
        self._icmp.close()
        self._wake.close()

    def _run(self, part: _Sender | _Receiver) -> None:
        keep_nothing()  # both descriptors are open
        # a thread's exceptions end nothing but the thread, so this is where they are handed on
        try:
            part.run()
        except OSError as exc:
            remedy = "the TUN device was removed or the socket closed under it"
            self._ended(KernelError(part.task, exc.errno or 0, remedy))
        except BaseException as exc:
            self._ended(exc)


class _Wake:
    """Ends the threads' waiting: readable for good once told to stop."""

    def __init__(self) -> None:
        self.stopped = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def waiter(self, fd: int) -> Callable[[], object]:
        """A function that waits, without a deadline, until there is something to read or the pump is stopped."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._fd, select.POLLIN)
        return poll.poll

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Sender:
    """TUN to peers. What is gathered lies in the buffer from ``_start`` to ``_end``, ready for UDP_SEGMENT."""

    task = "move packets from the TUN to peers"

    def __init__(
        self, tun_fd: int, sock: socket.socket, cfg: PumpConfig, wake: _Wake, icmp: Unreachable, max_segments: int
    ) -> None:
        self.table = PeerTable({})
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.stray: Callable[[], object] | None = None
        self.usual: Set[str] = frozenset()
        # FileIO and not os.readv: an empty queue is None there, and not an exception a packet
        self._read = FileIO(tun_fd, "r+b", closefd=False).readinto
        self._wait = wake.waiter(tun_fd)
        self._sock = sock
        self._cfg = cfg
        self._wake = wake
        self._icmp = icmp
        self._max_segments = max_segments
        self._buffer = bytearray(2 * SLOT)
        self._view = memoryview(self._buffer)
        self._start = self._end = self._segment = self._gathered = 0
        self._target: Target = ("", 0)

    def run(self) -> None:
        """Read, gather and send until stopped."""
        while not self._wake.stopped:
            size = self._read(self._view[self._end : self._end + SLOT])
            if size is None:
                # never wait for company: what is there goes now
                self._flush()
                self._wait()
                continue
            target = self._prepare(self._end, size)
            if target is not None:
                self._gather(target, size)

    def _prepare(self, at: int, size: int) -> Target | None:
        """Make a packet ready to leave; None when it is not to, which is counted."""
        reason = fault(self._buffer, at, size)
        if not reason and size > self._cfg.mtu:
            reason = "drop_oversize"
        if reason:
            self.counts[reason] += 1
            return None
        target = self.table.find(destination(self._buffer, at))
        if target is None:
            self.counts["drop_no_route"] += 1
            self.counts["icmp_sent"] += self._icmp.answer(bytes(self._view[at : at + size]))
        elif not take_hop(self._buffer, at):
            self.counts["drop_ttl"] += 1
            return None
        elif self.stray is not None:
            _tell_stray(self, target[0])
        return target

    def _gather(self, target: Target, size: int) -> None:
        """Add the packet at the end of the buffer to what leaves next.

        UDP_SEGMENT cuts every so many bytes, so all are of one size and a shorter one can only be the last.
        """
        if target is not self._target or size > self._segment or self._end + size - self._start > MAX_PAYLOAD:
            self._flush(keep=size)
            self._target, self._segment = target, size
        self._end += size
        self._gathered += 1
        if size < self._segment or self._gathered >= self._max_segments or self._end > SLOT:
            self._flush()

    def _flush(self, keep: int = 0) -> None:
        """Send what is gathered; what was read behind it, ``keep`` bytes, stays where the next batch begins."""
        if self._gathered:
            batch = self._view[self._start : self._end]
            try:
                if self._gathered == 1:
                    self._sock.sendto(batch, self._target)
                else:
                    cut = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", self._segment))
                    self._sock.sendmsg((batch,), (cut,), 0, self._target)
            except OSError as exc:
                self._send_singly(batch, exc)
            else:
                self.counts["tx_packets"] += self._gathered
                self.counts["tx_bytes"] += len(batch)
        self._start = self._end = self._end if keep else 0
        self._gathered = self._segment = 0

    def _send_singly(self, batch: memoryview, refusal: OSError) -> None:
        """Send again, one datagram a call and in fragments where the path is too narrow, as flannel does.

        The kernel refuses segmentation beyond the path MTU (EMSGSIZE, formerly EINVAL), and where the route
        goes through IPsec or a device without checksum offload (EIO): there for good.
        """
        if refusal.errno in _DEFECTS:
            raise refusal
        if refusal.errno == errno.EIO:
            self._max_segments = 1
        again = refusal.errno in (errno.EMSGSIZE, errno.EINVAL, errno.EIO)
        if again:
            self._sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_WANT)
        for at in range(0, len(batch), self._segment):
            packet = batch[at : at + self._segment]
            try:
                if not again:
                    raise refusal
                self._sock.sendto(packet, self._target)
            except OSError as exc:
                if exc.errno in _DEFECTS:
                    raise
                self.counts["drop_oversize" if exc.errno == errno.EMSGSIZE else "tx_errors"] += 1
            else:
                self.counts["tx_packets"] += 1
                self.counts["tx_bytes"] += len(packet)
        if again and self._max_segments > 1:
            self._sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)


class _Receiver:
    """Peers to TUN."""

    task = "move packets from peers to the TUN"

    def __init__(self, tun_fd: int, sock: socket.socket, cfg: PumpConfig, wake: _Wake) -> None:
        self.table = PeerTable({})
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.stray: Callable[[], object] | None = None
        self.usual: Set[str] = frozenset()
        self._write = FileIO(tun_fd, "r+b", closefd=False).write
        self._wait = wake.waiter(sock.fileno())
        self._sock = sock
        self._cfg = cfg
        self._wake = wake
        self._buffer = bytearray(RECEIVE_ROOM)
        self._view = memoryview(self._buffer)
        self._room = [self._buffer]
        self._control_room = socket.CMSG_SPACE(4)

    def run(self) -> None:
        """Receive, cut and deliver until stopped."""
        while not self._wake.stopped:
            try:
                size, control, _, sender = self._sock.recvmsg_into(self._room, self._control_room, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait()
                continue
            except OSError as exc:
                if exc.errno in _DEFECTS:
                    raise
                self.counts["rx_errors"] += 1  # of an earlier datagram that came back; reading it clears it
                self._wait()
                continue
            segment = struct.unpack("=i", control[0][2])[0] if control else size
            self._scatter(size, segment, sender[0])

    def _scatter(self, size: int, segment: int, sender: str) -> None:
        """Deliver each of the datagrams that came in one call; ``segment`` is the size of all but the last."""
        from_kernel = self.table.sources.get(sender)
        if from_kernel is not None and self.stray is not None:
            _tell_stray(self, sender)
        datagrams = -(-size // segment) if size else 1
        if from_kernel is None and not self._cfg.any_source:
            self.counts["drop_unknown_source"] += datagrams
        elif not size:
            self.counts["drop_malformed"] += 1
        elif segment > self._cfg.mtu:
            self.counts["drop_oversize"] += datagrams
        else:
            for at in range(0, size, segment):
                self._deliver(at, min(segment, size - at), from_kernel or False)

    def _deliver(self, at: int, size: int, from_kernel: bool) -> None:
        """Give one packet to the TUN, or count why not."""
        counts = self.counts
        if reason := fault(self._buffer, at, size):
            counts[reason] += 1
            return
        if not take_hop(self._buffer, at):
            counts["drop_ttl"] += 1
            return
        if from_kernel:
            complete_checksum(self._buffer, at)
        try:
            written = self._write(self._view[at : at + size])
        except OSError as exc:
            # EIO: the device is down, which is the reconcile loop's to mend
            if exc.errno in _DEFECTS:
                raise
            written = None
        if written is None:
            counts["rx_errors"] += 1
            return
        counts["rx_packets"] += 1
        counts["rx_bytes"] += size


def _tell_stray(part: _Sender | _Receiver, peer: str) -> None:
    """Once, until told to do it again: what follows says nothing new, and each call wakes the event loop."""
    if peer not in part.usual and (tell := part.stray):
        part.stray = None
        tell()


def configure(sock: socket.socket, *, gso: bool, gro: bool) -> None:
    """Set the options the pump needs.

    Path MTU discovery stays at the kernel's default without segmentation, as flannel has it: DF, and fragments
    where a router reported a narrower path. A segmented call would lose DF on its datagrams unless asked for it.

    Raises:
        KernelError: no such option in this kernel; ``probe_gso`` says so before.
    """
    sock.setblocking(True)
    with contextlib.suppress(PermissionError):
        # beyond net.core.*mem_max; without CAP_NET_ADMIN there would be no TUN either
        sock.setsockopt(socket.SOL_SOCKET, 33, SOCKET_BUFFER)  # SO_RCVBUFFORCE, asm-generic/socket.h
        sock.setsockopt(socket.SOL_SOCKET, 32, SOCKET_BUFFER)  # SO_SNDBUFFORCE
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT_S, 0))
    try:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO if gso else IP_PMTUDISC_WANT)
        if gso:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, int(gro))
        else:
            with contextlib.suppress(OSError):  # a former pump's, if the kernel has it at all
                sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
    except OSError as exc:
        raise KernelError("set options of the tunnel's socket", exc.errno or 0) from exc


def probe_gso() -> str | None:
    """Why this kernel cannot do UDP_SEGMENT and UDP_GRO; None when it can. Found out by doing both over loopback."""
    sizes = (100, 100, 50)
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there,
        ):
            there.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            there.bind(("127.0.0.1", 0))
            there.settimeout(1.0)
            cut = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", sizes[0]))
            here.sendmsg((bytes(sum(sizes)),), (cut,), 0, there.getsockname())
            taken = 0
            while taken < sum(sizes):
                payload, control, _, _ = there.recvmsg(65536, socket.CMSG_SPACE(4))
                if len(payload) not in sizes and not control:
                    return "UDP_SEGMENT does not cut: this kernel ignores it"
                taken += len(payload)
    except OSError as exc:
        return f"UDP_SEGMENT or UDP_GRO does not work here: {exc.strerror or exc}; it needs Linux 5.0"
    return None
