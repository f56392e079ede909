"""The udp backend's arithmetic on packets: golden packets, and properties against sums made anew."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.udp_packet import (
    COUNTERS,
    PeerTable,
    UdpPeer,
    complete_checksum,
    destination,
    fault,
    net_unreachable,
    take_hop,
)
from flanneld.model.addr import IP, Family, Prefix, format_ip, parse_ip
from tests.support.golden_packets import (
    CONFIG,
    DECAP,
    DF,
    ENCAP,
    GO_POD,
    ICMP,
    MF,
    PEERS,
    POD,
    SCTP,
    TCP,
    TUN_IP,
    UDP,
    Does,
    Golden,
    echo_request,
    ipv4,
    ones_sum,
    pseudo,
    tcp,
    udp,
)

AT = 7
"""Packets stand in the middle of a buffer, so an offset forgotten somewhere shows."""


def placed(packet: bytes) -> bytearray:
    return bytearray(AT * b"\xee" + packet + 64 * b"\xee")


def taken(buffer: bytearray, size: int) -> bytes:
    assert buffer[:AT] == AT * b"\xee"
    assert buffer[AT + size :] == 64 * b"\xee"
    return bytes(buffer[AT : AT + size])


def encap(packet: bytes) -> tuple[str, bytes, str | None]:
    """The order of the sending side: fit, known destination, TTL. Returns counter, packet, address."""
    buffer = placed(packet)
    if reason := fault(buffer, AT, len(packet)):
        return reason, b"", None
    target = PeerTable(PEERS).find(destination(buffer, AT))
    if target is None:
        return "drop_no_route", net_unreachable(packet, TUN_IP) or b"", None
    if not take_hop(buffer, AT):
        return "drop_ttl", b"", None
    return "tx_packets", taken(buffer, len(packet)), target[0]


def decap(packet: bytes, source: IP) -> tuple[str, bytes]:
    """The order of the receiving side: known source, size, fit, TTL. Returns counter and packet."""
    buffer = placed(packet)
    if format_ip(source) not in PeerTable(PEERS).sources:
        return "drop_unknown_source", b""
    if len(packet) > CONFIG.mtu:
        return "drop_oversize", b""
    if reason := fault(buffer, AT, len(packet)):
        return reason, b""
    if not take_hop(buffer, AT):
        return "drop_ttl", b""
    return "rx_packets", taken(buffer, len(packet))


class TestGolden:
    @pytest.mark.parametrize("golden", ENCAP, ids=lambda g: g.name)
    def test_packet_from_the_tun_becomes_what_the_table_says(self, golden: Golden) -> None:
        counter, result, there = encap(golden.packet)
        assert (counter, result) == (golden.counter, golden.result)
        if golden.does is Does.FORWARD:
            assert golden.peer is not None
            assert there == format_ip(golden.peer)

    @pytest.mark.parametrize("golden", DECAP, ids=lambda g: g.name)
    def test_packet_from_a_peer_becomes_what_the_table_says(self, golden: Golden) -> None:
        assert golden.peer is not None
        assert decap(golden.packet, golden.peer) == (golden.counter, golden.result)

    def test_table_counts_by_names_that_exist(self) -> None:
        assert {golden.counter for golden in ENCAP + DECAP} <= set(COUNTERS)


options = st.integers(0, 10).flatmap(lambda words: st.binary(min_size=words * 4, max_size=words * 4))
headers = st.builds(
    lambda ttl, proto, ident, tos, opts, payload: ipv4(
        POD, GO_POD, proto, payload, ttl=ttl, ident=ident, tos=tos, options=opts
    ),
    st.integers(2, 255),
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.integers(0, 255),
    options,
    st.binary(max_size=64),
)


class TestHop:
    @given(headers)
    def test_adjusted_checksum_equals_one_summed_anew(self, packet: bytes) -> None:
        """Contract 6.52, RFC 1624."""
        buffer = placed(packet)
        assert take_hop(buffer, AT)
        after = taken(buffer, len(packet))
        header = after[: (after[0] & 15) * 4]
        assert after[8] == packet[8] - 1
        assert int.from_bytes(after[10:12], "big") == ones_sum(header[:10] + bytes(2) + header[12:]) ^ 0xFFFF
        assert after[:8] + after[9:10] + after[12:] == packet[:8] + packet[9:10] + packet[12:]

    def test_every_checksum_there_can_be(self) -> None:
        """All 65535 right checksums (ffff is none), by the kernel's own test: the header sums to ffff."""
        buffer = bytearray(ipv4(POD, GO_POD, UDP, b""))
        rest = ones_sum(ipv4(POD, GO_POD, UDP, b"", ident=0, checksum=0))
        for checksum in range(0xFFFF):
            ident = (0xFFFF - checksum - rest) % 0xFFFF
            buffer[4:6], buffer[8], buffer[10:12] = ident.to_bytes(2, "big"), 64, checksum.to_bytes(2, "big")
            assert take_hop(buffer, 0)
            assert ones_sum(bytes(buffer)) == 0xFFFF
            assert buffer[10:12] != b"\xff\xff"

    @given(st.integers(0, 0xFFFF), st.integers(2, 255))
    def test_damage_to_the_header_is_never_repaired(self, flipped: int, ttl: int) -> None:
        right = ipv4(POD, GO_POD, TCP, b"", ttl=ttl)
        buffer = bytearray(right)
        buffer[10:12] = (int.from_bytes(right[10:12], "big") ^ flipped).to_bytes(2, "big")
        was_right = ones_sum(bytes(buffer)) == 0xFFFF
        assert take_hop(buffer, 0)
        assert (ones_sum(bytes(buffer)) == 0xFFFF) == was_right


class TestGarbage:
    @given(st.binary(max_size=80))
    def test_no_bytes_raise_and_none_beyond_the_packet_change(self, packet: bytes) -> None:
        """Short, wrong version, wrong lengths: counted, never fatal."""
        buffer = placed(packet)
        if reason := fault(buffer, AT, len(packet)):
            assert reason in COUNTERS
            assert buffer == placed(packet)
            return
        take_hop(buffer, AT)
        complete_checksum(buffer, AT)
        net_unreachable(packet, TUN_IP)
        assert len(taken(buffer, len(packet))) == len(packet)

    @given(headers, st.binary(max_size=6))
    def test_fit_packet_with_something_behind_it_stays_fit(self, packet: bytes, more: bytes) -> None:
        """The IP stack trims by total length, as it does with Ethernet's padding."""
        assert fault(placed(packet + more), AT, len(packet + more)) == ""

    @given(headers, st.data())
    def test_truncated_packet_is_malformed(self, packet: bytes, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, len(packet) - 1))
        assert fault(placed(packet), AT, size) == "drop_malformed"


class TestPartialChecksum:
    """The trap of unfinished checksums, met while a peer still believes us to receive in the kernel."""

    @given(st.binary(max_size=200), st.integers(0, 2))
    def test_unfinished_tcp_and_udp_checksums_are_finished(self, data: bytes, words: int) -> None:
        for proto, make, head in ((TCP, tcp, 20), (UDP, udp, 8)):
            bare = ones_sum(pseudo(POD, GO_POD, proto, head + len(data)))
            opts = b"\x01" * 4 * words
            buffer = placed(ipv4(POD, GO_POD, proto, make(POD, GO_POD, data, checksum=bare), options=opts))
            whole = ipv4(POD, GO_POD, proto, make(POD, GO_POD, data), options=opts)
            complete_checksum(buffer, AT)
            assert taken(buffer, len(whole)) == whole

    @given(st.binary(max_size=200), st.integers(0, 0xFFFF))
    def test_finished_checksum_is_left_alone_right_or_wrong(self, data: bytes, checksum: int) -> None:
        for proto, make, head in ((TCP, tcp, 20), (UDP, udp, 8)):
            if checksum != ones_sum(pseudo(POD, GO_POD, proto, head + len(data))):
                packet = ipv4(POD, GO_POD, proto, make(POD, GO_POD, data, checksum=checksum))
                buffer = placed(packet)
                assert not complete_checksum(buffer, AT)
                assert taken(buffer, len(packet)) == packet

    def test_right_checksum_that_equals_the_bare_sum_stays(self) -> None:
        bare = ones_sum(pseudo(POD, GO_POD, UDP, 10))
        rest = ones_sum(udp(POD, GO_POD, b"\0\0", checksum=bare))
        data = ((2 * 0xFFFF - bare - rest) % 0xFFFF).to_bytes(2, "big")
        packet = ipv4(POD, GO_POD, UDP, udp(POD, GO_POD, data))
        assert packet[26:28] == bare.to_bytes(2, "big"), "the data was to make the right checksum equal the bare sum"
        buffer = placed(packet)
        complete_checksum(buffer, AT)
        assert taken(buffer, len(packet)) == packet

    @pytest.mark.parametrize(("proto", "frag"), [(UDP, MF), (UDP, DF | 9), (TCP, MF | 9), (SCTP, DF), (ICMP, DF)])
    def test_fragments_and_other_transports_are_left_alone(self, proto: int, frag: int) -> None:
        bare = ones_sum(pseudo(POD, GO_POD, proto, 13))
        packet = ipv4(POD, GO_POD, proto, udp(POD, GO_POD, checksum=bare), frag=frag)
        assert not complete_checksum(placed(packet), AT)


class TestUnreachable:
    @given(headers)
    def test_answer_is_a_valid_packet_to_the_sender(self, packet: bytes) -> None:
        """Contract 6.53."""
        answer = net_unreachable(packet, TUN_IP)
        if packet[9] == ICMP:
            assert answer is None
            return
        assert answer is not None
        assert ones_sum(answer[:20]) == ones_sum(answer[20:]) == 0xFFFF
        assert answer[12:20] == TUN_IP + packet[12:16]
        assert (answer[8], answer[9], answer[20], answer[21]) == (8, ICMP, 3, 0)
        assert struct.unpack("!H", answer[2:4])[0] == len(answer)
        assert answer[28:] == packet[: (packet[0] & 15) * 4 + 8]

    @pytest.mark.parametrize("src", ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255"])
    def test_no_answer_to_what_is_no_single_host(self, src: str) -> None:
        """RFC 1122 section 3.2.2; a spoofed packet must not make us shout at a broadcast address."""
        assert net_unreachable(ipv4(src, GO_POD, UDP, udp(src, GO_POD)), TUN_IP) is None

    def test_no_answer_to_icmp(self) -> None:
        assert net_unreachable(ipv4(POD, GO_POD, ICMP, echo_request()), TUN_IP) is None


def peer(ip: str, kernel_rx: bool = False) -> UdpPeer:
    return UdpPeer(parse_ip(ip), 8285, kernel_rx)


class TestPeerTable:
    def find(self, table: PeerTable, address: str) -> str | None:
        target = table.find(parse_ip(address))
        return target and target[0]

    def test_longest_prefix_wins(self) -> None:
        table = PeerTable(
            {Prefix.parse(p): peer(f"192.0.2.{n}") for n, p in enumerate(["10.5.0.0/16", "10.5.2.0/24", "10.5.2.7/32"])}
        )
        assert self.find(table, "10.5.2.7") == "192.0.2.2"
        assert self.find(table, "10.5.2.8") == "192.0.2.1"
        assert self.find(table, "10.5.3.8") == "192.0.2.0"
        assert self.find(table, "10.6.3.8") is None

    def test_host_bits_of_a_lease_do_not_matter(self) -> None:
        """Contract 3.13."""
        assert self.find(PeerTable({Prefix.parse("10.5.2.77/24"): peer("192.0.2.1")}), "10.5.2.1") == "192.0.2.1"

    def test_whole_range_and_ipv6_do_no_harm(self) -> None:
        table = PeerTable({Prefix.parse("0.0.0.0/0"): peer("192.0.2.1"), Prefix.parse("fd00::/64"): peer("192.0.2.2")})
        assert self.find(table, "255.255.255.255") == "192.0.2.1"
        assert list(table.sources) == ["192.0.2.1"]

    def test_empty_table_finds_nobody(self) -> None:
        assert self.find(PeerTable({}), "10.5.2.1") is None

    def test_host_with_two_leases_counts_as_kernel_sender_when_one_says_so(self) -> None:
        table = PeerTable(
            {
                Prefix.parse("10.5.2.0/24"): peer("192.0.2.1", True),
                Prefix.parse("10.5.3.0/24"): peer("192.0.2.1"),
            }
        )
        assert table.sources == {"192.0.2.1": True}

    @given(
        st.dictionaries(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), st.integers(1, 254), max_size=20),
        st.integers(0, 2**32 - 1),
    )
    def test_agrees_with_a_linear_search(self, peers: dict[tuple[int, int], int], address: int) -> None:
        subnets = {Prefix.of_int(a, n, Family.V4).masked(): peer(f"192.0.2.{last}") for (a, n), last in peers.items()}
        wanted = IP(address.to_bytes(4, "big"))
        best = max((p for p in subnets if wanted in p), key=lambda p: p.length, default=None)
        found = PeerTable(subnets).find(wanted)
        assert found == (None if best is None else (format_ip(subnets[best].ip), 8285))
