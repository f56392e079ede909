"""The udp backend's settings and lease data: what is accepted, what is refused, what peers are believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.udp import DEVICE, UdpBackend, UdpConf, parse_conf, takes_unfinished_checksums
from flanneld.errors import ConfigError
from flanneld.model.addr import MAC, parse_ip
from flanneld.model.host import ExtIface
from flanneld.model.lease_codec import encode_attrs
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import Link

OWN_IP = parse_ip("198.18.0.11")
EXT = ExtIface("eth0", 2, 1500, OWN_IP, None, OWN_IP, None)
SURVIVOR = Link(DEVICE, MAC(b""), 1472, True, "flanneld /coreos.com/network", None)


def conf(**backend: object) -> NetConf:
    raw = {"Network": "10.244.0.0/16", "Backend": {"Type": "udp", **backend}}
    return parse_netconf(json.dumps(raw).encode())


def test_flannels_own_configuration_gives_flannels_port_and_the_best_data_path() -> None:
    """Contract 6.47."""
    assert parse_conf(conf()) == (UdpConf(8285, "auto", False, False, False, False), ())


def test_keys_are_taken_in_any_case_and_unknown_ones_are_named() -> None:
    """Contract 2.4."""
    settings, unknown = parse_conf(conf(port=9000, datapath="GSO", Colour="red"))
    assert (settings.port, settings.data_path, unknown) == (9000, "gso", ("Colour",))


@pytest.mark.parametrize(
    ("key", "value"),
    [("DataPath", "fast"), ("DataPath", 1), ("Port", 0), ("Port", 65536), ("Port", "8285"), ("AnySource", "yes")],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_conf(conf(**{key: value}))


def test_ipv6_is_refused_with_the_backends_that_carry_it() -> None:
    raw = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00::/48", "Backend": {"Type": "udp"}}
    with pytest.raises(ConfigError, match="use vxlan or host-gw"):
        parse_conf(parse_netconf(json.dumps(raw).encode()))


def test_containers_have_28_bytes_less_than_the_interface() -> None:
    """Contract 6.2."""
    assert UdpBackend(conf(), {}).mtu(EXT) == 1472


def test_a_lease_is_go_flannels_until_a_kernel_receives() -> None:
    """Contract 3.17."""
    attrs = UdpBackend(conf(), {}).lease_attrs(EXT, "")
    assert encode_attrs(attrs) == b'{"PublicIP":"198.18.0.11","PublicIPv6":null}'


@pytest.mark.parametrize(
    ("data_path", "announced"), [("auto", True), ("kernel", True), ("gso", False), ("basic", False)]
)
def test_an_announcement_outlives_a_restart_with_the_device_that_still_receives(
    data_path: str, announced: bool
) -> None:
    attrs = UdpBackend(conf(DataPath=data_path), {DEVICE: SURVIVOR}).lease_attrs(EXT, "")
    assert takes_unfinished_checksums(attrs.data) is announced


@pytest.mark.parametrize(
    ("data", "believed"),
    [
        (b"", False),
        (b"null", False),
        (b'{"KernelRx":true}', True),
        (b'{"KernelRx":true,"Later":[1]}', True),
        (b'{"KernelRx":false}', False),
        (b'{"KernelRx":"true"}', False),
        (b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}', False),
    ],
)
def test_only_the_announcement_itself_is_believed(data: bytes, believed: bool) -> None:
    assert takes_unfinished_checksums(data) is believed


@given(st.binary(max_size=64))
def test_whatever_a_peer_published_is_at_worst_no_announcement(data: bytes) -> None:
    assert takes_unfinished_checksums(data) in (True, False)
