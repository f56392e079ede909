"""Flags, variables and network configurations made at random end in a value or in one ConfigError sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from string import printable

from hypothesis import assume, given
from hypothesis import strategies as st

from flanneld.cli_flags import DAEMON_FLAGS, daemon_options
from flanneld.errors import ConfigError
from flanneld.goflags import scan
from flanneld.model.backend_conf import BackendConf
from flanneld.model.netconf import NetConf
from flanneld.model.netconf_parse import parse_netconf

names = st.sampled_from([flag.name for flag in DAEMON_FLAGS])
values = st.one_of(
    st.text(),
    st.integers().map(str),
    st.sampled_from(["true", "F", "0x10", "010", "192.0.2.1", "::1", "a=1,b", "(", "json"]),
)
words = st.one_of(
    st.text(printable),
    values,
    st.builds(lambda dash, name, value: f"{dash}{name}={value}", st.sampled_from(["-", "--"]), names, values),
    names.map(lambda name: f"--{name}"),
)


def refusal(action: Callable[[], object]) -> str:
    """The sentence of the ConfigError that an action ends in; empty when it does not. Other errors pass."""
    try:
        action()
    except ConfigError as error:
        sentence = str(error)
    else:
        return ""
    assert sentence
    return sentence


@given(st.lists(words, max_size=6))
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    refusal(lambda: daemon_options(scan(argv, DAEMON_FLAGS).values, {}))


@given(st.dictionaries(st.sampled_from([flag.variable for flag in DAEMON_FLAGS]), values, max_size=4))
def test_any_environment_is_read_or_refused_by_the_name_of_its_variable(environ: dict[str, str]) -> None:
    sentence = refusal(lambda: daemon_options({}, environ))
    assert not sentence or sentence.startswith(tuple(environ))


@given(st.text(alphabet="abcdef0123456789", min_size=24, max_size=24), st.lists(words, max_size=3))
def test_no_mistake_repeats_the_password(secret: str, more: Sequence[str]) -> None:
    assume(secret not in "".join(more))  # typed in another place, it is no password
    for argv in (
        [f"--etcd-password={secret}", *more],
        ["--etcd-password", secret, *more],
        [f"--etcd-pasword={secret}"],
    ):
        shown: list[str] = []

        def read(argv: list[str] = argv, shown: list[str] = shown) -> None:
            shown.append(repr(daemon_options(scan(argv, DAEMON_FLAGS).values, {})))

        shown.append(refusal(read))
        assert secret not in "".join(shown)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 130),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["10.5.0.0/16", "10.5.3.0", "fd00:5::/48", "fd00:5::", "0.0.0.0/0", "vxlan", "10.5.0.0/30"]),
)
jsons = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
right = st.fixed_dictionaries(
    {"Network": st.sampled_from(["10.5.0.0/16", "10.5.0.0/28"]), "IPv6Network": st.just("fd00:5::/48")},
    optional={"EnableIPv6": st.booleans(), "SubnetLen": st.integers(0, 32), "SubnetMin": st.just("10.5.3.0")},
)
keys = st.sampled_from(
    "EnableIPv4 EnableIPv6 EnableNFTables Network SubnetLen SubnetMin SubnetMax IPv6Network IPv6SubnetLen "  # noqa: SIM905
    "IPv6SubnetMin IPv6SubnetMax Backend network BACKEND enableipv6".split()
)


@given((right | st.dictionaries(keys, jsons, max_size=8)).map(json.dumps))
def test_any_configuration_is_refused_or_has_room_for_subnets(text: str) -> None:
    found: list[NetConf] = []
    sentence = refusal(lambda: found.append(parse_netconf(text)))
    assert "\n" not in sentence
    for conf in found:
        for family in conf.families():
            limits = conf.family(family)
            assert limits is not None
            assert limits.network.first <= limits.subnet_min <= limits.subnet_max <= limits.network.last
            assert limits.network.length + 2 <= limits.subnet_len <= family.bits - 2


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    refusal(lambda: parse_netconf(raw))
    refusal(lambda: BackendConf(raw))


@given(st.dictionaries(st.sampled_from(["VNI", "vni", "GBP", "Name"]), jsons).map(json.dumps))
def test_any_backend_object_is_read_or_refused(text: str) -> None:
    for ask in (
        lambda: BackendConf(text).integer("VNI", 1, 1, 9),
        lambda: BackendConf(text).boolean("GBP", False),
        lambda: BackendConf(text).text("Name", ""),
    ):
        sentence = refusal(ask)
        assert not sentence or sentence.startswith("Backend")
