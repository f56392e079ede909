"""Nodes as leases and leases as annotations (contract 9.3 to 9.9, 9.16 to 9.18, 9.23, 13.5, 13.13)."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.errors import ConfigError, PeerDataError
from flanneld.model.addr import parse_ip
from flanneld.model.lease import LeaseAttrs
from flanneld.model.node_codec import Node, decode_event, decode_node, decode_page
from flanneld.model.node_lease import Annotations, bad_overwrites, changes, lease_of, operator_addresses
from tests.support.hosts import attrs_of

PREFIX = "flannel.alpha.coreos.com/"
NAMES = Annotations.of_prefix("flannel.alpha.coreos.com")
DATA = b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'
DATA6 = b'{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}'
VXLAN = attrs_of("192.0.2.1", backend_type="vxlan", data=DATA)
DUAL = attrs_of("192.0.2.1", ip6="2001:db8::1", backend_type="vxlan", data=DATA, data6=DATA6)


def node(cidrs: list[str] | str = "10.5.2.0/24", **annotations: str | None) -> Node:
    """A node as JSON decoded; annotations by short name with ``_`` for ``-``."""
    texts: dict[str, str | None] = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": DATA.decode(),
        "public-ip": "192.0.2.9",
    }
    texts |= {key.replace("_", "-"): text for key, text in annotations.items()}
    spec: dict[str, Any] = {"podCIDR": cidrs} if isinstance(cidrs, str) else {"podCIDRs": cidrs, "podCIDR": cidrs[0]}
    metadata = {
        "name": "n1",
        "resourceVersion": "7",
        "managedFields": [{"fieldsV1": {"f:spec": {}}}],
        "annotations": {PREFIX + key: text for key, text in texts.items() if text is not None},
    }
    return decode_node(msgspec.json.encode({"kind": "Node", "metadata": metadata, "spec": spec, "status": {"x": 1}}))


def after(attrs: LeaseAttrs, present: dict[str, str]) -> dict[str, str]:
    return {**present, **changes(attrs, present, NAMES)}


def short(annotations: dict[str, str]) -> dict[str, str]:
    return {key.removeprefix(PREFIX): text for key, text in annotations.items()}


# ---- prefix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/backend-type"),
        ("org.com", "org.com/backend-type"),
        ("org.com/", "org.com/backend-type"),
        ("org.com/9", "org.com/9-backend-type"),
        ("org.com/prefix-", "org.com/prefix-backend-type"),
        ("org.com/pre_fix", "org.com/pre_fix-backend-type"),
    ],
)
def test_a_prefix_that_go_flanneld_takes_gives_the_same_names(prefix: str, name: str) -> None:
    assert Annotations.of_prefix(prefix).backend_type == name


@pytest.mark.parametrize(
    "prefix", ["", "org", "org/", "org/prefix", "org.COM", "org.com/PREFIX", "org.com/a/b", "org.com/ x", "org.com/a\n"]
)
def test_a_prefix_that_go_flanneld_refuses_is_refused_with_an_example(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"such as flannel\.example\.com"):
        Annotations.of_prefix(prefix)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_node_is_a_lease() -> None:
    lease = lease_of(node(), NAMES, 7)
    assert lease
    assert (lease.name(), lease.attrs.where(), lease.attrs.backend_type) == ("10.5.2.0/24", "192.0.2.9", "vxlan")
    assert (lease.attrs.data, lease.revision, lease.ttl_id) == (DATA, 7, 0)


@pytest.mark.parametrize("managed", [None, "", "false", "True", "true "])
def test_only_the_exact_word_makes_a_node_take_part(managed: str | None) -> None:
    assert lease_of(node(kube_subnet_manager=managed), NAMES, 7) is None


@pytest.mark.parametrize("text", ["null", "", " null", None])
def test_all_forms_of_no_backend_data_mean_none(text: str | None) -> None:
    lease = lease_of(node(backend_data=text, backend_type=""), NAMES, 7)
    assert lease
    assert lease.attrs.data == b""


def test_a_blank_around_backend_data_is_no_difference() -> None:
    assert lease_of(node(backend_data=f" {DATA.decode()}\n"), NAMES, 7) == lease_of(node(), NAMES, 7)


def test_both_families_are_read() -> None:
    both = node(["10.5.2.0/24", "fd00:5::/64"], public_ipv6="2001:db8::9", backend_v6_data=DATA6.decode())
    lease = lease_of(both, NAMES, 7)
    assert lease
    assert (lease.name(), lease.attrs.where()) == ("10.5.2.0/24+fd00:5::/64", "192.0.2.9+2001:db8::9")
    assert lease.attrs.data6 == DATA6


def test_the_order_of_pod_cidrs_does_not_matter() -> None:
    turned = node(["fd00:5::/64", "10.5.2.0/24"], public_ipv6="2001:db8::9")
    lease = lease_of(turned, NAMES, 7)
    assert lease
    assert lease.name() == "10.5.2.0/24+fd00:5::/64"


@pytest.mark.parametrize(
    ("cidrs", "public_ipv6"), [(["10.5.2.0/24"], "2001:db8::9"), (["10.5.2.0/24", "fd00:5::/64"], None)]
)
def test_a_family_without_subnet_or_address_leaves_the_other_one_usable(
    cidrs: list[str], public_ipv6: str | None
) -> None:
    lease = lease_of(node(cidrs, public_ipv6=public_ipv6), NAMES, 7)
    assert lease
    assert lease.name() == "10.5.2.0/24"


def test_an_unspecified_address_is_none() -> None:
    """What an IPv6-only host-gw writes (contract 9.18)."""
    only6 = node(["10.5.2.0/24", "fd00:5::/64"], public_ip="0.0.0.0", public_ipv6="2001:db8::9")
    lease = lease_of(only6, NAMES, 7)
    assert lease
    assert lease.name() == "fd00:5::/64"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (node(public_ip="10.0.0.256"), "public-ip is '10.0.0.256'"),
        (node(public_ip="fd00::1"), "not an IPv4 address"),
        (node(public_ipv6="10.0.0.1"), "not an IPv6 address"),
        (node(backend_data="{"), "backend-data is '{', which is not JSON"),
        (node(backend_data="[" * 50), "not JSON"),
        (node(backend_data="[" * 100_000), "backend-data is too large"),
        (node(backend_data="[" * 970 + "]" * 970), "backend-data is too large"),
        (node(backend_data='"' + "x" * (1 << 17) + '"'), "backend-data is too large"),
        (node(backend_type="vx\x1b[2Jlan"), "backend-type is no name"),
        (node(public_ip=None), "no family with both"),
        (node(""), "no family with both"),
        (node("10.5.2.0"), "unusable pod CIDR"),
        (node(["10.5.2.0/24", "10.5.3.0/24"]), "two IPv4 pod CIDRs"),
    ],
)
def test_a_node_that_cannot_be_used_says_why(bad: Node, named: str) -> None:
    with pytest.raises(PeerDataError, match="(?s)" + named.replace("{", r"\{")) as refusal:
        lease_of(bad, NAMES, 7)
    assert len(str(refusal.value)) < 300


def test_what_an_operator_set_is_read() -> None:
    assert operator_addresses(node(), NAMES) == (None, None)
    set_ = node(node_public_ip="203.0.113.1", node_public_ipv6="2001:db8::5")
    assert operator_addresses(set_, NAMES) == (parse_ip("203.0.113.1"), parse_ip("2001:db8::5"))
    with pytest.raises(PeerDataError, match="kubectl annotate --overwrite node n1"):
        operator_addresses(node(node_public_ip="here"), NAMES)


# ---- writing ------------------------------------------------------------------------------------------------------


def test_a_fresh_node_gets_all_in_one_patch() -> None:
    assert short(changes(VXLAN, {}, NAMES)) == {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": DATA.decode(),
        "public-ip": "192.0.2.1",
    }


def test_what_is_right_is_not_written() -> None:
    for attrs in (VXLAN, DUAL):
        assert changes(attrs, after(attrs, {}), NAMES) == {}


def test_what_go_flanneld_wrote_for_the_same_data_is_not_written_again() -> None:
    """A node swapped to us makes no event (contract 13.15)."""
    written = dict(node(public_ip="192.0.2.1").annotations)
    assert changes(VXLAN, written, NAMES) == {}


@pytest.mark.parametrize(
    ("attrs", "absent", "present"),
    [
        # vxlan without IPv4 writes no IPv4 pair (contract 9.17)
        (
            LeaseAttrs(None, parse_ip("2001:db8::1"), "vxlan", b"", DATA6),
            {"public-ip", "backend-data"},
            {"public-ipv6"},
        ),
        (VXLAN, {"public-ipv6", "backend-v6-data"}, {"public-ip"}),
        (attrs_of("192.0.2.1", ip6="2001:db8::1", backend_type="host-gw"), set(), {"public-ip", "public-ipv6"}),
        (attrs_of("192.0.2.1", backend_type="host-gw"), {"public-ipv6"}, {"public-ip"}),
        # a backend that has data for IPv4 only does not serve IPv6
        (attrs_of("192.0.2.1", ip6="2001:db8::1", data=b'{"KernelRx":true}'), {"public-ipv6"}, {"public-ip"}),
    ],
)
def test_families_that_are_not_served_are_not_written(attrs: LeaseAttrs, absent: set[str], present: set[str]) -> None:
    written = set(short(changes(attrs, {}, NAMES)))
    assert not written & absent
    assert present <= written


def test_no_backend_data_is_written_as_null() -> None:
    written = short(changes(attrs_of("192.0.2.1", backend_type="host-gw"), {}, NAMES))
    assert (written["backend-data"], written["public-ip"]) == ("null", "192.0.2.1")


def test_host_gw_of_ipv6_alone_writes_the_unspecified_address() -> None:
    only6 = LeaseAttrs(None, parse_ip("2001:db8::1"), "host-gw")
    assert short(changes(only6, {}, NAMES))["public-ip"] == "0.0.0.0"


def test_the_address_that_an_operator_sets_is_written_instead() -> None:
    given_ = {PREFIX + "public-ip-overwrite": "203.0.113.1", PREFIX + "public-ipv6-overwrite": "2001:db8::99"}
    written = short(changes(DUAL, given_, NAMES))
    assert (written["public-ip"], written["public-ipv6"]) == ("203.0.113.1", "2001:db8::99")
    assert changes(DUAL, after(DUAL, given_), NAMES) == {}


def test_an_overwrite_that_is_no_address_is_not_followed_and_named() -> None:
    given_ = {PREFIX + "public-ip-overwrite": "203.0.113"}
    assert short(changes(VXLAN, given_, NAMES))["public-ip"] == "192.0.2.1"
    assert bad_overwrites(given_, NAMES) == [
        "annotation flannel.alpha.coreos.com/public-ip-overwrite is '203.0.113', which is not an IPv4 address, it is "
        "not followed"
    ]


@pytest.mark.parametrize("family", ["public-ip", "public-ipv6", "backend-data", "backend-v6-data"])
def test_in_dual_stack_a_change_of_one_family_changes_the_other_ones_text_but_not_its_meaning(family: str) -> None:
    """Else Go flanneld does not hear of it (contract 9.8, 13.13)."""
    present = after(DUAL, {})
    for number in range(3, 8):
        new = {
            "public-ip": DUAL._replace(public_ip=parse_ip(f"192.0.2.{number}")),
            "public-ipv6": DUAL._replace(public_ip6=parse_ip(f"2001:db8::{number}")),
            "backend-data": DUAL._replace(data=DATA.replace(b"01", b"%02d" % number)),
            "backend-v6-data": DUAL._replace(data6=DATA6.replace(b"02", b"%02d" % number)),
        }[family]
        updated = after(new, present)
        pairs = (("backend-data", "public-ip"), ("backend-v6-data", "public-ipv6"))
        assert all(any(updated[PREFIX + k] != present[PREFIX + k] for k in pair) for pair in pairs)
        assert changes(new, updated, NAMES) == {}
        seen = lease_of(_with(updated), NAMES, 1)
        assert seen
        assert seen.attrs == new
        present = updated


def test_the_mac_stays_readable_for_go_flanneld() -> None:
    """It takes what stands after the last ``:"`` of the text, up to two characters before its end (contract 9.20)."""
    present = after(DUAL, {})
    moved = after(DUAL._replace(public_ip=parse_ip("192.0.2.7")), present)
    text = moved[PREFIX + "backend-v6-data"]
    assert text.split(':"')[-1][:-2] == "02:00:00:00:00:02"


def _with(annotations: dict[str, str]) -> Node:
    body = {"metadata": {"name": "n", "annotations": annotations}, "spec": {"podCIDRs": ["10.5.1.0/24", "fd00::/64"]}}
    return decode_node(msgspec.json.encode(body))


TEXTS = st.none() | st.text(max_size=40) | st.sampled_from(["true", "null", "192.0.2.1", "2001:db8::1", DATA.decode()])


@given(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXTS)), st.lists(st.text(max_size=20), max_size=3))
def test_no_text_in_a_node_does_more_than_being_refused(texts: dict[str, str | None], cidrs: list[str]) -> None:
    present = {name: text for name, text in texts.items() if text is not None}
    body = {"metadata": {"name": "n", "annotations": present}, "spec": {"podCIDRs": cidrs}}
    read = decode_node(msgspec.json.encode(body))
    try:
        lease_of(read, NAMES, 1)
        operator_addresses(read, NAMES)
    except PeerDataError:
        pass
    for attrs in (VXLAN, DUAL):
        updated = after(attrs, present)
        assert changes(attrs, updated, NAMES) == {}


# ---- the API's JSON -----------------------------------------------------------------------------------------------


def test_a_bookmark_is_an_event_without_a_name() -> None:
    line = (
        b'{"type":"BOOKMARK","object":{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"9",'
        b'"creationTimestamp":null},"spec":{},"status":{}}}'
    )
    event = decode_event(line)
    assert (event.type, event.object.metadata.resource_version, event.object.metadata.name) == ("BOOKMARK", "9", "")


def test_an_error_is_an_event_with_a_status() -> None:
    line = (
        b'{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure",'
        b'"message":"too old resource version: 1 (316)","reason":"Expired","code":410}}'
    )
    status = decode_event(line).object
    assert (status.code, status.reason) == (410, "Expired")
    assert status.condition("NetworkUnavailable") is None


def test_a_list_without_items_is_empty() -> None:
    assert not decode_page(b'{"metadata":{"resourceVersion":"5"},"items":null}').items


def test_a_condition_is_found() -> None:
    raw = b'{"status":{"conditions":[{"type":"Ready","status":"True"},{"type":"X","status":"False","reason":"R"}]}}'
    assert decode_node(raw).condition("X") == ("False", "R")
    assert decode_node(raw).condition("Y") is None


@given(st.binary(max_size=200))
def test_what_is_not_json_is_a_value_error_and_nothing_else(raw: bytes) -> None:
    for decode in (decode_node, decode_event, decode_page):
        with contextlib.suppress(ValueError):
            decode(raw)
