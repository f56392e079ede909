"""The udp backend's kernel data path in namespaces: golden packets, transfers, adoption, neighbours on the hook."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends import udp_programs as programs
from backends.udp_decap import Decap, decap
from backends.udp_encap import Encap, encap
from backends.udp_fast import FastPath, remove_leftovers
from backends.udp_packet import PeerTable, UdpPeer, destination, fault, take_hop
from backends.udp_programs import TC_ACT_REDIRECT, TC_ACT_SHOT
from backends.udp_tables import Shape, Tables, make_counters, totals
from flanneld.errors import KernelError
from flanneld.kernel import tc
from flanneld.kernel.bpf import Loaded, Map, MapKind, Outcome
from flanneld.kernel.bpfasm import Program, Reg
from flanneld.kernel.nlsocket import Socket
from flanneld.model.addr import Prefix, parse_ip
from tests.support import golden_packets as golden
from tests.support.netns import Netns
from tests.support.udp_hosts import MTU, TUN, Endpoint, Host, pair, peer_of, tcp_digests, udp_digests, wired

pytestmark = [pytest.mark.kernel, pytest.mark.needs("udp_kernel")]

ETHERNET = bytes(12) + b"\x08\x00"
EXPERIMENTAL = bytes(12) + b"\x88\xb5"
"""Newer kernels make no trial run of IPv4 packets shorter than their header; programs do not look at the type."""
EXT_IP = parse_ip("192.0.2.1")
PASS = 0xFFFFFFFF  # TC_ACT_UNSPEC
ELSEWHERE = 4242
"""An interface index that does not exist: trial runs send nothing."""


class Engine:
    """Both programs loaded, with the golden network's peers."""

    def __init__(self, *, trie: bool = False, hash_source_port: bool = False) -> None:
        self.tables = Tables(Shape(None if trie else 24, 16))
        self.counters = make_counters()
        self.tables.apply(golden.PEERS)
        peers, counts = self.tables.peers.fd, self.counters.fd
        direct = Encap(
            peers, counts, EXT_IP, ELSEWHERE, golden.PORT, self.tables.shape.prefix_length,
            hash_source_port=hash_source_port,
        )  # fmt: skip
        receive = Decap(self.tables.sources.fd, counts, EXT_IP, golden.PORT, ELSEWHERE, programs.ETHERNET)
        self.encap = self._load(encap("t_encap", direct))
        self.decap = self._load(decap("t_decap", receive))

    @staticmethod
    def _load(program: Program) -> Loaded:
        return Loaded.load(program.name, program.code())

    def close(self) -> None:
        for held in (self.encap, self.decap, self.tables, self.counters):
            held.close()


@pytest.fixture(scope="module", params=["hash", "trie"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine(trie=request.param == "trie")
    yield made
    made.close()


# ---- golden packets --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden.ENCAP, ids=lambda case: case.name)
def test_golden_packet_leaves_as_the_pump_would_send_it(engine: Engine, case: golden.Golden) -> None:
    before = totals(engine.counters)
    frame = (ETHERNET if len(case.packet) >= 20 else EXPERIMENTAL) + case.packet
    outcome = engine.encap.run(frame)
    counted = {name for name, value in totals(engine.counters).items() if value != before[name]}
    if case.kernel is golden.Kernel.FORWARD:
        assert case.peer
        assert outcome == Outcome(TC_ACT_REDIRECT, ETHERNET + outer(EXT_IP, case.peer, case.result))
        assert counted == {"tx_packets", "tx_bytes"}
    elif case.kernel is golden.Kernel.DROP:
        assert outcome.verdict == TC_ACT_SHOT
        assert counted == {case.counter}
    elif case.kernel is golden.Kernel.PASS:
        # this program stands behind the compat pair, where nobody reads what it leaves; at the TUN it says UNSPEC
        assert outcome == Outcome(TC_ACT_SHOT, frame)


@pytest.mark.parametrize("case", golden.DECAP, ids=lambda case: case.name)
def test_golden_packet_arrives_as_the_pump_would_deliver_it(engine: Engine, case: golden.Golden) -> None:
    wire = ETHERNET + golden.encapsulated(case, EXT_IP)
    before = totals(engine.counters)
    outcome = engine.decap.run(wire)
    counted = {name for name, value in totals(engine.counters).items() if value != before[name]}
    if case.kernel is golden.Kernel.FORWARD:
        assert outcome == Outcome(TC_ACT_REDIRECT, ETHERNET + case.result)
        assert counted == {"rx_packets", "rx_bytes"}
    elif case.kernel is golden.Kernel.DROP:
        assert outcome.verdict == TC_ACT_SHOT
        assert counted == {case.counter}
    elif case.kernel is golden.Kernel.PASS:
        assert outcome == Outcome(PASS, wire)
    else:
        assert outcome.verdict in (PASS, TC_ACT_REDIRECT)


def outer(source: bytes, to: bytes, payload: bytes, port: int = golden.PORT) -> bytes:
    here, there = (".".join(map(str, ip)) for ip in (source, to))
    head = port.to_bytes(2, "big") * 2 + (8 + len(payload)).to_bytes(2, "big") + bytes(2)
    return golden.ipv4(here, there, golden.UDP, head + payload, ident=0)


INNER = golden.ipv4(golden.GO_POD, golden.POD, golden.TCP, golden.tcp(golden.GO_POD, golden.POD))
WIRE = outer(golden.GO_PEER.ip, EXT_IP, INNER)
NOT_OURS = {
    "another port": WIRE[:22] + b"\x20\x5e" + WIRE[24:],
    "another address": outer(golden.GO_PEER.ip, parse_ip("192.0.2.8"), INNER),
    "first fragment": WIRE[:6] + b"\x20\x00" + WIRE[8:],
    "later fragment": WIRE[:6] + b"\x00\x09" + WIRE[8:],
    "tcp": WIRE[:9] + b"\x06" + WIRE[10:],
    "options in the outer header": b"\x46" + WIRE[1:20] + b"\x94\x04\x00\x00" + WIRE[20:],
    "udp length short of the datagram": WIRE[:24] + (len(WIRE) - 21).to_bytes(2, "big") + WIRE[26:],
    "total length short of the frame": WIRE + b"\0\0",
    "too short for an inner header": WIRE[:40],
    "several datagrams in one": outer(golden.GO_PEER.ip, EXT_IP, INNER + INNER),
}


@pytest.mark.parametrize("packet", NOT_OURS.values(), ids=NOT_OURS)
def test_what_is_not_one_whole_datagram_for_us_goes_its_ordinary_way_unchanged(engine: Engine, packet: bytes) -> None:
    assert engine.decap.run(ETHERNET + packet) == Outcome(PASS, ETHERNET + packet)


def test_an_aggregate_of_datagrams_goes_to_be_split_and_is_counted_as_what_it_is(engine: Engine) -> None:
    before = totals(engine.counters)
    frame = ETHERNET + NOT_OURS["several datagrams in one"]
    split = Decap(
        engine.tables.sources.fd, engine.counters.fd, EXT_IP, golden.PORT, ELSEWHERE, 14, split_ifindex=ELSEWHERE
    )
    with contextlib.closing(Loaded.load("t", decap("t", split).code())) as loaded:
        outcome = loaded.run(frame, gso_bytes=len(INNER), gso_segments=2)
    assert outcome == Outcome(TC_ACT_REDIRECT, frame)
    assert totals(engine.counters)["rx_split"] - before["rx_split"] == 2


BYTE, WORD = st.integers(0, 255), st.integers(0, 0xFFFF)
HEADERS = st.fixed_dictionaries(
    {"ttl": BYTE, "ident": WORD, "frag": WORD, "tos": BYTE, "version": st.sampled_from((4, 4, 4, 6)), "checksum": WORD}
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HEADERS, BYTE, st.binary(max_size=300), st.sampled_from((golden.GO_POD, golden.KERNEL_POD, golden.NOWHERE)))
def test_any_packet_is_treated_as_by_the_pump(
    engine: Engine, header: dict[str, int], proto: int, payload: bytes, target: str
) -> None:
    table = PeerTable(golden.PEERS)
    out = bytearray(golden.ipv4(golden.POD, target, proto, payload, **header))  # type: ignore[arg-type]
    peer = table.find(destination(out, 0))
    sent = engine.encap.run(ETHERNET + out)
    if not fault(out, 0, len(out)) and peer and take_hop(out, 0):
        assert sent == Outcome(TC_ACT_REDIRECT, ETHERNET + outer(EXT_IP, parse_ip(peer[0]), bytes(out)))
    else:
        assert sent.verdict == TC_ACT_SHOT

    into = bytearray(golden.ipv4(target, golden.POD, proto, payload, **header))  # type: ignore[arg-type]
    wire = ETHERNET + outer(golden.GO_PEER.ip, EXT_IP, bytes(into))
    came = engine.decap.run(wire)
    if fault(into, 0, len(into)):
        assert came == Outcome(PASS, wire)
    elif take_hop(into, 0):
        assert came == Outcome(TC_ACT_REDIRECT, ETHERNET + into)
    else:
        assert came.verdict == TC_ACT_SHOT


def test_a_hashed_source_port_is_dynamic_and_everything_else_stays() -> None:
    with contextlib.closing(Engine(hash_source_port=True)) as engine:
        case = golden.ENCAP[0]
        assert case.peer
        packet = engine.encap.run(ETHERNET + case.packet).packet
        assert int.from_bytes(packet[34:36], "big") >= 0xC000
        assert packet[:34] + b"\x20\x5d" + packet[36:] == ETHERNET + outer(EXT_IP, case.peer, case.result)


# ---- tables ----------------------------------------------------------------------------------------


def entry(tables: Tables, number: int) -> bytes:
    """Address, port and flags of the peer with the subnet 10.5.<number>.0."""
    return (tables.peers.lookup(bytes((10, 5, number, 0))) or b"")[:8]


def test_tables_follow_the_peers_and_write_only_the_difference() -> None:
    many = {Prefix.parse(f"10.5.{i}.0/24"): UdpPeer(parse_ip(f"192.0.2.{i}"), 8285, False) for i in range(2, 250)}
    with contextlib.closing(Tables(Shape(24, 1024))) as tables:
        assert tables.apply(many) == 2 * len(many)
        assert tables.apply(many) == 0
        moved = {**many, Prefix.parse("10.5.9.0/24"): UdpPeer(parse_ip("203.0.113.9"), 8285, True)}
        assert tables.apply(moved) == 3  # new source, changed peer, old source
        assert set(tables.peers.keys()) == {bytes(subnet.ip) for subnet in moved}
        assert entry(tables, 9) == parse_ip("203.0.113.9") + b"\x20\x5d\0\0"
        tables.apply({})
        assert tables.peers.keys() == tables.sources.keys() == []


def test_two_leases_that_differ_in_host_bits_share_an_entry_until_the_last_is_gone() -> None:
    first, second = ({Prefix.parse(f"10.5.2.{i}/24"): UdpPeer(parse_ip(f"192.0.2.{i}"), 8285, True)} for i in (1, 2))
    with contextlib.closing(Tables(Shape(24, 16))) as tables:
        tables.apply({**first, **second, Prefix.parse("fd00:2::/64"): UdpPeer(EXT_IP, 8285, True)})
        tables.apply(first)
        assert entry(tables, 2) == parse_ip("192.0.2.1") + b"\x20\x5d\0\0"
        tables.apply({})
        assert tables.peers.keys() == []


def test_tables_recover_from_a_write_that_failed_half_way() -> None:
    def peers(numbers: range) -> dict[Prefix, UdpPeer]:
        return {Prefix.parse(f"10.5.{i}.0/24"): UdpPeer(parse_ip(f"192.0.2.{i}"), 8285, True) for i in numbers}

    with contextlib.closing(Tables(Shape(24, 4))) as tables:  # has room for eight
        tables.apply(peers(range(1, 4)))
        with pytest.raises(KernelError, match="more entries"):
            tables.apply(peers(range(2, 40)))
        for wanted in (peers(range(3, 6)), peers(range(4, 6))):
            tables.apply(wanted)
            assert set(tables.peers.keys()) == {bytes(subnet.ip) for subnet in wanted}
            assert set(tables.sources.keys()) == {bytes(peer.ip) for peer in wanted.values()}


@pytest.mark.parametrize("length", [24, 20], ids=["one length", "several"])
def test_whatever_others_do_to_the_tables_is_put_right(length: int) -> None:
    peers = {Prefix.parse(f"10.5.{i}.0/24"): UdpPeer(parse_ip(f"192.0.2.{i}"), 8285, True) for i in range(2, 200)}
    peers[Prefix.parse(f"10.5.208.0/{length}")] = UdpPeer(parse_ip("192.0.2.208"), 8285, False)
    with contextlib.closing(Tables(Shape.of(peers, 24))) as tables:
        tables.apply(peers)
        assert tables.is_filled()
        assert tables.is_filled(), "and so it is when nothing was written since"
        assert tables.mend() == 0
        before = tables.peers.items(), tables.sources.items()
        assert len(before[0]) == len(before[1]) == len(peers)
        first, second, *_ = before[0]
        tables.peers.update({first: before[0][second]})
        tables.peers.delete([second])
        assert not tables.is_filled()
        tables.sources.update({parse_ip("198.51.100.1"): b"\x01\0\0\0"})
        assert tables.mend() == 3
        assert tables.is_filled()
        assert (tables.peers.items(), tables.sources.items()) == before
        tables.peers.delete(before[0])
        assert tables.mend() == len(peers)
        assert (tables.peers.items(), tables.sources.items()) == before
        fewer = dict(list(peers.items())[1:])
        tables.apply(fewer)
        assert tables.is_filled(), "what we wrote ourselves is no damage"


def test_fifteen_thousand_peers_fit_whichever_way_they_are_keyed() -> None:
    many = {
        Prefix.parse(f"10.{i >> 8}.{i & 255}.0/24"): UdpPeer(parse_ip(f"172.16.{i >> 8}.{i & 255}"), 8285, True)
        for i in range(15000)
    }
    for peers in (many, {**many, Prefix.parse("10.200.0.0/20"): UdpPeer(EXT_IP, 8285, True)}):
        with contextlib.closing(Tables(Shape.of(peers, 24))) as tables:
            tables.apply(peers)
            assert len(tables.peers.keys()) == len(peers)
            tables.apply({})
            assert not tables.peers.keys()


def test_the_longest_prefix_wins_in_a_trie() -> None:
    peers = {
        Prefix.parse("10.5.0.0/20"): UdpPeer(parse_ip("192.0.2.20"), 8285, True),
        Prefix.parse("10.5.2.0/24"): UdpPeer(parse_ip("192.0.2.24"), 8285, True),
    }
    shape = Shape.of(peers, 24)
    assert shape.prefix_length is None
    with contextlib.closing(Tables(shape)) as tables, contextlib.closing(make_counters()) as counts:
        tables.apply(peers)
        spec = Encap(tables.peers.fd, counts.fd, EXT_IP, ELSEWHERE, 8285, None)
        with contextlib.closing(Loaded.load("t", encap("t", spec).code())) as loaded:
            for target, peer in (("10.5.2.9", 24), ("10.5.3.9", 20)):
                packet = golden.ipv4(golden.POD, target, golden.UDP, golden.udp(golden.POD, target))
                assert loaded.run(ETHERNET + packet).packet[30:34] == parse_ip(f"192.0.2.{peer}")


TO_POD = ETHERNET + golden.ipv4(golden.POD, "10.5.2.9", golden.UDP, golden.udp(golden.POD, "10.5.2.9"))


@contextlib.contextmanager
def sending(length: int | None) -> Iterator[tuple[Tables, Callable[[], bool]]]:
    """Tables with two peers, and a function that tells whether a program sends a packet to the first of them."""
    with contextlib.closing(Tables(Shape(length, 16))) as tables, contextlib.closing(make_counters()) as counts:
        tables.apply({Prefix.parse(f"10.5.{n}.0/24"): UdpPeer(parse_ip(f"192.0.2.{n}"), 8285, True) for n in (2, 3)})
        spec = Encap(tables.peers.fd, counts.fd, EXT_IP, ELSEWHERE, 8285, length)
        with contextlib.closing(Loaded.load("t", encap("t", spec).code())) as loaded:
            yield tables, lambda: loaded.run(TO_POD).verdict == programs.TC_ACT_REDIRECT


@pytest.mark.parametrize("length", [24, None], ids=["hash", "trie"])
@pytest.mark.parametrize("byte", [0, 3, 4, 6], ids=["address", "its end", "port", "flags"])
def test_a_program_does_not_send_by_an_entry_that_somebody_changed(length: int | None, byte: int) -> None:
    with sending(length) as (tables, sends):
        assert sends()
        [key] = (key for key in tables.peers.items() if key.endswith(bytes((10, 5, 2, 0))))
        value = tables.peers.lookup(key) or b""
        tables.peers.update({key: value[:byte] + bytes((value[byte] ^ 4,)) + value[byte + 1 :]})
        assert not sends()
        assert tables.mend() == 1
        assert sends()


def test_a_program_does_not_send_by_an_entry_copied_from_another_peers() -> None:
    with sending(24) as (tables, sends):
        tables.peers.update({bytes((10, 5, 2, 0)): tables.peers.lookup(bytes((10, 5, 3, 0))) or b""})
        assert not sends()


# ---- traffic ---------------------------------------------------------------------------------------

PATHS = {
    "direct both ways": ((True, True), {}),
    "compat both ways": ((True, True), {"compat_always": True}),
    "hashed source port": ((True, True), {"hash_source_port": True}),
    "kernel sender, reader of a socket": ((True, False), {}),
}


class Ends(NamedTuple):
    """What talks to each other."""

    hosts: tuple[Endpoint, Endpoint]
    pods: tuple[Endpoint, Endpoint]


@pytest.fixture(scope="module", params=PATHS)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    kernel, changes = PATHS[request.param]
    with pair(kernel=kernel, **changes) as (one, two):
        yield Ends((one, two), (one.pod(), two.pod()))


@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("who", Ends._fields)
def test_tcp_and_udp_arrive_bit_by_bit(ends: Ends, who: str, back: bool) -> None:
    one, two = reversed(getattr(ends, who)) if back else getattr(ends, who)
    sent, came = tcp_digests(one, two)
    assert sent == came
    # Before Linux 6.11 a socket makes no super-packets for a device without checksum offload, such as a TUN; pods can.
    for segment in (0, 1200) if who == "pods" else (0,):
        sent_all, came_all = udp_digests(one, two, segment=segment)
        assert sent_all == came_all


@pytest.mark.parametrize("size", [56, 1444, 4000, 30000])
def test_ping_of_any_size_is_answered(ends: Ends, size: int) -> None:
    one, two = ends.pods
    assert " 0% packet loss" in one.ping(two, size=size)


def test_kernel_peers_do_without_the_pump() -> None:
    with pair() as (one, two):
        assert " 0% packet loss" in one.ping(two)
        assert len(set(tcp_digests(one, two))) == 1
        for host in (one, two):
            stats = host.netns.call(host.fast.stats)
            assert stats["tx_packets"] > 0
            assert stats["rx_packets"] > 0
            assert stats["tx_errors"] == stats["tx_left"] == stats["rx_left"] == 0
            assert host.pump
            assert not any(host.pump.stats().values())
        assert one.fast.stats()["tx_packets"] > (8 << 20) // MTU, "super-packets are counted as what they are on a wire"


SINGLY = "tso off gso off tx-udp-segmentation off tx-udp_tnl-segmentation off"
CARDS = {
    "sends every packet singly": (SINGLY, "gro on"),
    "sums nothing": (f"tx off {SINGLY}", "gro on"),
    "merges datagrams of others": (SINGLY, "gro on rx-udp-gro-forwarding on"),
}


@pytest.mark.parametrize("kernel", [(True, True), (False, True)], ids=["from a kernel", "from a pump"])
@pytest.mark.parametrize(("sending", "receiving"), CARDS.values(), ids=CARDS)
def test_it_does_not_matter_what_the_network_card_can(sending: str, receiving: str, kernel: tuple[bool, bool]) -> None:
    with pair(kernel=kernel) as (one, two):
        for host in (one, two):
            host.netns.run("ethtool", "-K", "eth0", *sending.split(), *receiving.split())
        assert len(set(tcp_digests(one, two))) == 1
        sent, came = udp_digests(one, two)
        assert sent == came
        assert two.netns.call(two.fast.stats)["rx_left"] == 0


def test_packets_to_nowhere_are_left_to_the_pump() -> None:
    with pair() as (one, _two):
        one.netns.run("ping", "-c1", "-W1", "10.5.77.1", check=False)
        assert one.netns.call(one.fast.stats)["tx_left"] >= 1
        assert one.pump
        assert one.pump.stats()["drop_no_route"] >= 1


def test_a_peer_that_stops_to_announce_its_kernel_is_served_at_once() -> None:
    with pair() as (one, two):
        assert len(set(tcp_digests(one, two, 1 << 20))) == 1
        two.netns.call(two.fast.stop, False)
        one.netns.call(one.fast.apply, {Prefix.parse("10.5.2.0/24"): peer_of(two, kernel_rx=False)})
        assert len(set(tcp_digests(one, two, 1 << 20))) == 1
        assert one.netns.call(one.fast.stats)["tx_compat"] > 0


# ---- life cycle ------------------------------------------------------------------------------------


def our_filters(host: Host) -> list[str]:
    def read() -> list[str]:
        with contextlib.closing(Socket()) as sock:
            return [
                found.name
                for index, _name in socket.if_nameindex()
                for direction in tc.Direction
                for found in tc.filters(sock, index, direction)
                if found.name.startswith("flanneld-udp-")
            ]

    return sorted(host.netns.call(read))


ALL_FILTERS = [f"flanneld-udp-{TUN}-{role}" for role in ("compat", "decap", "encap", "split")]

OWNER = """
import sys
from tests.support.udp_hosts import *
one, two = Host(1), Host(2)
from backends.udp_fast import FastPath
from flanneld.kernel.tun import set_persist
fd = open_tun(TUN); set_persist(fd, True)
fast = FastPath()
print("open", flush=True); sys.stdin.readline()
fast.start(one.config()); fast.apply({Prefix.parse("10.5.2.0/24"): peer_of(two)})
print("ready", flush=True); sys.stdin.readline()
"""


def test_forwarding_survives_kill_9_and_the_next_daemon_takes_over_without_a_gap() -> None:
    with wired() as (one, two):
        two.start({Prefix.parse("10.5.1.0/24"): peer_of(one)})
        owner = one.netns.spawn(sys.executable, "-c", OWNER)
        assert owner.stdin
        assert owner.stdout
        assert owner.stdout.readline() == "open\n"
        one.dress_tun()
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "ready\n"
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        assert " 0% packet loss" in one.ping(two)
        assert len(set(tcp_digests(one, two, 1 << 20))) == 1

        sent, lost = Echo(one, two), 0
        with sent:
            counted = one.netns.call(lambda: adopt_and_count(one, two))
            lost = sent.finish()
        assert lost == 0
        assert counted > 0, "counts go on where the killed daemon's ended"
        assert our_filters(one) == ALL_FILTERS
        one.netns.call(one.fast.stop, False)
        assert our_filters(one) == []


def adopt_and_count(one: Host, two: Host) -> int:
    one.fast.start(one.config())
    counted = one.fast.stats()["tx_packets"]
    one.fast.apply({Prefix.parse("10.5.2.0/24"): peer_of(two)})
    return counted


class Echo:
    """Requests and responses over the overlay, one at a time, from entering until ``finish``."""

    def __init__(self, one: Host, two: Host) -> None:
        self._asks, self._answers = one.udp(), two.udp()
        self._asks.settimeout(2)
        self._asks.connect(self._answers.getsockname())
        self._end = threading.Event()
        self.rounds = self.lost = 0
        self._threads = [threading.Thread(target=self._answer), threading.Thread(target=self._ask)]

    def __enter__(self) -> Echo:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def finish(self) -> int:
        """How many were lost."""
        self.__exit__()
        assert self.rounds > 100
        return self.lost

    def _ask(self) -> None:
        while not self._end.is_set() or self.rounds < 200:
            try:
                self._asks.send(self.rounds.to_bytes(8, "big"))
                self._asks.recv(8)
            except OSError:
                self.lost += 1
            self.rounds += 1
        self._asks.send(b"end")

    def _answer(self) -> None:
        while (got := self._answers.recvfrom(8))[0] != b"end":
            self._answers.sendto(*got)


def test_swapping_programs_and_tables_under_load_loses_nothing() -> None:
    with pair() as (one, two), Echo(one, two) as echo:
        ours = {Prefix.parse("10.5.2.0/24"): peer_of(two)}
        trie = {**ours, Prefix.parse("10.5.128.0/20"): UdpPeer(parse_ip("192.0.2.77"), 8285, True)}
        for round_ in range(60):
            one.netns.call(one.fast.reattach, one.config(hash_source_port=bool(round_ % 2)))
            one.netns.call(one.fast.apply, trie if round_ % 3 else ours)
        assert echo.finish() == 0


def test_another_external_interface_is_taken_without_leaving_anything_on_the_old_one() -> None:
    with pair() as (one, two):
        for host in (one, two):
            host.netns.run("ip", "link", "set", "eth0", "down")
            host.netns.run("ip", "link", "set", "eth0", "name", "old0")
        one.netns.run("ip", "link", "add", "new0", "type", "veth", "peer", "name", "new0", "netns", two.netns.name)
        for host in (one, two):
            host.netns.run("ip", "addr", "flush", "dev", "old0")
            host.netns.run("ip", "addr", "add", f"192.0.2.{host.number}/24", "dev", "new0")
            host.netns.run("ip", "link", "set", "new0", "up")
            host.netns.call(host.fast.reattach, host.config(ext="new0"))
            assert our_filters(host) == ALL_FILTERS
            assert "decap" not in host.netns.run("tc", "filter", "show", "dev", "old0", "ingress")
        assert " 0% packet loss" in one.ping(two)


def test_a_peer_that_routes_lead_to_through_another_interface_is_the_pumps() -> None:
    with pair() as (one, two):
        one.netns.run("ip", "link", "add", "side0", "type", "veth", "peer", "name", "side0", "netns", two.netns.name)
        for host in (one, two):
            host.netns.run("ip", "link", "set", "side0", "up")
            host.netns.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        one.netns.run("ip", "route", "add", "192.0.2.2/32", "dev", "side0")
        one.netns.call(one.fast.reattach, one.config())
        before = one.netns.call(one.fast.stats)
        assert " 0% packet loss" in one.ping(two)
        after = one.netns.call(one.fast.stats)
        assert after["tx_left"] - before["tx_left"] >= 3
        assert after["tx_packets"] == before["tx_packets"]
        one.netns.run("ip", "route", "del", "192.0.2.2/32", "dev", "side0")
        one.netns.call(one.fast.reattach, one.config())
        assert " 0% packet loss" in one.ping(two)
        assert one.netns.call(one.fast.stats)["tx_packets"] > after["tx_packets"]


def test_a_kept_path_forwards_on_and_a_stopped_one_leaves_nothing_but_the_qdisc() -> None:
    with wired() as (one, two):
        two.start({Prefix.parse("10.5.1.0/24"): peer_of(one)})
        one.make_tun()
        links = one.netns.run("ip", "-br", "link")
        peers = {Prefix.parse("10.5.2.0/24"): peer_of(two)}
        for keep in (True, False):
            fast = FastPath()
            one.netns.call(fast.start, one.config())
            one.netns.call(fast.apply, peers)
            one.netns.call(fast.stop, keep)
            assert our_filters(one) == (ALL_FILTERS if keep else [])
            assert (" 0% packet loss" in one.ping(two, count=1)) is keep
        assert one.netns.run("ip", "-br", "link") == links


def test_a_daemon_on_another_rung_can_remove_what_a_killed_one_left() -> None:
    with wired() as (one, two):
        one.make_tun()
        links = one.netns.run("ip", "-br", "link")
        one.netns.call(one.fast.start, one.config())
        one.netns.call(one.fast.apply, {Prefix.parse("10.5.2.0/24"): peer_of(two)})
        one.netns.call(one.fast.stop, True)
        for _twice in range(2):
            one.netns.call(remove_leftovers, TUN)
            assert our_filters(one) == []
        assert one.netns.run("ip", "-br", "link") == links


def test_other_users_of_the_hook_keep_what_they_have() -> None:
    with wired() as (one, two):
        one.make_tun()
        one.netns.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        u32 = "filter add dev eth0 ingress prio 5 protocol all u32 match u32 0 0 flowid 1:1"
        one.netns.run("tc", *u32.split())
        one.netns.call(attach_foreign)
        before = one.netns.run("tc", "filter", "show", "dev", "eth0", "ingress")
        one.netns.call(one.fast.start, one.config())
        one.netns.call(one.fast.apply, {Prefix.parse("10.5.2.0/24"): peer_of(two)})
        during = one.netns.run("tc", "filter", "show", "dev", "eth0", "ingress")
        assert set(before.splitlines()) < set(during.splitlines())
        one.netns.call(one.fast.stop, False)
        assert one.netns.run("tc", "filter", "show", "dev", "eth0", "ingress") == before
        assert "clsact" in one.netns.run("tc", "qdisc", "show", "dev", "eth0")


def attach_foreign() -> None:
    """Somebody else's eBPF program, of all things at our priority."""
    program = Program("foreign")
    program.set(Reg.R0, programs.TC_ACT_UNSPEC)
    program.exit()
    with contextlib.closing(Loaded.load("foreign", program.code())) as loaded, contextlib.closing(Socket()) as sock:
        tc.attach(sock, socket.if_nametoindex("eth0"), tc.Direction.INGRESS, loaded.fd, "somebody-else")


BREAKAGE = {
    "the qdisc with everybody's filters is removed": "tc qdisc del dev eth0 clsact",
    "the pair is removed": "ip link del flannel0c0",
    "our filter is removed": "tc filter del dev eth0 ingress prio 8285",
}


@pytest.mark.parametrize("command", BREAKAGE.values(), ids=BREAKAGE)
def test_what_somebody_broke_is_noticed_and_repaired(command: str) -> None:
    with pair() as (one, two):
        assert one.netns.call(one.fast.is_intact)
        one.netns.run(*command.split())
        assert not one.netns.call(one.fast.is_intact)
        one.netns.call(one.fast.reattach, one.config())
        assert one.netns.call(one.fast.is_intact)
        one.netns.call(one.fast.apply, {Prefix.parse("10.5.2.0/24"): peer_of(two, kernel_rx=False)})
        assert len(set(tcp_digests(one, two, 1 << 20))) == 1
        assert our_filters(one) == ALL_FILTERS


# ---- probe -----------------------------------------------------------------------------------------


PROBE_AS_AT_WORK = """
import sys
from backends.udp_fast import FastPath
from flanneld.kernel import privileges
from tests.support.udp_hosts import udp_config
privileges.keep_at_work("udp")
sys.exit(FastPath().probe(udp_config(1)))
"""


def test_the_programs_are_accepted_from_a_process_with_the_privileges_of_a_daemon_at_work() -> None:
    """Without CAP_PERFMON some kernels refuse more."""
    with wired() as (one, _two):
        one.make_tun()
        one.netns.run(sys.executable, "-c", PROBE_AS_AT_WORK)


def test_the_probe_leaves_no_trace_and_says_yes_here() -> None:
    with wired() as (one, _two):
        links = one.netns.run("ip", "-br", "link")
        assert one.netns.call(one.fast.probe, one.config()) is None
        assert one.netns.run("ip", "-br", "link") == links
        assert our_filters(one) == []


def test_the_probe_refuses_beside_ipsec_policies_unless_told_not_to_mind() -> None:
    with wired() as (one, _two):
        addresses = ("src", "192.0.2.1", "dst", "192.0.2.2", "dir", "out")
        template = ("tmpl", "src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "mode", "transport")
        one.netns.run("ip", "xfrm", "policy", "add", *addresses, *template)
        assert "IPsec policies" in str(one.netns.call(one.fast.probe, one.config()))
        assert one.netns.call(one.fast.probe, one.config(ignore_xfrm=True)) is None


def test_the_probe_names_a_missing_interface() -> None:
    with Netns("udpfast") as space:
        assert "find device eth0" in str(space.call(FastPath().probe, Host(1).config()))


def test_the_probe_names_the_missing_capability() -> None:
    code = (
        "from tests.support.udp_hosts import *\n"
        "from backends.udp_fast import FastPath\n"
        "print(FastPath().probe(Host(1).config(ext='lo')))\n"
    )
    with Netns("udpfast") as space:
        bounding = ("setpriv", "--bounding-set", "-bpf,-sys_admin,-perfmon", "--inh-caps", "-bpf,-sys_admin,-perfmon")
        said = space.run(*bounding, sys.executable, "-c", code)
    assert "Operation not permitted" in said
    assert "CAP_BPF" in said


def test_the_verifier_is_quoted_when_it_refuses() -> None:
    program = Program("bad")
    program.exit()  # R0 is not set
    with pytest.raises(KernelError, match="R0 !read_ok"):
        Loaded.load("bad", program.code())


def test_a_map_that_is_full_says_so() -> None:
    tiny = Map.create(MapKind.HASH, 4, 4, 2, "tiny")
    with contextlib.closing(tiny), pytest.raises(KernelError, match="more entries"):
        tiny.update({bytes((n, 0, 0, 0)): bytes(4) for n in range(5)})
