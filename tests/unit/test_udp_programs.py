"""The udp backend's programs as text and size; what they do to packets is tests/netns/test_udp_fast.py's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from backends import udp_programs as programs
from backends.udp_decap import Decap, decap
from backends.udp_encap import Encap, encap
from backends.udp_packet import UdpPeer
from backends.udp_tables import Shape, entries
from flanneld.kernel.bpfasm import Program
from flanneld.model.addr import Prefix, parse_ip

EXT_IP = parse_ip("192.0.2.1")
ENCAP = Encap(3, 4, EXT_IP, 2, 8285, 24)
DECAP = Decap(5, 4, EXT_IP, 8285, 7, programs.ETHERNET)

VARIANTS: dict[str, Program] = {
    f"encap near={near} always={always} hashed={hashed} length={length}": encap(
        "encap", Encap(3, 4, EXT_IP, 2, 8285, length, near, always, hashed)
    )
    for near, always, hashed, length in itertools.product((0, 9), (False, True), (False, True), (None, 0, 24, 32))
} | {
    f"decap link={link} split={split} far={far}": decap("decap", Decap(5, 4, EXT_IP, 8285, 7, link, split, far))
    for link, split, far in itertools.product((0, 14), (0, 9), (False, True))
}


@pytest.mark.parametrize("program", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_assembles_and_stays_small_enough_to_read(program: Program) -> None:
    assert program.code()
    assert len(program) < 200


def test_unrelated_traffic_leaves_after_a_few_comparisons_and_uncounted() -> None:
    lines = decap("decap", DECAP).listing().splitlines()
    first_look_up = next(at for at, line in enumerate(lines) if "map_lookup" in line)
    other = lines.index("other:")
    assert sum("goto other" in line for line in lines[:first_look_up]) == 6
    assert [line.split(maxsplit=1)[1] for line in lines[other + 1 :]] == ["r0 = -1", "exit"]


def test_only_the_program_at_the_tun_sends_anything_into_the_pair() -> None:
    assert "call redirect\n" not in encap("far", ENCAP).listing()
    assert "call redirect\n" in encap("near", ENCAP._replace(compat_ifindex=9)).listing()
    always = encap("always", ENCAP._replace(compat_ifindex=9, compat_always=True)).listing()
    assert "call redirect\n" in always
    assert "redirect_neigh" not in always


PEER = UdpPeer(parse_ip("192.0.2.2"), 8285, kernel_rx=False)


def unsealed(peers: Mapping[Prefix, UdpPeer], shape: Shape) -> dict[bytes, bytes]:
    """Entries without their seal."""
    return {key: value[:8] for key, value in entries(peers, shape).items()}


def test_a_peer_is_keyed_by_its_masked_subnet_and_flagged_when_it_reads_a_socket() -> None:
    peers = {Prefix.parse("10.5.2.77/24"): PEER, Prefix.parse("fd00:2::/64"): PEER}
    shape = Shape.of({}, 24)
    assert unsealed(peers, shape) == {bytes((10, 5, 2, 0)): PEER.ip + b"\x20\x5d" + (1).to_bytes(2, "little")}
    direct = {Prefix.parse("10.5.2.0/24"): PEER._replace(kernel_rx=True)}
    assert unsealed(direct, shape) == {bytes((10, 5, 2, 0)): PEER.ip + b"\x20\x5d\0\0"}


def test_a_hash_serves_one_length_and_a_trie_several() -> None:
    one = {Prefix.parse("10.5.2.0/26"): PEER}
    two = {**one, Prefix.parse("10.5.4.0/24"): PEER}
    assert Shape.of(one, 24).prefix_length == 26
    assert Shape.of(two, 24).prefix_length is None
    assert Shape.of({}, 24).prefix_length == 24
    assert not Shape.of(one, 24).fits(two)
    assert Shape.of(two, 24).fits(one)
    assert unsealed(one, Shape.of(two, 24)) == {b"\x1a\0\0\0" + bytes((10, 5, 2, 0)): PEER.ip + b"\x20\x5d\x01\0"}


def test_tables_have_room_to_grow_before_they_are_made_anew() -> None:
    many = {Prefix.parse(f"10.{i >> 8}.{i & 255}.0/24"): PEER for i in range(5000)}
    shape = Shape.of(many, 24)
    assert shape.fits({**many, **{Prefix.parse(f"11.0.{i}.0/24"): PEER for i in range(256)}})
    assert shape.entries < 4 * len(many)
    assert not Shape.of({}, 24).fits(many)
