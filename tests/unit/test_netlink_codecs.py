"""rtnetlink bytes: what we write to the letter, and decoders that take whatever comes.

The golden bytes were read back on a real kernel by iproute2 (``tests/netns/test_rtnl.py`` keeps doing so);
they are little-endian, as all platforms are that we build for.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flanneld.kernel import link_codec, neigh_codec, nlmsg, route_codec
from flanneld.model.addr import IP, MAC, Family, Prefix, parse_ip, parse_mac
from flanneld.model.objects import (
    METRIC_V6,
    METRIC_VOID,
    PROTO_BOOT,
    PROTO_OURS,
    Address,
    Fdb,
    Link,
    Neighbour,
    Route,
    RouteKind,
    Scope,
    Vxlan,
)

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="golden bytes are little-endian")

MAC2 = parse_mac("02:00:00:00:00:02")
DEVICE = Link(
    "flannel.1",
    parse_mac("02:00:00:00:00:01"),
    1450,
    True,
    "flanneld /x",
    Vxlan(1, 2, parse_ip("198.18.0.1"), 8472),
)
LINKS = {7: "flannel.1", 2: "eth0"}


def peer_route(text: str, gateway: str, **more: object) -> Route:
    return Route(Prefix.parse(text), "flannel.1", parse_ip(gateway), onlink=True)._replace(**more)  # type: ignore[arg-type]


GOLDEN: dict[str, tuple[bytes, str]] = {
    # header: length, type, flags, sequence 0, port 0; then the family's header; then attributes
    "a programmed neighbour is permanent (contract 6.15)": (
        neigh_codec.neighbour(Neighbour("flannel.1", parse_ip("10.244.2.0"), MAC2), 7),
        "30000000 1c00 0105 00000000 00000000 02000000 07000000 8000 00 0108000100 0af40200 0a000200 020000000002 0000",
    ),
    "the answer to a miss gives way when the table is full": (
        neigh_codec.neighbour(Neighbour("flannel.1", parse_ip("10.244.2.9"), MAC2, permanent=False), 7),
        "30000000 1c00 0105 00000000 00000000 02000000 07000000 4000 00 0108000100 0af40209 0a000200 020000000002 0000",
    ),
    "a refusal is a failed neighbour without a MAC": (
        neigh_codec.neighbour(Neighbour("flannel.1", parse_ip("10.244.9.9"), MAC(b""), permanent=False), 7),
        "24000000 1c00 0105 00000000 00000000 02000000 07000000 2000 00 01 08000100 0af40909",
    ),
    "a neighbour is deleted by its address": (
        neigh_codec.neighbour(Neighbour("flannel.1", parse_ip("10.244.2.0"), MAC2), 7, delete=True),
        "24000000 1d00 0100 00000000 00000000 02000000 07000000 8000 00 01 08000100 0af40200",
    ),
    "an IPv6 neighbour": (
        neigh_codec.neighbour(Neighbour("flannel-v6.1", parse_ip("fd00:244:0:2::"), MAC2), 7),
        "3c000000 1c00 0105 00000000 00000000 0a000000 07000000 8000 00 01"
        "14000100 fd000244000000020000000000000000 0a000200 020000000002 0000",
    ),
    "a forwarding entry is permanent and self (contract 6.15)": (
        neigh_codec.fdb(Fdb("flannel.1", MAC2, parse_ip("198.18.0.2")), 7),
        "30000000 1c00 0105 00000000 00000000 07000000 07000000 8000 02 0008000100 c6120002 0a000200 020000000002 0000",
    ),
    "a forwarding entry is deleted by its MAC": (
        neigh_codec.fdb(Fdb("flannel.1", MAC2, parse_ip("198.18.0.2")), 7, delete=True),
        "28000000 1d00 0100 00000000 00000000 07000000 07000000 8000 02 00 0a000200 020000000002 0000",
    ),
    "a peer's route is onlink, boot, universe, without metric (contract 6.1, 6.15)": (
        route_codec.route(peer_route("10.244.2.0/24", "10.244.2.0"), 7),
        "34000000 1800 0106 00000000 00000000 02 18 00 00 fe 03 00 01 04000000"
        "08000100 0af40200 08000500 0af40200 08000400 07000000",
    ),
    "a route replaces another only when told so": (
        route_codec.route(peer_route("10.244.2.0/24", "10.244.2.0"), 7, replace=True),
        "34000000 1800 0105 00000000 00000000 02 18 00 00 fe 03 00 01 04000000"
        "08000100 0af40200 08000500 0af40200 08000400 07000000",
    ),
    "an IPv6 peer's route has the kernel's default metric (contract 6.1)": (
        route_codec.route(peer_route("fd00:244:0:2::/64", "fd00:244:0:2::", metric=METRIC_V6), 7),
        "54000000 1800 0106 00000000 00000000 0a 40 00 00 fe 03 00 01 04000000"
        "14000100 fd000244000000020000000000000000 14000500 fd000244000000020000000000000000"
        "08000400 07000000 08000600 00040000",
    ),
    "an unreachable block has no device and the last metric": (
        route_codec.route(
            Route(Prefix.parse("10.244.128.0/17"), "", None, False, RouteKind.UNREACHABLE, PROTO_OURS, METRIC_VOID), 0
        ),
        "2c000000 1800 0106 00000000 00000000 02 11 00 00 fe 56 00 07 00000000 08000100 0af48000 08000600 ffff0000",
    ),
    "a route is deleted by all its fields": (
        route_codec.route(peer_route("10.244.2.0/24", "10.244.2.0"), 7, delete=True),
        "34000000 1900 0100 00000000 00000000 02 18 00 00 fe 03 00 01 04000000"
        "08000100 0af40200 08000500 0af40200 08000400 07000000",
    ),
    "an address of global scope": (
        link_codec.address(Address("flannel.1", parse_ip("10.244.1.0"), 32), 7),
        "28000000 1400 0105 00000000 00000000 02 20 00 00 07000000 08000200 0af40100 08000100 0af40100",
    ),
    "an IPv6 address without duplicate detection (failures F43)": (
        link_codec.address(Address("flannel-v6.1", parse_ip("fd00:244:0:1::"), 128), 7),
        "40000000 1400 0105 00000000 00000000 0a 80 02 00 07000000"
        "14000200 fd000244000000010000000000000000 14000100 fd000244000000010000000000000000",
    ),
    "routes are dumped by device": (
        route_codec.dump_routes(Family.V4, ifindex=7),
        "24000000 1a00 0103 00000000 00000000 02 00 00 00 fe 00 00 00 00000000 08000400 07000000",
    ),
    "forwarding entries are dumped by the header's index": (
        neigh_codec.dump_neighbours(7, bridge=True),
        "1c000000 1e00 0103 00000000 00000000 07000000 07000000 0000 00 00",
    ),
    "neighbours are dumped by attribute": (
        neigh_codec.dump_neighbours(7, bridge=False),
        "24000000 1e00 0103 00000000 00000000 00000000 00000000 0000 00 00 08000800 07000000",
    ),
    "a device is deleted by index": (
        link_codec.link_delete(7),
        "20000000 1100 0100 00000000 00000000 0000 0000 07000000 00000000 00000000",
    ),
}


@little_endian
@pytest.mark.parametrize("claim", GOLDEN)
def test_bytes_on_the_wire(claim: str) -> None:
    written, expected = GOLDEN[claim]
    assert written.hex() == expected.replace(" ", "")


def vxlan_attrs(request: bytes) -> dict[int, bytes]:
    link = nlmsg.attrs(request, nlmsg.HEADER_BYTES + 16)
    info = nlmsg.attrs(link[link_codec.IFLA_LINKINFO], 0)
    assert info[link_codec.IFLA_INFO_KIND] == b"vxlan"
    return nlmsg.attrs(info[link_codec.IFLA_INFO_DATA], 0)


def test_a_new_device_says_every_setting_of_contract_6_9() -> None:
    """Zeros are said too: what is left out would be a default that another kernel may choose differently."""
    body = nlmsg.attrs(link_codec.link_create(DEVICE), nlmsg.HEADER_BYTES + 16)
    assert nlmsg.u32(body[link_codec.IFLA_TXQLEN]) == 0  # contract 6.4
    assert nlmsg.u32(body[link_codec.IFLA_MTU]) == 1450
    assert body[link_codec.IFLA_ADDRESS] == DEVICE.mac
    found = vxlan_attrs(link_codec.link_create(DEVICE))
    assert nlmsg.u32(found[link_codec.VX_ID]) == 1
    assert nlmsg.u32(found[link_codec.VX_LINK]) == 2
    assert found[link_codec.VX_LOCAL] == parse_ip("198.18.0.1")
    assert found[link_codec.VX_PORT] == (8472).to_bytes(2, "big")
    zeros = (
        link_codec.VX_LEARNING,
        link_codec.VX_TTL,
        link_codec.VX_TOS,
        link_codec.VX_PROXY,
        link_codec.VX_RSC,
        link_codec.VX_L3MISS,
    )
    assert {found[kind] for kind in (*zeros, link_codec.VX_ZERO_CSUM6_TX, link_codec.VX_ZERO_CSUM6_RX)} == {b"\0"}
    assert found[link_codec.VX_L2MISS] == b"\1"  # the one departure: repair by miss (design section 2)
    assert link_codec.VX_GBP not in found


def test_gbp_is_a_flag_and_learning_a_byte() -> None:
    assert DEVICE.vxlan is not None
    found = vxlan_attrs(link_codec.link_create(DEVICE._replace(vxlan=DEVICE.vxlan._replace(gbp=True, learning=True))))
    assert found[link_codec.VX_GBP] == b""
    assert found[link_codec.VX_LEARNING] == b"\1"


def changed(now: Link, was: Link) -> list[dict[int, bytes]]:
    return [nlmsg.attrs(request, nlmsg.HEADER_BYTES + 16) for request in link_codec.link_set(now, was, 7)]


def test_a_change_in_place_names_only_what_differs() -> None:
    assert changed(DEVICE, DEVICE) == [{}]
    assert changed(DEVICE._replace(mtu=1400), DEVICE) == [{link_codec.IFLA_MTU: (1400).to_bytes(4, sys.byteorder)}]
    assert changed(DEVICE._replace(mac=MAC2), DEVICE) == [{link_codec.IFLA_ADDRESS: MAC2}]


def test_vxlan_settings_change_before_the_mtu_in_a_message_of_their_own() -> None:
    """The driver refuses an MTU beside its own settings (drivers/net/vxlan, vxlan_nl2conf)."""
    assert DEVICE.vxlan is not None
    moved = DEVICE._replace(mtu=1400, vxlan=DEVICE.vxlan._replace(local=parse_ip("198.18.0.9")))
    assert [set(found) for found in changed(moved, DEVICE)] == [{link_codec.IFLA_LINKINFO}, {link_codec.IFLA_MTU}]


# ---- round trips: what the kernel tells back has the form of what it was told --------------------------

ip4 = st.binary(min_size=4, max_size=4).map(IP)
ip6 = st.binary(min_size=16, max_size=16).map(IP)
macs = st.binary(min_size=6, max_size=6).map(MAC)
prefixes = st.one_of(st.builds(Prefix, ip4, st.integers(0, 32)), st.builds(Prefix, ip6, st.integers(0, 128))).map(
    Prefix.masked
)


def body_of(request: bytes) -> memoryview:
    ((_kind, _flags, _seq, _pid, body),) = nlmsg.messages(request)
    return body


@given(st.one_of(ip4, ip6), macs, st.booleans())
def test_a_neighbour_is_read_as_written(ip: IP, mac: MAC, permanent: bool) -> None:
    assume(permanent or ip[0] < 224)
    written = Neighbour("flannel.1", ip, mac, permanent)
    assert neigh_codec.decode_neigh(body_of(neigh_codec.neighbour(written, 7)), LINKS) == written


@given(st.one_of(ip4, ip6), macs)
def test_a_forwarding_entry_is_read_as_written(dst: IP, mac: MAC) -> None:
    written = Fdb("flannel.1", mac, dst)
    assert neigh_codec.decode_neigh(body_of(neigh_codec.fdb(written, 7)), LINKS) == written


@st.composite
def written_routes(draw: st.DrawFn) -> Route:
    dst = draw(prefixes)
    kind = draw(st.sampled_from(list(RouteKind)))
    proto = draw(st.sampled_from((PROTO_BOOT, PROTO_OURS, 200)))
    metric = draw(st.integers(0, 0xFFFFFFFF))
    scope = draw(st.sampled_from(list(Scope))) if len(dst.ip) == 4 else Scope.UNIVERSE
    if kind is not RouteKind.UNICAST:
        return Route(dst, "", kind=kind, proto=proto, metric=metric, scope=scope)
    gateway = draw(st.none() | (ip4 if len(dst.ip) == 4 else ip6))
    return Route(dst, "eth0", gateway, draw(st.booleans()), kind, proto, metric, scope)


@given(written_routes())
def test_a_route_is_read_as_written(written: Route) -> None:
    assert route_codec.decode_route(body_of(route_codec.route(written, 2 if written.link else 0)), LINKS) == written


@given(st.one_of(st.tuples(ip4, st.integers(0, 32)), st.tuples(ip6, st.integers(0, 128))))
def test_an_address_is_read_as_written(address: tuple[IP, int]) -> None:
    ip, length = address
    index, found_length, _flags, _scope, found = link_codec.parse_address(
        body_of(link_codec.address(Address("x", ip, length), 7))
    )
    assert (index, found, found_length) == (7, ip, length)


@given(
    st.builds(
        Vxlan,
        st.integers(1, (1 << 24) - 1),
        st.integers(1, 1 << 20),
        st.one_of(ip4, ip6),
        st.integers(1, 65535),
        st.booleans(),
        st.booleans(),
        group=st.none(),
    ),
    macs,
    st.integers(68, 65535),
)
def test_a_device_is_read_as_written(vxlan: Vxlan, mac: MAC, mtu: int) -> None:
    written = Link("flannel.1", mac, mtu, False, "", vxlan)
    assert link_codec.decode_link(body_of(link_codec.link_create(written))) == (0, written)


MTU_600 = nlmsg.attr(route_codec.RTAX_LOCK, b"\4\0\0\0") + nlmsg.attr(2, (600).to_bytes(4, sys.byteorder))
TWO_HOPS = b"".join(
    struct.pack("=HBBi", 16, route_codec.RTNH_F_ONLINK, 0, index)
    + nlmsg.attr(route_codec.RTA_GATEWAY, parse_ip(f"10.244.{index}.0"))
    for index in (7, 2)
)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (route_codec.RTA_METRICS, MTU_600, "route 10.244.0.0/16 dev flannel.1 mtu 600"),
        (route_codec.RTA_METRICS, nlmsg.attr(99, b"\1"), "route 10.244.0.0/16 dev flannel.1 metric#99"),
        (route_codec.RTA_PREFSRC, b"\x0a\0\0\x01", "route 10.244.0.0/16 dev flannel.1 src 10.0.0.1"),
        (route_codec.RTA_VIA, b"\0" * 8, "route 10.244.0.0/16 dev flannel.1 via another family"),
        (route_codec.RTA_ENCAP, b"\0" * 8, "route 10.244.0.0/16 dev flannel.1 encap"),
        (route_codec.RTA_MULTIPATH, TWO_HOPS, "route 10.244.0.0/16 via 10.244.7.0 dev flannel.1 onlink nexthops 2"),
        (route_codec.RTA_MULTIPATH, b"\0" * 8, "route 10.244.0.0/16 dev flannel.1 nexthops 0"),
        (route_codec.RTA_MULTIPATH, b"\x08", "route 10.244.0.0/16 dev flannel.1 nexthops 0"),
    ],
)
def test_a_route_that_says_more_than_ours_is_told_from_ours_by_what_it_says(kind: int, value: bytes, text: str) -> None:
    plain = route_codec.route(Route(Prefix.parse("10.244.0.0/16"), "flannel.1"), 7)
    body = body_of(nlmsg.message(nlmsg.RTM_NEWROUTE, 0, bytes(body_of(plain)) + nlmsg.attr(kind, value)))
    found = route_codec.decode_route(body, LINKS)
    assert found != route_codec.decode_route(body_of(plain), LINKS)
    assert str(found) == text


@pytest.mark.parametrize(
    ("flags", "master", "settings", "text"),
    [
        (0, 0, b"", ""),
        (link_codec.IFF_NOARP, 0, b"", "arp off"),
        (0, 9, b"", "master #9"),
        (0, 0, nlmsg.put_u8(link_codec.VX_TTL, 3) + nlmsg.put_u8(link_codec.VX_TOS, 0), "ttl 3"),
        (0, 0, nlmsg.put_u8(link_codec.VX_DF, 1) + nlmsg.put_u32(link_codec.VX_LABEL, 0), "df 1"),
        (0, 0, nlmsg.put_u8(link_codec.VX_TOS, 4), "tos 4"),
    ],
)
def test_a_device_that_others_have_changed_is_told_from_ours_by_how(
    flags: int, master: int, settings: bytes, text: str
) -> None:
    vxlan = Vxlan(1, 2, parse_ip("198.18.0.1"), 8472)
    plain = Link("flannel.1", MAC2, 1450, False, "", vxlan)
    data = link_codec._vxlan_attrs(vxlan, create=True) + settings
    info = nlmsg.attr(link_codec.IFLA_INFO_KIND, b"vxlan") + nlmsg.attr(link_codec.IFLA_INFO_DATA, data)
    body = bytearray(body_of(link_codec.link_create(plain)))
    struct.pack_into("=I", body, 8, flags)
    body += nlmsg.put_u32(link_codec.IFLA_MASTER, master) + nlmsg.attr(link_codec.IFLA_LINKINFO, info)
    _index, found = link_codec.decode_link(memoryview(body))
    assert found == plain._replace(extra=text)
    # one request, or two where the driver has to be told as well, and none of them where nothing is to be taken back
    assert len(link_codec.link_set(plain, found, 7)) == (2 if text else 1)


def test_a_route_for_a_tos_stands_beside_ours_and_is_left_out() -> None:
    with_tos = bytearray(body_of(route_codec.route(Route(Prefix.parse("10.244.0.0/16"), "flannel.1"), 7)))
    with_tos[3] = 0x10
    assert route_codec.decode_route(memoryview(with_tos), LINKS) is None


def test_a_forwarding_entry_with_a_port_of_its_own_is_not_taken_for_ours() -> None:
    ours = Fdb("flannel.1", MAC2, parse_ip("198.18.0.2"))
    body = bytes(body_of(neigh_codec.fdb(ours, 7)))
    for kind, value in (
        (neigh_codec.NDA_PORT, b"\x12\xb5"),
        (neigh_codec.NDA_VNI, b"\5\0\0\0"),
        (neigh_codec.NDA_IFINDEX, b"\2\0\0\0"),
    ):
        assert neigh_codec.decode_neigh(memoryview(body + nlmsg.attr(kind, value)), LINKS) != ours


def test_a_temporary_forwarding_entry_is_no_entry_of_ours() -> None:
    """It is learned, where that is configured, or somebody's who has put it in the place of one of ours."""
    ours = Fdb("flannel.1", MAC2, parse_ip("198.18.0.2"))
    body = bytearray(body_of(neigh_codec.fdb(ours, 7)))
    struct.pack_into("=H", body, 8, neigh_codec.NUD_REACHABLE)
    assert neigh_codec.decode_neigh(memoryview(body), LINKS) == ours._replace(permanent=False)


@pytest.mark.parametrize("group", ["224.0.0.22", "255.255.255.255", "ff02::16"])
def test_neighbours_of_multicast_and_broadcast_addresses_belong_to_the_kernel(group: str) -> None:
    entry = Neighbour("flannel.1", parse_ip(group), MAC2, permanent=False)
    assert neigh_codec.decode_neigh(body_of(neigh_codec.neighbour(entry, 7)), LINKS) is None


def test_only_an_address_that_the_kernel_still_asks_for_is_unresolved() -> None:
    ip = parse_ip("10.244.9.9")
    body = bytearray(body_of(neigh_codec.neighbour(Neighbour("flannel.1", ip, MAC(b"")), 7)))
    assert neigh_codec.decode_unresolved(memoryview(body), LINKS) is None  # failed
    struct.pack_into("=H", body, 8, neigh_codec.NUD_INCOMPLETE)
    assert neigh_codec.decode_unresolved(memoryview(body), LINKS) == ("flannel.1", ip)
    assert neigh_codec.decode_unresolved(memoryview(body), {2: "eth0"}) is None


# ---- whatever comes -----------------------------------------------------------------------------------


def datagram(kind: int, body: bytes) -> bytes:
    return nlmsg.message(kind, 0, body)


KINDS = (
    *(
        nlmsg.RTM_NEWLINK,
        nlmsg.RTM_DELLINK,
        nlmsg.RTM_NEWADDR,
        nlmsg.RTM_DELADDR,
        nlmsg.RTM_NEWROUTE,
        nlmsg.RTM_DELROUTE,
    ),
    *(nlmsg.RTM_NEWNEIGH, nlmsg.RTM_DELNEIGH, nlmsg.RTM_GETNEIGH, nlmsg.NLMSG_ERROR, nlmsg.NLMSG_DONE),
)
SEEDS = [bytes(body_of(request)) for request, _ in GOLDEN.values()] + [bytes(body_of(link_codec.link_create(DEVICE)))]


@st.composite
def garbled(draw: st.DrawFn) -> bytes:
    """Real bodies with some bytes changed and the end cut or grown; noise alone rarely gets past the headers."""
    body = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        if body:
            body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(body) + 4))
    return bytes(body[:end]) + draw(st.binary(max_size=8))


DECODERS: dict[str, Callable[[memoryview], object]] = {
    "neighbour": lambda body: neigh_codec.decode_neigh(body, LINKS),
    "announced neighbour": lambda body: neigh_codec.decode_neigh(body, LINKS, any_state=True),
    "unresolved": lambda body: neigh_codec.decode_unresolved(body, LINKS),
    "idle": neigh_codec.decode_idle,
    "miss": neigh_codec.decode_miss,
    "route": lambda body: route_codec.decode_route(body, LINKS),
    "direct device": route_codec.direct_device,
    "next hop": route_codec.nexthop_of,
    "address": link_codec.parse_address,
    "link": link_codec.decode_link,
    "error": lambda body: nlmsg.parse_error(body, 0x200),
    "capped error": lambda body: nlmsg.parse_error(body, 0x300),
    "end of a dump": lambda body: nlmsg.parse_done(body, 0x200),
}
BY_KIND = {
    **{kind: ["link"] for kind in (nlmsg.RTM_NEWLINK, nlmsg.RTM_DELLINK)},
    **{kind: ["address"] for kind in (nlmsg.RTM_NEWADDR, nlmsg.RTM_DELADDR)},
    **{kind: ["route", "direct device", "next hop"] for kind in (nlmsg.RTM_NEWROUTE, nlmsg.RTM_DELROUTE)},
    **{
        kind: ["neighbour", "announced neighbour", "unresolved", "idle"]
        for kind in (nlmsg.RTM_NEWNEIGH, nlmsg.RTM_DELNEIGH)
    },
    nlmsg.RTM_GETNEIGH: ["miss"],
    nlmsg.NLMSG_ERROR: ["error", "capped error"],
    nlmsg.NLMSG_DONE: ["end of a dump"],
}


@given(st.sampled_from(KINDS), st.one_of(garbled(), st.binary(max_size=80)))
def test_no_decoder_raises_on_any_body_and_texts_can_be_made_of_what_it_returns(kind: int, body: bytes) -> None:
    for _kind, _flags, _seq, _pid, view in nlmsg.messages(datagram(kind, body)):
        for name in BY_KIND[kind]:
            found = DECODERS[name](view)
            str(found)
            if isinstance(found, Neighbour | Fdb):
                assert family_is_sound(found.dst if isinstance(found, Fdb) else found.ip)
            if isinstance(found, Route):
                assert family_is_sound(found.dst.ip)
                assert 0 <= found.dst.length <= len(found.dst.ip) * 8
                assert found.gateway is None or len(found.gateway) == len(found.dst.ip)


def family_is_sound(ip: IP) -> bool:
    return len(ip) in (4, 16)


@given(st.binary(max_size=200))
def test_a_garbled_datagram_gives_messages_or_nothing(data: bytes) -> None:
    for _kind, _flags, _seq, _pid, body in nlmsg.messages(data):
        assert len(body) <= len(data) - nlmsg.HEADER_BYTES


@pytest.mark.parametrize("kind", sorted(BY_KIND.keys() - {nlmsg.NLMSG_DONE}))
def test_a_body_shorter_than_its_header_is_left_out(kind: int) -> None:
    assert list(nlmsg.messages(datagram(kind, b"\0\0\0"))) == []


def test_messages_of_one_datagram_are_split_and_a_cut_last_one_is_dropped() -> None:
    whole = link_codec.link_delete(1) + link_codec.link_delete(2)
    kinds = [kind for kind, *_ in nlmsg.messages(whole + link_codec.link_delete(3)[:-4])]
    assert kinds == [nlmsg.RTM_DELLINK, nlmsg.RTM_DELLINK]


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=20), max_size=8))
def test_attributes_are_read_as_written(wanted: dict[int, bytes]) -> None:
    assert nlmsg.attrs(b"".join(nlmsg.attr(kind, value) for kind, value in wanted.items()), 0) == wanted


def test_the_last_of_several_attributes_wins_and_a_broken_tail_is_ignored() -> None:
    text = nlmsg.attr(1, b"a") + nlmsg.attr(1, b"b") + b"\xff\xff\1\0"
    assert nlmsg.attrs(text, 0) == {1: b"b"}


def test_the_kernels_own_words_are_found_in_an_error() -> None:
    """NLM_F_ACK_TLVS = 0x200; with NLM_F_CAPPED = 0x100 only the header of the request is echoed."""
    words = nlmsg.attr(1, b"Nexthop has invalid gateway\0")
    request = link_codec.link_delete(7)
    capped = struct.pack("=i", -22) + request[:16] + words
    assert nlmsg.parse_error(memoryview(capped), 0x300) == (22, "Nexthop has invalid gateway")
    whole = struct.pack("=i", -22) + request + words
    assert nlmsg.parse_error(memoryview(whole), 0x200) == (22, "Nexthop has invalid gateway")
    assert nlmsg.parse_error(memoryview(whole), 0) == (22, "")


def test_a_dump_that_failed_on_its_way_says_so_at_its_end() -> None:
    assert nlmsg.parse_done(memoryview(struct.pack("=i", 0)), 0) == (0, "")
    assert nlmsg.parse_done(memoryview(b""), 0) == (0, "")
    words = nlmsg.attr(1, b"no such device\0")
    assert nlmsg.parse_done(memoryview(struct.pack("=i", -19) + words), 0x200) == (19, "no such device")


def test_a_miss_asks_for_an_address_or_for_a_mac() -> None:
    asks_ip = neigh_codec.neighbour(Neighbour("flannel.1", parse_ip("10.244.2.9"), MAC(b"")), 7)
    assert neigh_codec.decode_miss(body_of(asks_ip)) == (7, parse_ip("10.244.2.9"), None)
    asks_mac = bytes(body_of(asks_ip)[:12]) + nlmsg.attr(neigh_codec.NDA_LLADDR, MAC2)
    assert neigh_codec.decode_miss(memoryview(asks_mac)) == (7, None, MAC2)
    assert neigh_codec.decode_miss(memoryview(asks_mac[:12] + nlmsg.attr(neigh_codec.NDA_DST, b"abc"))) == (
        7,
        None,
        None,
    )


def test_idle_seconds_are_the_second_word_in_hundredths() -> None:
    entry = bytes(body_of(neigh_codec.fdb(Fdb("flannel.1", MAC2, parse_ip("198.18.0.2")), 7)))
    cache = nlmsg.attr(neigh_codec.NDA_CACHEINFO, struct.pack("=IIII", 100, 1234, 7, 1))
    assert neigh_codec.decode_idle(memoryview(entry + cache)) == (MAC2, 12.34)
    assert neigh_codec.decode_idle(memoryview(entry)) == (MAC2, 0.0)
