"""The user-space data path of the udp backend, on real devices and real sockets.

::

    pod a 10.5.1.9 ── 10.5.1.1 host a 192.0.2.1 ──── 192.0.2.2 host b 10.5.2.1 ── 10.5.2.9 pod b
                               flannel0 10.5.1.0      flannel0 10.5.2.0
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

import pytest

from backends.udp_icmp import ICMP_PER_SECOND
from backends.udp_packet import UdpPeer
from backends.udp_pump import UDP_GRO, UDP_SEGMENT, Pump, probe_gso
from flanneld.errors import KernelError
from flanneld.model.addr import IP, Prefix, parse_ip
from tests.support.golden_packets import (
    CONFIG,
    DECAP,
    ENCAP,
    GO_PEER,
    GO_POD,
    KERNEL_PEER,
    KERNEL_POD,
    MTU,
    PEERS,
    POD,
    PORT,
    STRANGER,
    TCP,
    UDP,
    Does,
    ipv4,
    ones_sum,
    pseudo,
    tcp,
    udp,
)
from tests.support.netns import Netns
from tests.support.udp_bed import Engine, Host, readable, receive, two_hosts, udp_socket
from tests.support.wait import until

pytestmark = pytest.mark.kernel

FORWARD_AND_REFUSE = """
import time
from contextlib import ExitStack
from socket import AF_INET, AF_UNIX, SOCK_RAW, SOCK_SEQPACKET, socket, socketpair
from backends.udp_pump import Pump
from tests.support.golden_packets import *
from tests.support.udp_bed import udp_socket

try:
    socket(AF_INET, SOCK_RAW, 255)
    raise SystemExit("the capability was to be missing")
except PermissionError:
    pass
near, far = socketpair(AF_UNIX, SOCK_SEQPACKET)
far.setblocking(False)
sock = udp_socket("127.0.0.1")
pump = Pump(far.fileno(), sock, CONFIG, gso=True, ended=print)
pump.apply({Prefix.parse("10.5.2.0/24"): UdpPeer(parse_ip("127.0.0.1"), sock.getsockname()[1], False)})
pump.start()
near.send(ipv4(POD, NOWHERE, UDP, b""))
near.send(ipv4(POD, GO_POD, UDP, b""))
print(near.recv(100) == ipv4(POD, GO_POD, UDP, b"", ttl=62), end=" ")
pump.stop()
print({name: n for name, n in pump.stats().items() if name.startswith("drop") and n or name == "icmp_sent" and n})
"""
"""Both in one: a packet to ourselves comes back two hops later, and one to nowhere is dropped."""

MIXES = {"gso": (True, True), "basic": (False, False), "gso and basic": (True, False)}
PATHS = {"gso": True, "basic": False}

FLOOD = """
import socket, sys
to, payload, here, port = sys.argv[1:]
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((here, int(port)))
datagram = bytes.fromhex(payload)
while True:
    try:
        sock.sendto(datagram, (to, 8285))
    except OSError:
        pass
"""


@pytest.fixture(scope="module", params=list(MIXES.values()), ids=list(MIXES))
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Both pumps at work; at the end no thread has died."""
    with two_hosts() as (a, b):
        for host, other, gso in zip((a, b), (b, a), request.param, strict=True):
            host.start(other, gso=gso)
        yield a, b
        assert a.ended == b.ended == []


@pytest.fixture(params=list(PATHS.values()), ids=list(PATHS))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with ExitStack() as stack:
        made = Engine(stack, gso=request.param)
        yield made
        assert made.ended == []


def tcp_listener(ip: str) -> socket.socket:
    return socket.create_server((ip, 0))


def connect(there: tuple[str, int]) -> int:
    """Connect, giving up after 10 s; the errno.

    Without Python's own timeout, which waits in poll(2): about once in a thousand times that wakes up before the
    error of an ICMP that came within microseconds is there to be read, and takes the connection for made.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 10, 0))
        return sock.connect_ex(there)


def send_tcp(source: Host, sink: Host, size: int) -> tuple[str, str]:
    """Send from pod to pod in writes of odd sizes; the hashes of what left and what came."""
    draw = random.Random(size)
    sent = hashlib.sha256()

    def write(there: tuple[str, int]) -> None:
        with closing(source.pod.call(socket.create_connection, there, 10.0)) as sock:
            left = size
            while left:
                piece = draw.randbytes(min(left, draw.choice((1, 7, 1431, 1432, 1433, 4000, 60000))))
                sent.update(piece)
                sock.sendall(piece)
                left -= len(piece)

    came = hashlib.sha256()
    with sink.pod.call(tcp_listener, sink.pod_ip) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(20.0)
        writing = pool.submit(write, listener.getsockname())
        with closing(listener.accept()[0]) as sock:
            sock.settimeout(20.0)
            while piece := sock.recv(1 << 16):
                came.update(piece)
        writing.result()
    return sent.hexdigest(), came.hexdigest()


def send_udp(source: Host, sink: Host, sizes: list[int]) -> tuple[list[str], list[str]]:
    """Datagrams from pod to pod, one after the other; those above the MTU go in inner fragments."""
    draw = random.Random(7)
    sent, came = [], []
    with source.pod.call(udp_socket, source.pod_ip) as here, sink.pod.call(udp_socket, sink.pod_ip) as there:
        for size in sizes:
            datagram = draw.randbytes(size)
            sent.append(hashlib.sha256(datagram).hexdigest())
            here.sendto(datagram, there.getsockname())
            came.append(hashlib.sha256(receive(there)).hexdigest())
    return sent, came


def wait_for(condition: Callable[[], object], what: str) -> None:
    asyncio.run(until(condition, what=what))


def counted(engine: Engine, before: dict[str, int], **changes: int) -> bool:
    """Whether exactly these counters have risen by exactly so much."""
    return engine.changed(before) == changes


class TestHosts:
    def test_pods_and_hosts_ping_each_other(self, hosts: tuple[Host, Host]) -> None:
        a, b = hosts
        for ns, address in ((a.pod, b.pod_ip), (b.pod, a.pod_ip), (a.ns, b.tun_ip), (a.pod, b.tun_ip)):
            assert " 0% packet loss" in ns.run("ping", "-c", "2", "-i", "0.05", "-W", "5", address)

    @pytest.mark.parametrize("there", [True, False], ids=["there", "back"])
    def test_tcp_arrives_whole(self, hosts: tuple[Host, Host], there: bool) -> None:
        sent, came = send_tcp(*(hosts if there else hosts[::-1]), 4 << 20)
        assert sent == came

    @pytest.mark.parametrize("there", [True, False], ids=["there", "back"])
    def test_udp_arrives_whole(self, hosts: tuple[Host, Host], there: bool) -> None:
        sizes = [0, 1, 1443, 1444, 1445, 4000, 20000] * 3
        sent, came = send_udp(*(hosts if there else hosts[::-1]), sizes)
        assert sent == came

    def test_each_side_takes_one_hop(self, hosts: tuple[Host, Host]) -> None:
        """Contract 6.52; the hosts that forward to pods take one each as well."""
        a, b = hosts
        assert "ttl=62" in a.ns.run("ping", "-c", "1", "-W", "5", b.tun_ip)
        before = b.count("rx_packets"), a.count("drop_ttl")
        a.ns.run("ping", "-c", "1", "-W", "0.2", "-t", "1", b.tun_ip, check=False)
        assert (b.count("rx_packets"), a.count("drop_ttl")) == (before[0], before[1] + 1)

    def test_what_leaves_is_plain_and_must_not_be_fragmented(self, hosts: tuple[Host, Host]) -> None:
        """Contract 6.49, 6.50: our port to their port, the bare packet, DF."""
        a, b = hosts
        with b.ns.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as wire:
            send_tcp(a, b, 1 << 18)
            count = 0
            while readable(wire):
                outer = wire.recv(70000)
                assert outer[6:8] == b"\x40\x00"
                assert struct.unpack("!HH", outer[20:24]) == (PORT, PORT)
                assert outer[28] == 0x45
                count += 1
            assert count > 5

    def test_pod_learns_at_once_that_nobody_holds_the_destination(self, hosts: tuple[Host, Host]) -> None:
        """Contract 6.53, and the answer reaches the container: Go flanneld's is dropped as a martian."""
        a, _ = hosts
        before = a.count("icmp_sent")
        for ns in (a.pod, a.ns):
            assert ns.call(connect, ("10.5.99.9", 80)) == errno.ENETUNREACH
        wait_for(lambda: a.count("icmp_sent") >= before + 2, "counted")

    def test_narrow_path_gets_fragments_instead_of_silence(self, hosts: tuple[Host, Host]) -> None:
        a, b = hosts
        a.ns.run("ip", "route", "add", f"{b.ip}/32", "dev", "eth0", "mtu", "1000")
        try:
            sent, came = send_tcp(a, b, 1 << 18)
            assert sent == came
            assert a.count("drop_oversize") == 0
        finally:
            a.ns.run("ip", "route", "del", f"{b.ip}/32", "dev", "eth0", "mtu", "1000")

    def test_device_that_is_down_costs_its_packets_and_nothing_else(self, hosts: tuple[Host, Host]) -> None:
        a, b = hosts
        before = b.count("rx_errors")
        b.ns.run("ip", "link", "set", "flannel0", "down")
        a.ns.run("ping", "-c", "1", "-W", "0.2", b.tun_ip, check=False)
        b.ns.run("ip", "link", "set", "flannel0", "up")
        b.ns.run("ip", "route", "replace", "10.5.0.0/16", "dev", "flannel0")
        assert b.count("rx_errors") == before + 1
        assert " 0% packet loss" in a.ns.run("ping", "-c", "1", "-W", "5", b.tun_ip)


class TestGolden:
    def test_packets_from_the_tun(self, engine: Engine) -> None:
        """The whole table through threads and sockets: bytes, addressee, counter, answer."""
        for golden in ENCAP:
            before = engine.pump.stats()
            engine.tun.send(golden.packet)
            expected = {golden.counter: 1}
            if golden.does is Does.FORWARD:
                assert golden.peer is not None
                assert receive(engine.peers[golden.peer]) == golden.result, golden.name
            elif golden.does is Does.REPLY:
                expected["icmp_sent"] = 1
                reply = receive(engine.icmp)
                # the kernel chooses the id, and so the checksum, of what leaves by a raw socket
                assert reply[:4] + reply[6:10] + reply[12:] == (
                    golden.result[:4] + golden.result[6:10] + golden.result[12:]
                ), golden.name
            wait_for(partial(counted, engine, before, **expected), golden.name)
        assert not any(readable(sock) for sock in (engine.tun, engine.icmp, *engine.peers.values()))

    def test_datagrams_from_peers(self, engine: Engine) -> None:
        for golden in DECAP:
            assert golden.peer is not None
            before = engine.pump.stats()
            engine.peers[golden.peer].sendto(golden.packet, engine.here)
            if golden.does is Does.FORWARD:
                assert receive(engine.tun) == golden.result, golden.name
            wait_for(partial(counted, engine, before, **{golden.counter: 1}), golden.name)
        assert not any(readable(sock) for sock in (engine.tun, *engine.peers.values()))


class TestOrder:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("gso", PATHS.values(), ids=PATHS)
    def test_every_peer_gets_its_packets_whole_and_in_order(self, gso: bool, seed: int) -> None:
        """Runs of equal size, shorter, longer, other peers, drops in between: what gathering can get wrong.

        All lie in the TUN's queue before the pump starts, so that what can be gathered is.
        """
        draw = random.Random(seed)
        wanted: dict[IP, list[bytes]] = {GO_PEER.ip: [], KERNEL_PEER.ip: []}
        with ExitStack() as stack:
            engine = Engine(stack, gso=gso, start=False)
            left = 80  # more might not fit into a socket's queue
            while left > 0:
                peer, there = draw.choice([(GO_PEER.ip, GO_POD), (KERNEL_PEER.ip, KERNEL_POD)])
                for size in draw.choice([[1, 1, 1], [100, 100, 99, 100], [100, 101], [0], [1399] * 4, [MTU - 56, 5]]):
                    payload = udp(POD, there, draw.randbytes(size))
                    engine.tun.send(ipv4(POD, there, UDP, payload))
                    wanted[peer].append(ipv4(POD, there, UDP, payload, ttl=63))
                    left -= 1
                if draw.random() < 0.3:
                    engine.tun.send(ipv4(POD, there, UDP, b"", ttl=1))
            engine.pump.start()
            for peer, packets in wanted.items():
                assert [receive(engine.peers[peer]) for _ in packets] == packets
                assert not readable(engine.peers[peer])

    def test_long_runs_of_full_packets_pass(self, engine: Engine) -> None:
        """More than one call or one buffer holds, over and over."""
        draw = random.Random(6)
        for _ in range(8):
            payloads = [udp(POD, GO_POD, draw.randbytes(MTU - 28)) for _ in range(60)]
            for payload in payloads:
                engine.tun.send(ipv4(POD, GO_POD, UDP, payload))
            for payload in payloads:
                assert receive(engine.peers[GO_PEER.ip]) == ipv4(POD, GO_POD, UDP, payload, ttl=63)

    def test_segmented_datagrams_come_apart_again(self, engine: Engine) -> None:
        draw = random.Random(4)
        for count, size in ((1, 200), (2, 1000), (44, MTU), (63, 40)):
            packets = [(GO_POD, POD, UDP, udp(GO_POD, POD, draw.randbytes(size - 28))) for _ in range(count)]
            packets.append((GO_POD, POD, UDP, b"short end"))
            before = engine.pump.stats()
            cut = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))
            engine.peers[GO_PEER.ip].sendmsg([ipv4(*packet) for packet in packets], [cut], 0, engine.here)
            for packet in packets:
                assert receive(engine.tun) == ipv4(*packet, ttl=63)
            wait_for(partial(counted, engine, before, rx_packets=count + 1), "counted")

    def test_run_of_equal_packets_to_one_peer_leaves_in_one_call(self) -> None:
        with ExitStack() as stack:
            engine = Engine(stack, gso=True, start=False)
            packets = [ipv4(POD, GO_POD, UDP, bytes([n]) * size) for n, size in enumerate([500] * 9 + [100])]
            for packet in packets:
                engine.tun.send(packet)
            peer = engine.peers[GO_PEER.ip]
            peer.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            engine.pump.start()
            assert readable(peer, 5.0)
            whole, control, _, _ = peer.recvmsg(70000, socket.CMSG_SPACE(4))
            assert len(whole) == sum(map(len, packets))
            assert struct.unpack("=i", control[0][2]) == (520,)

    @pytest.mark.parametrize("gro", [True, False])
    def test_a_pump_beside_the_kernels_programs_has_nothing_merged_in_front_of_them(self, gro: bool) -> None:
        """Merged datagrams would pass the programs by."""
        with ExitStack() as stack:
            engine = Engine(stack, gso=True, gro=gro)
            assert engine.sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == gro
            engine.peers[GO_PEER.ip].sendto(ipv4(GO_POD, POD, UDP, b""), engine.here)
            assert receive(engine.tun) == ipv4(GO_POD, POD, UDP, b"", ttl=63)


class TestPeers:
    def test_new_peers_count_from_the_next_packet_on(self, engine: Engine) -> None:
        packet, later = (ipv4(POD, GO_POD, UDP, b"", ttl=ttl) for ttl in (64, 63))
        before = engine.pump.stats()
        engine.tun.send(packet)
        assert receive(engine.peers[GO_PEER.ip]) == later
        engine.pump.apply({subnet: UdpPeer(STRANGER, PORT, kernel_rx=False) for subnet in PEERS})
        engine.tun.send(packet)
        assert receive(engine.peers[STRANGER]) == later
        engine.peers[STRANGER].sendto(packet, engine.here)
        assert receive(engine.tun) == later
        engine.pump.apply({})
        engine.peers[GO_PEER.ip].sendto(packet, engine.here)
        engine.tun.send(packet)
        expected = {"tx_packets": 2, "rx_packets": 1, "drop_unknown_source": 1, "drop_no_route": 1, "icmp_sent": 1}
        wait_for(partial(counted, engine, before, **expected), "two sent, one received, one dropped, one answered")

    def test_option_takes_datagrams_from_anybody(self) -> None:
        """Go flanneld's openness, contract 6.50."""
        with ExitStack() as stack:
            engine = Engine(stack, gso=True, cfg=CONFIG._replace(any_source=True))
            engine.peers[STRANGER].sendto(ipv4(GO_POD, POD, UDP, b""), engine.here)
            assert receive(engine.tun) == ipv4(GO_POD, POD, UDP, b"", ttl=63)

    @pytest.mark.parametrize(("proto", "make", "head"), [(TCP, tcp, 20), (UDP, udp, 8)], ids=["tcp", "udp"])
    def test_checksum_left_to_hardware_is_finished_for_kernel_peers_only(
        self, engine: Engine, proto: int, make: Callable[..., bytes], head: int
    ) -> None:
        bare = ones_sum(pseudo(KERNEL_POD, POD, proto, head + 5))
        unfinished, left = (
            ipv4(KERNEL_POD, POD, proto, make(KERNEL_POD, POD, checksum=bare), ttl=ttl) for ttl in (64, 63)
        )
        engine.peers[KERNEL_PEER.ip].sendto(unfinished, engine.here)
        assert receive(engine.tun) == ipv4(KERNEL_POD, POD, proto, make(KERNEL_POD, POD), ttl=63)
        engine.peers[GO_PEER.ip].sendto(unfinished, engine.here)
        assert receive(engine.tun) == left


class TestHostility:
    def test_garbage_is_counted_and_forwarding_goes_on(self, engine: Engine) -> None:
        draw = random.Random(5)
        before = engine.pump.stats()
        sources = [(GO_PEER.ip, 400), (STRANGER, 200)]
        for ip, count in sources:
            for _ in range(count):
                # never version 4, so that none is a packet by chance
                engine.peers[ip].sendto(b"\xf0" + draw.randbytes(draw.randrange(1, 2000)), engine.here)
            engine.peers[ip].sendto(b"", engine.here)

        def rejected() -> bool:
            changed = engine.changed(before)
            known = sum(changed.get(name, 0) for name in ("drop_malformed", "drop_not_ipv4", "drop_oversize"))
            return (known, changed.get("drop_unknown_source")) == (401, 201)

        wait_for(rejected, "every datagram counted once")
        engine.peers[GO_PEER.ip].sendto(ipv4(GO_POD, POD, UDP, b""), engine.here)
        assert receive(engine.tun) == ipv4(GO_POD, POD, UDP, b"", ttl=63)

    def test_peer_that_cannot_be_reached_costs_its_packets_only(self, engine: Engine) -> None:
        """No route to its address, as when the underlay is broken: the sender's other peers go on."""
        before = engine.pump.stats()
        lost = UdpPeer(parse_ip("203.0.113.9"), PORT, kernel_rx=False)
        engine.pump.apply({**PEERS, Prefix.parse("10.5.77.0/24"): lost})
        for _ in range(5):
            engine.tun.send(ipv4(POD, "10.5.77.1", UDP, b""))
        engine.tun.send(ipv4(POD, GO_POD, UDP, b""))
        assert receive(engine.peers[GO_PEER.ip]) == ipv4(POD, GO_POD, UDP, b"", ttl=63)
        wait_for(partial(counted, engine, before, tx_errors=5, tx_packets=1), "five lost, one sent")

    def test_scan_of_unleased_space_is_answered_at_a_limited_rate(self, engine: Engine) -> None:
        """RFC 1812 section 4.3.2.8."""
        before = engine.pump.stats()
        for n in range(5000):
            engine.tun.send(ipv4(POD, f"10.5.{100 + n % 100}.{n % 256}", UDP, b""))
        wait_for(lambda: engine.changed(before).get("drop_no_route") == 5000, "all seen")
        seconds = 1 + 5  # the limit is by the clock's second, and the machine may be slow
        assert 1000 <= engine.pump.stats()["icmp_sent"] <= ICMP_PER_SECOND * seconds

    def test_flood_leaves_the_event_loop_in_time(self) -> None:
        """Small packets both ways as fast as another process can send: renewals and /healthz must not wait."""
        with two_hosts() as (a, b):
            pump = a.start(b, gso=True)
            inner = ipv4("10.5.2.9", a.tun_ip, UDP, udp("10.5.2.9", a.tun_ip)).hex()
            b.ns.spawn(sys.executable, "-c", FLOOD, a.ip, inner, b.ip, "8286")
            a.ns.spawn(sys.executable, "-c", FLOOD, "10.5.2.9", "00", a.tun_ip, "8287")
            lags = asyncio.run(heartbeat(pump))
            stopping = time.monotonic()
            pump.stop()
            assert time.monotonic() - stopping < 1.0
            assert a.ended == []
        lags.sort()
        assert len(lags) >= 100
        # the machine's own hiccups may spoil single beats; a starved loop is late at every one
        assert lags[int(len(lags) * 0.9)] < 0.1, f"90 % of beats within {lags[int(len(lags) * 0.9)]:.3f} s"


async def heartbeat(pump: Pump) -> list[float]:
    """By how many seconds each of 150 beats was late, counted once the flood is there in both directions."""
    await until(lambda: min(pump.stats()[name] for name in ("tx_packets", "rx_packets")) > 1000, what="a flood")
    before = pump.stats()
    lags = []
    for _ in range(150):
        due = time.monotonic() + 0.01
        await asyncio.sleep(0.01)
        lags.append(time.monotonic() - due)
    for name in ("tx_packets", "rx_packets"):
        assert pump.stats()[name] - before[name] > 1000, "the flood dried up"
    return lags


class TestLife:
    def test_stop_is_prompt_and_another_pump_takes_over(self) -> None:
        """As on a change of data path: the same TUN and socket."""
        with two_hosts() as (a, b):
            b.start(a, gso=True)
            for gso in (True, False, True):
                pump = a.start(b, gso=gso)
                assert " 0% packet loss" in a.pod.run("ping", "-c", "1", "-W", "5", b.pod_ip)
                begun = time.monotonic()
                pump.stop()
                assert time.monotonic() - begun < 0.5
                pump.stop()
            assert a.ended == b.ended == []

    def test_vanished_tun_is_told(self) -> None:
        """The daemon must not go on as if it forwarded."""
        with two_hosts() as (a, b):
            a.start(b, gso=True)
            a.ns.run("ip", "link", "del", "flannel0")
            wait_for(lambda: a.ended, "told")
            assert isinstance(a.ended[0], KernelError)
            assert "TUN" in str(a.ended[0])

    def test_defect_in_a_thread_is_told(self) -> None:
        """Whatever it is: nothing may end a thread in silence."""
        with ExitStack() as stack:
            engine = Engine(stack, gso=True, cfg=CONFIG._replace(mtu=None))  # type: ignore[arg-type]
            engine.tun.send(ipv4(POD, GO_POD, UDP, b""))
            engine.peers[GO_PEER.ip].sendto(ipv4(GO_POD, POD, UDP, b""), engine.here)
            wait_for(lambda: len(engine.ended) == 2, "told by both threads")
            assert {type(error) for error in engine.ended} == {TypeError}

    def test_pump_that_never_started_stops(self) -> None:
        with ExitStack() as stack, two_hosts() as (a, _):
            pump = a.ns.call(Pump, a.tun_fd, a.sock, CONFIG, gso=False, ended=a.ended.append)
            stack.callback(pump.stop)

    def test_missing_cap_net_raw_costs_the_answers_only(self) -> None:
        """A container may have been given NET_ADMIN alone."""
        with Netns("udpp-c") as ns:
            without = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw")
            assert ns.run(*without, sys.executable, "-c", FORWARD_AND_REFUSE) == "True {'drop_no_route': 1}\n"

    def test_segmentation_is_found_by_doing_it(self) -> None:
        with Netns("udpp-n") as ns:
            assert ns.call(probe_gso) is None
            ns.run("ip", "link", "set", "lo", "down")
            assert "does not work here" in str(ns.call(probe_gso))
