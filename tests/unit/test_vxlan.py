"""vxlan settings, sizes, names and published data: contract 6.2, 6.7, 6.8 and 3.17."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import vxlan
from backends.vxlan import Peer, VxlanConf, parse_conf, parse_peer
from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import MAC, Family, Prefix, format_mac, parse_ip, parse_mac
from flanneld.model.host import ExtIface
from flanneld.model.lease_codec import encode_attrs
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import METRIC_V6, Address, Fdb, Link, Neighbour, Route, Scope
from flanneld.plan.fold import Remote

IP, IP6 = parse_ip("198.18.0.1"), parse_ip("2001:db8::1")
EXT = ExtIface("eth0", 2, 1500, IP, IP6, parse_ip("203.0.113.7"), IP6)
MAC1, MAC2 = parse_mac("02:00:00:00:00:01"), parse_mac("c6:d2:32:6f:8f:44")
SUBNETS = {Family.V4: Prefix.parse("10.5.1.0/24"), Family.V6: Prefix.parse("fd00:5:0:1::/64")}
FAMILIES = {
    "v4": '"Network":"10.5.0.0/16"',
    "dual": '"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48"',
    "v6": '"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48"',
}


def conf(backend: str = "", families: str = "v4") -> NetConf:
    return parse_netconf(f'{{{FAMILIES[families]},"Backend":{{"Type":"vxlan"{backend}}}}}')


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("", VxlanConf(1, 8472, 0, False, False, False, 8192)),
        (',"VNI":4242,"Port":4789', VxlanConf(vni=4242, port=4789)),
        (',"vni":7,"PORT":0', VxlanConf(vni=7, port=8472)),
        (',"MTU":9000,"GBP":true,"Learning":true', VxlanConf(mtu=9000, gbp=True, learning=True)),
        (',"DirectRouting":true,"PageAhead":0', VxlanConf(direct_routing=True, page_ahead=0)),
        (',"VNI":null', VxlanConf()),
    ],
)
def test_settings_and_defaults(backend: str, expected: VxlanConf) -> None:
    """Contract 6.7; keys match in any case, null means the default (2.2)."""
    assert parse_conf(conf(backend)) == (expected, ())


def test_unknown_keys_are_told_and_harmless() -> None:
    assert parse_conf(conf(',"Nmae":1,"MacPrefix":"0E-2A"'))[1] == ("Nmae", "MacPrefix")


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        (',"VNI":0', r"Backend\.VNI.*1 to 16777215"),
        (',"VNI":16777216', r"Backend\.VNI.*16777215"),
        (',"VNI":"1"', r"Backend\.VNI"),
        (',"VNI":1.0', r"Backend\.VNI"),
        (',"Port":65536', r"Backend\.Port"),
        (',"Port":-1', r"Backend\.Port"),
        (',"MTU":600', r"Backend\.MTU is 600: use the underlay's MTU, from 626"),
        (',"GBP":"yes"', r"Backend\.GBP"),
        (',"PageAhead":-1', r"Backend\.PageAhead"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_remedy(backend: str, sentence: str) -> None:
    """Contract 6.8: flannel checks nothing here and fails later, if at all."""
    with pytest.raises(ConfigError, match=sentence):
        parse_conf(conf(backend))


@pytest.mark.parametrize(
    ("vni", "families", "fits"),
    [(9999, "v6", True), (10000, "v6", False), (10000, "dual", False), (9999999, "v4", True), (10000000, "v4", False)],
)
def test_a_vni_that_makes_the_device_name_too_long_is_refused(vni: int, families: str, fits: bool) -> None:
    """Contract 6.8: names have at most 15 characters."""
    if fits:
        parse_conf(conf(f',"VNI":{vni}', families))
        return
    with pytest.raises(ConfigError, match=f"Backend.VNI is {vni}: the device name .* more than 15"):
        parse_conf(conf(f',"VNI":{vni}', families))


@pytest.mark.parametrize(("wire", "v4", "v6"), [(1500, 1450, 1430), (9000, 8950, 8930), (1400, 1350, 1330)])
def test_the_outer_headers_take_50_bytes_over_ipv4_and_70_over_ipv6(wire: int, v4: int, v6: int) -> None:
    """RFC 7348 section 5; flannel takes 50 for both (contract 11.20)."""
    ext = EXT._replace(mtu=wire)
    assert vxlan.family_mtu(VxlanConf(), ext, Family.V4) == v4
    assert vxlan.family_mtu(VxlanConf(), ext, Family.V6) == v6


def test_the_configured_mtu_is_the_underlays_not_the_devices() -> None:
    assert vxlan.family_mtu(VxlanConf(mtu=1600), EXT, Family.V4) == 1550


@pytest.mark.parametrize(("family", "least"), [(Family.V4, 626), (Family.V6, 1350)])
def test_an_interface_too_small_for_the_family_is_refused(family: Family, least: int) -> None:
    assert vxlan.family_mtu(VxlanConf(), EXT._replace(mtu=least), family)
    with pytest.raises(ConfigError, match=f"at least {least}"):
        vxlan.family_mtu(VxlanConf(), EXT._replace(mtu=least - 1), family)


@pytest.mark.parametrize(
    ("families", "value"),
    [
        (
            "v4",
            '{"PublicIP":"203.0.113.7","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":7,"VtepMAC":"02:00:00:00:00:01"}}',
        ),
        (
            "v6",
            '{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"vxlan",'
            '"BackendV6Data":{"VNI":7,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        ),
        (
            "dual",
            '{"PublicIP":"203.0.113.7","PublicIPv6":"2001:db8::1","BackendType":"vxlan",'
            '"BackendData":{"VNI":7,"VtepMAC":"02:00:00:00:00:01"},'
            '"BackendV6Data":{"VNI":7,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        ),
    ],
)
def test_a_lease_is_published_as_go_flanneld_writes_it(families: str, value: str) -> None:
    """Contract 3.16, 3.17, 13.2; identity left out, which comes last and Go ignores."""
    attrs = vxlan.lease_attrs(
        conf("", families), VxlanConf(vni=7), EXT, {Family.V4: MAC1, Family.V6: MAC2}, identity=""
    )
    assert encode_attrs(attrs).decode() == value


# ---- this host's own things --------------------------------------------------------------------------


def overlay(families: str, family: Family) -> vxlan.Overlay:
    halves = vxlan.overlays(
        conf("", families), VxlanConf(), EXT, SUBNETS, {Family.V4: MAC1, Family.V6: MAC2}, "flanneld /x"
    )
    return next(half for half in halves if half.family is family)


@pytest.mark.parametrize(
    ("family", "device", "address"),
    [(Family.V4, "flannel.1", "10.5.1.0"), (Family.V6, "flannel-v6.1", "fd00:5:0:1::")],
)
def test_the_device_has_the_interfaces_own_address_and_the_subnets_first_one(
    family: Family, device: str, address: str
) -> None:
    """Contract 6.14; 6.10: the public address may be a router's, from which the kernel could not send."""
    objects = list(overlay("dual", family).base_objects())
    [link] = [obj for obj in objects if isinstance(obj, Link)]
    assert link.name == device
    assert link.vxlan is not None
    assert link.vxlan.local == (IP if family is Family.V4 else IP6)
    assert [obj for obj in objects if isinstance(obj, Address)] == [Address(device, parse_ip(address), family.bits)]
    [covering] = [obj for obj in objects if isinstance(obj, Route)]
    assert (covering.metric, covering.scope) == ((0, Scope.LINK) if family is Family.V4 else (METRIC_V6, 0))


def test_settings_are_named_with_slashes_because_device_names_have_dots() -> None:
    paths = [setting.path for setting in overlay("v4", Family.V4).settings()]
    assert "net/ipv4/neigh/flannel.1/app_solicit" in paths


def test_a_family_without_an_address_on_the_interface_is_refused() -> None:
    with pytest.raises(ConfigError, match="eth0 has no IPv6 address"):
        vxlan.overlays(
            conf("", "dual"), VxlanConf(), EXT._replace(ip6=None), SUBNETS, {Family.V4: MAC1, Family.V6: MAC2}, ""
        )


def test_a_peers_entries_are_those_of_contract_6_15_in_the_order_that_keeps_packets() -> None:
    peer = Peer(Prefix.parse("10.5.2.0/24"), MAC2, parse_ip("198.18.0.2"), 1)
    fdb, neighbour, route = overlay("v4", Family.V4).peer_objects(peer, "")
    assert fdb == Fdb("flannel.1", MAC2, parse_ip("198.18.0.2"))
    assert neighbour == Neighbour("flannel.1", parse_ip("10.5.2.0"), MAC2)
    assert str(route) == "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink"


def test_a_direct_peer_has_a_route_through_its_own_address_and_nothing_else() -> None:
    """Contract 6.19."""
    peer = Peer(Prefix.parse("10.5.2.0/24"), MAC2, parse_ip("198.18.0.2"), 1)
    [route] = overlay("v4", Family.V4).peer_objects(peer, "eth0")
    assert str(route) == "route 10.5.2.0/24 via 198.18.0.2 dev eth0"


# ---- peers' data -------------------------------------------------------------------------------------


def peer_of(data: bytes) -> Peer:
    return parse_peer(Remote(Prefix.parse("10.5.2.0/24"), parse_ip("198.18.0.2"), data, 3), MAC1)


@pytest.mark.parametrize(
    "data",
    [
        b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
        b'{"VtepMAC":"C6:D2:32:6F:8F:44"}',  # old nodes omit the VNI (contract 3.18)
        b'{"VNI":4096,"VtepMAC":"c6-d2-32-6f-8f-44","More":[1,{}]}',
        b'{"vtepmac":"c6d2.326f.8f44"}',  # keys in any case (13.5), any notation Go takes (3.18)
        b'{"VNI":"seven","VtepMAC":"c6:d2:32:6f:8f:44"}',  # Linux ignores the remote VNI
    ],
)
def test_whatever_go_reads_in_a_peers_data_we_read_too(data: bytes) -> None:
    assert peer_of(data) == Peer(Prefix.parse("10.5.2.0/24"), MAC2, parse_ip("198.18.0.2"), 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"c6:d2:32:6f:8f:44"',
        b'{"VtepMAC":null}',
        b'{"VtepMAC":5}',
        b'{"VtepMAC":""}',
        b'{"VtepMAC":"c6:d2:32:6f:8f"}',
        b'{"VtepMAC":"00:00:00:00:00:00"}',
        b'{"VtepMAC":"01:00:5e:00:00:01"}',
        b'{"VtepMAC":"ff:ff:ff:ff:ff:ff"}',
        b'{"VtepMAC":"02:00:00:00:00:01"}',  # ours
        b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"VtepMAC":"\xff"}',
    ],
)
def test_a_peer_with_unusable_data_is_skipped_with_a_sentence(data: bytes) -> None:
    with pytest.raises(PeerDataError, match=r"lease 10\.5\.2\.0/24 .*: not used"):
        peer_of(data)


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps({"VtepMAC": text}).encode()))
def test_no_data_of_a_peer_ends_in_anything_but_a_peer_or_a_sentence(data: bytes) -> None:
    try:
        peer = peer_of(data)
    except PeerDataError:
        return
    assert len(peer.mac) == 6


@given(st.binary(min_size=6, max_size=6).map(MAC).filter(lambda mac: not mac[0] & 1 and any(mac) and mac != MAC1))
def test_a_published_mac_is_read_back(mac: MAC) -> None:
    attrs = vxlan.lease_attrs(conf(), VxlanConf(), EXT, {Family.V4: mac}, "")
    assert peer_of(attrs.data).mac == mac
    assert format_mac(mac) in attrs.data.decode()
