"""The network configuration (contract section 2): rules, worked defaults, refusals."""

from __future__ import annotations

import json

import pytest

from flanneld.errors import ConfigError
from flanneld.model.addr import Family, Prefix, format_ip
from flanneld.model.netconf import FamilyConf, NetConf
from flanneld.model.netconf_parse import parse_netconf


def shown(conf: FamilyConf | None) -> str:
    assert conf is not None
    low, high = (
        format_ip(Prefix.of_int(n, conf.subnet_len, conf.network.family).ip) for n in (conf.subnet_min, conf.subnet_max)
    )
    return f"{conf.network} /{conf.subnet_len} {low} {high}"


def v4(text: str) -> str:
    return shown(parse_netconf(text).v4)


def v6(text: str) -> str:
    return shown(parse_netconf(text).v6)


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_netconf(text)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("10.3.0.0/16", "10.3.0.0/16 /24 10.3.1.0 10.3.255.0"),
        ("10.3.0.0/22", "10.3.0.0/22 /24 10.3.1.0 10.3.3.0"),
        ("10.3.0.0/23", "10.3.0.0/23 /25 10.3.0.128 10.3.1.128"),
        ("10.3.0.0/28", "10.3.0.0/28 /30 10.3.0.4 10.3.0.12"),
        ("10.3.7.9/16", "10.3.0.0/16 /24 10.3.1.0 10.3.255.0"),
        ("0.0.0.0/8", "0.0.0.0/8 /24 0.0.1.0 0.255.255.0"),
    ],
)
def test_ipv4_defaults_follow_from_the_network(network: str, expected: str) -> None:
    # contract 2.6c-e, 2.8
    assert v4(f'{{"Network": "{network}"}}') == expected


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("fc00::/48", "fc00::/48 /64 fc00:0:0:1:: fc00:0:0:ffff::"),
        ("fc00::/62", "fc00::/62 /64 fc00:0:0:1:: fc00:0:0:3::"),
        ("fc00::/63", "fc00::/63 /65 fc00::8000:0:0:0 fc00:0:0:1:8000::"),
        ("fc00::/124", "fc00::/124 /126 fc00::4 fc00::c"),
    ],
)
def test_ipv6_defaults_follow_from_the_network(network: str, expected: str) -> None:
    # contract 2.7, 2.8
    assert v6(json.dumps({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": network})) == expected


def test_lower_case_keys_work() -> None:
    # contract 12.5
    assert v4('{"network": "10.3.0.0/16"}') == "10.3.0.0/16 /24 10.3.1.0 10.3.255.0"


def test_given_ipv4_bounds_survive() -> None:
    # contract 12.7
    text = '{"Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0", "SubnetLen": 28}'
    assert v4(text) == "10.3.0.0/16 /28 10.3.5.0 10.3.8.0"


def test_given_ipv6_bounds_survive() -> None:
    # contract 12.8
    text = (
        '{"EnableIPv6": true, "EnableIPv4": false, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 66,'
        ' "IPv6SubnetMin": "fc00:0:0:5::", "IPv6SubnetMax": "fc00:0:0:8::"}'
    )
    assert v6(text) == "fc00::/48 /66 fc00:0:0:5:: fc00:0:0:8::"


def test_zero_means_derive() -> None:
    text = '{"Network": "10.3.0.0/16", "SubnetLen": 0, "SubnetMin": "0.0.0.0", "SubnetMax": "0.0.0.0"}'
    assert v4(text) == "10.3.0.0/16 /24 10.3.1.0 10.3.255.0"
    text = '"IPv6Network": "fc00::/48", "IPv6SubnetMin": "::", "IPv6SubnetMax": null'
    text = f'{{"EnableIPv4": false, "EnableIPv6": true, {text}}}'
    assert v6(text) == "fc00::/48 /64 fc00:0:0:1:: fc00:0:0:ffff::"


def test_dual_stack_has_both_families_ipv4_first() -> None:
    conf = parse_netconf('{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fc00::/48"}')
    assert conf.families() == (Family.V4, Family.V6)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ('"network": "10.9.0.0/16", "Network": "10.3.0.0/16"', "10.3.0.0/16"),
        ('"Network": "10.9.0.0/16", "NETWORK": "10.3.0.0/16"', "10.3.0.0/16"),
        ('"network": "10.1.0.0/16", "Network": "10.2.0.0/16", "network": "10.3.0.0/16"', "10.3.0.0/16"),
    ],
)
def test_last_of_duplicate_keys_wins(members: str, expected: str) -> None:
    # contract 2.2
    conf = parse_netconf(f"{{{members}}}").v4
    assert conf is not None
    assert str(conf.network) == expected


@pytest.mark.parametrize("key", ["EnableIPv4", "EnableIPv6", "EnableNFTables", "SubnetLen", "IPv6SubnetLen"])
def test_null_keeps_the_default(key: str) -> None:
    # contract 2.2
    assert parse_netconf(f'{{"Network": "10.3.0.0/16", "{key}": null}}') == parse_netconf('{"Network": "10.3.0.0/16"}')


def test_unknown_keys_are_ignored() -> None:
    assert v4('{"Network": "10.3.0.0/16", "Comment": {"a": [1.5, null]}}') == "10.3.0.0/16 /24 10.3.1.0 10.3.255.0"


def test_nftables_is_chosen_by_its_key() -> None:
    assert parse_netconf('{"Network": "10.3.0.0/16", "enablenftables": true}').nftables
    assert not parse_netconf('{"Network": "10.3.0.0/16"}').nftables


def test_ipv4_range_under_the_ipv6_key_harms_only_with_ipv6() -> None:
    # contract 2.2: well-formed for the parser
    assert parse_netconf('{"Network": "10.3.0.0/16", "IPv6Network": "10.9.0.0/16"}').v6 is None
    sentence = refusal('{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "10.9.0.0/16"}')
    assert sentence == 'IPv6Network is "10.9.0.0/16": use an IPv6 range such as "fd00:5::/48"'


def backend(members: str) -> NetConf:
    return parse_netconf(f'{{"Network": "10.3.0.0/16", {members}}}')


def test_backend_is_udp_when_absent() -> None:
    # contract 2.3
    conf = parse_netconf('{"Network": "10.3.0.0/16"}')
    assert (conf.backend_type, conf.backend) == ("udp", b"{}")


def test_backend_type_is_lower_cased_and_its_keys_are_kept() -> None:
    conf = backend('"Backend": {"type": "VXLAN", "VNI": 5, "vni": 6}')
    assert conf.backend_type == "vxlan"
    assert json.loads(conf.backend) == {"type": "VXLAN", "VNI": 5, "vni": 6}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ('"Backend": {}', 'Backend.Type is missing: name the backend, such as {"Type": "vxlan"}'),
        ('"Backend": null', "Backend.Type is missing"),
        ('"Backend": {"Type": null}', "Backend.Type is missing"),
        ('"Backend": {"Type": ""}', "Backend.Type is missing"),
        ('"Backend": {"Type": 4}', 'Backend.Type is 4: use the name of a backend, such as "vxlan"'),
        ('"Backend": "vxlan"', 'Backend is "vxlan": write an object such as {"Type": "vxlan"}'),
        ('"Backend": []', "Backend is a list"),
        ('"SubnetLen": 24.0', "SubnetLen is 24.0: use a number from 18 to 30, or leave it out"),
        ('"SubnetLen": "24"', 'SubnetLen is "24": use a number from 18 to 30'),
        ('"SubnetLen": -1', "SubnetLen is -1: use a number from 18 to 30"),
        ('"SubnetLen": true', "SubnetLen is true: use a number from 18 to 30"),
        ('"SubnetLen": 31', "SubnetLen is 31: use a number from 18 to 30"),
        ('"SubnetLen": 17', "SubnetLen is 17: use a number from 18 to 30"),
        ('"SubnetMin": null', 'SubnetMin is null: use an IPv4 address such as "10.5.0.0"'),
        ('"SubnetMin": "fc00::"', 'SubnetMin is "fc00::": use an IPv4 address'),
        ('"SubnetMax": 7', "SubnetMax is 7: use an IPv4 address"),
        ('"SubnetMin": "10.4.0.0"', 'SubnetMin is "10.4.0.0": use an address inside 10.3.0.0/16, or leave it out'),
        ('"SubnetMax": "10.4.0.0"', 'SubnetMax is "10.4.0.0": use an address inside 10.3.0.0/16'),
        ('"SubnetMin": "10.3.1.128"', 'SubnetMin is "10.3.1.128": use the first address of a /24, such as 10.3.1.0'),
        ('"SubnetMax": "10.3.9.1"', 'SubnetMax is "10.3.9.1": use the first address of a /24, such as 10.3.9.0'),
        ('"SubnetMin": "10.3.9.0", "SubnetMax": "10.3.8.0"', "SubnetMin 10.3.9.0/24 lies above SubnetMax 10.3.8.0/24"),
        ('"EnableIPv4": "true"', 'EnableIPv4 is "true": use true or false'),
        ('"EnableIPv6": 1', "EnableIPv6 is 1: use true or false"),
        ('"EnableNFTables": "x"', "EnableNFTables"),
        ('"EnableIPv4": false', "EnableIPv4 is false and EnableIPv6 is not true: enable at least one of them"),
        ('"EnableIPv6": true', "IPv6Network is missing"),
        ('"EnableIPv6": true, "IPv6Network": "::/0"', "IPv6Network is the whole of IPv6"),
        (
            '"EnableIPv6": true, "IPv6Network": "fc00::/125"',
            'IPv6Network is "fc00::/125": use a range of /124 or larger',
        ),
        ('"EnableIPv6": true, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "10.3.0.0"', 'IPv6SubnetMin is "10.3.0.0"'),
        ('"EnableIPv6": true, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 127', "use a number from 50 to 126"),
        ('"IPv6SubnetMin": "junk"', 'IPv6SubnetMin is "junk"'),
        ('"IPv6Network": "junk"', 'IPv6Network is "junk"'),
    ],
)
def test_wrong_value_is_named_with_its_remedy(members: str, says: str) -> None:
    assert says in refusal(f'{{"Network": "10.3.0.0/16", {members}}}')


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"0.0.0.0/0"', "Network is the whole of IPv4"),
        ('""', 'Network is "": use an IPv4 range such as "10.5.0.0/16"'),
        ("null", "Network is null: use an IPv4 range"),
        ('"fc00::/48"', 'Network is "fc00::/48": use an IPv4 range'),
        ('"10.3.0.0"', 'Network is "10.3.0.0"'),
        ('"10.3.0.0/33"', "Network is"),
        ('"10.3.0.0/29"', 'Network is "10.3.0.0/29": use a range of /28 or larger, to have subnets'),
        ("16", "Network is 16"),
        ("{}", "Network is an object"),
    ],
)
def test_wrong_network_is_refused(value: str, says: str) -> None:
    assert says in refusal(f'{{"Network": {value}}}')


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the network configuration is empty"),
        (b" \n", "the network configuration is empty"),
        (b"{}", "Network is missing"),
        (b"null", "the network configuration is null: write a JSON object"),
        (b"[]", "the network configuration is a list"),
        (b'{"Network": "10.3.0.0/16"} x', "not JSON (Extra data at line 1 column 28)"),
        (b'{"Network": "10.3.0.0/16",}', "the network configuration is not JSON"),
        (b'{"Network": \xff}', "the network configuration is not UTF-8 text (byte 12)"),
        (b'\xef\xbb\xbf{"Network": "10.3.0.0/16"}', "is not JSON"),
        (b'{"a": NaN}', "not usable JSON (a number that cannot be used)"),
        (b'{"a": -Infinity}', "not usable JSON"),
        (b'{"a": 1e999}', "not usable JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not usable JSON"),
        (b'{"a": ' + b"[" * 100_000, "not usable JSON (nested too deeply)"),
    ],
)
def test_unreadable_text_is_refused_in_one_sentence(raw: bytes, says: str) -> None:
    assert says in refusal(raw)


def test_text_and_bytes_are_alike() -> None:
    assert parse_netconf('{"Network": "10.3.0.0/16"}') == parse_netconf(b'{"Network": "10.3.0.0/16"}')


@pytest.mark.parametrize(
    "rest", ['"SubnetLen": 99', '"SubnetMin": "192.0.2.0"', '"SubnetMin": "10.9.0.0", "SubnetMax": "10.8.0.0"']
)
def test_where_a_controller_names_subnets_the_bounds_do_not_matter(rest: str) -> None:
    """Contract 9.5."""
    conf = parse_netconf(f'{{"Network": "10.8.0.0/24", {rest}}}', allocates=False)
    assert conf.v4
    assert str(conf.v4.network) == "10.8.0.0/24"


def test_where_a_controller_names_subnets_the_form_of_the_bounds_still_matters() -> None:
    with pytest.raises(ConfigError, match="SubnetLen"):
        parse_netconf('{"Network": "10.8.0.0/24", "SubnetLen": "big"}', allocates=False)
