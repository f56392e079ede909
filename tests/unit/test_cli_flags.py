"""Each flag of contract 1.2, by flag and by variable."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest

from flanneld.cli_flags import DAEMON_FLAGS, ETCD_FLAGS, daemon_options, etcd_options
from flanneld.errors import UsageError
from flanneld.goflags import scan
from flanneld.model.addr import parse_ip
from flanneld.model.options import EtcdOptions, Options

# name on the command line, text, field, value
ACCEPTED: list[tuple[str, str, str, object]] = [
    ("etcd-endpoints", "https://a:1,https://b:2", "etcd_endpoints", "https://a:1,https://b:2"),
    ("etcd-prefix", "/n", "etcd_prefix", "/n"),
    ("etcd-keyfile", "/k", "etcd_keyfile", "/k"),
    ("etcd-certfile", "/c", "etcd_certfile", "/c"),
    ("etcd-cafile", "/ca", "etcd_cafile", "/ca"),
    ("etcd-username", "u", "etcd_username", "u"),
    ("etcd-password", "p", "etcd_password", "p"),
    ("iface", "eth0", "iface", ("eth0",)),
    ("iface-regex", "^eth[0-9]", "iface_regex", ("^eth[0-9]",)),
    ("iface-can-reach", "192.0.2.1", "iface_can_reach", parse_ip("192.0.2.1")),
    ("iface-can-reach", "2001:db8::1", "iface_can_reach", parse_ip("2001:db8::1")),
    ("public-ip", "192.0.2.1", "public_ip", parse_ip("192.0.2.1")),
    ("public-ipv6", "2001:db8::1", "public_ipv6", parse_ip("2001:db8::1")),
    ("subnet-file", "s.env", "subnet_file", "s.env"),
    ("state-dir", "/s", "state_dir", "/s"),
    ("subnet-lease-renew-margin", "1", "renew_margin_s", 60),
    ("subnet-lease-renew-margin", "1439", "renew_margin_s", 86340),
    ("allow-overlap", "true", "allow_overlap", True),
    ("ip-masq", "true", "ip_masq", True),
    ("ip-masq-fully-random-disable", "1", "ip_masq_fully_random_disable", True),
    ("iptables-forward-rules", "F", "iptables_forward_rules", False),
    ("iptables-resync", "010", "iptables_resync_s", 8),
    ("ip-blackhole-route", "TRUE", "ip_blackhole_route", True),
    ("healthz-ip", "::1", "healthz_ip", "::1"),
    ("healthz-port", "10256", "healthz_port", 10256),
    ("healthz-port", "-1", "healthz_port", 0),
    ("healthz-port", "+0x50", "healthz_port", 80),
    ("kube-subnet-mgr", "true", "kube_subnet_mgr", True),
    ("cni-conf-dir", "/etc/cni/net.d", "cni_conf_dir", "/etc/cni/net.d"),
    ("cni-conf-name", "05-x.conflist", "cni_conf_name", "05-x.conflist"),
    ("cni-bridge", "cni1", "cni_bridge", "cni1"),
    ("cni-network-name", "second", "cni_network_name", "second"),
    ("cni-conf-form", "flannel", "cni_conf_form", "flannel"),
    ("set-node-network-unavailable", "true", "set_node_network_unavailable", True),
    ("kube-api-url", "https://k:6443", "kube_api_url", "https://k:6443"),
    ("kubeconfig-file", "/root/.kube/config", "kubeconfig_file", "/root/.kube/config"),
    ("net-config-path", "/etc/kube-flannel/net-conf.json", "net_config_path", "/etc/kube-flannel/net-conf.json"),
    ("kube-annotation-prefix", "flannel.alpha.coreos.com", "kube_annotation_prefix", "flannel.alpha.coreos.com"),
    ("drop-privileges", "false", "drop_privileges", False),
    ("log-format", "json", "log_format", "json"),
    ("v", "0b11", "v", 3),
    ("vmodule", "etcd=1,vx*=0", "vmodule", (("etcd", 1), ("vx*", 0))),
    ("log_backtrace_at", ":0", "log_backtrace_at", ":0"),
]

REFUSED = [
    ("etcd-endpoints", "", "it must not be empty"),
    ("etcd-prefix", "/\udcff", "it must be UTF-8"),
    ("etcd-username", "\udcff", "it must be UTF-8"),
    ("kube-annotation-prefix", "\udcff", "it must be UTF-8"),
    ("etcd-password", "\udcff", "has a value that cannot be used: it must be UTF-8"),
    ("iface", "", "it must not be empty"),
    ("iface-regex", "eth(", "use a regular expression (missing ), unterminated subpattern at position 3)"),
    ("iface-can-reach", "host", "use an IP address"),
    ("public-ip", "2001:db8::1", "use an IPv4 address"),
    ("public-ip", "192.0.2.1/24", "use an IPv4 address"),
    ("public-ipv6", "192.0.2.1", "use an IPv6 address"),
    ("subnet-file", "", "it must not be empty"),
    ("state-dir", "", "it must not be empty"),
    ("subnet-lease-renew-margin", "0", "use a number of minutes from 1 to 1439"),
    ("subnet-lease-renew-margin", "1440", "use a number of minutes from 1 to 1439"),
    ("subnet-lease-renew-margin", "60m", "use a number of minutes from 1 to 1439"),
    ("ip-masq", "yes", "use true or false"),
    ("iptables-resync", "0", "use a number of seconds from 1 to 2147483647"),
    ("iptables-resync", "-5", "use a number of seconds from 1 to 2147483647"),
    ("healthz-ip", "localhost", "use an IP address, 0.0.0.0 for all of them"),
    ("healthz-port", "65536", "use a port from 1 to 65535, or 0 for no server"),
    ("healthz-port", "http", "use a port from 1 to 65535, or 0 for no server"),
    ("healthz-port", " 80", "use a port from 1 to 65535, or 0 for no server"),
    ("v", "9223372036854775808", "use a number from 0 to 2147483647"),
    ("v", "٣", "use a number from 0 to 2147483647"),
    ("vmodule", "etcd", "use module=level pairs such as etcd=1,vxlan=1"),
    ("log-format", "xml", "use text or json"),
    ("log_backtrace_at", "app.go:1", "use --vmodule instead, no line can be given a backtrace here"),
    ("cni-conf-name", "net.d/10-x.conflist", "use a file name that ends in .conflist, without a directory"),
    ("cni-conf-name", "10-x.yaml", "use a file name that ends in .conflist, without a directory"),
    ("cni-bridge", "a-name-of-17-char", "use at most 15 letters"),
    ("cni-network-name", "my net", "use letters, digits, dots, dashes and underscores"),
    ("cni-conf-form", "calico", "use bridge or flannel"),
]


def variable(name: str) -> str:
    return "FLANNELD_" + name.upper().replace("-", "_")


def options(argv: list[str], environ: dict[str, str] | None = None) -> Options:
    return daemon_options(scan(argv, DAEMON_FLAGS).values, environ or {})


@pytest.mark.parametrize(("name", "text", "field", "value"), ACCEPTED)
def test_flag_sets_its_field_only(name: str, text: str, field: str, value: object) -> None:
    found = options([f"--{name}={text}"])
    assert getattr(found, field) == value
    others = {f.name for f in fields(Options)} - {field}
    assert all(getattr(found, other) == getattr(Options(), other) for other in others)


@pytest.mark.parametrize(("name", "text", "field", "value"), ACCEPTED)
def test_variable_does_what_the_flag_does(name: str, text: str, field: str, value: object) -> None:
    assert options([], {variable(name): text}) == options([f"--{name}={text}"])


@pytest.mark.parametrize(("name", "text", "remedy"), REFUSED)
def test_wrong_flag_is_named_with_its_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        options([f"--{name}={text}"])
    label = "-v" if name == "v" else f"--{name}"
    assert str(caught.value).startswith(label + " ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("name", "text", "remedy"), [case for case in REFUSED if case[1]])
def test_wrong_variable_is_named_with_its_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        options([], {variable(name): text})
    assert str(caught.value).startswith(variable(name) + " ")
    assert remedy in str(caught.value)


def test_defaults_are_those_of_flannel() -> None:
    # contract 1.2
    found = options([])
    assert found.etcd_endpoints == "http://127.0.0.1:4001,http://127.0.0.1:2379"
    assert found.etcd_prefix == "/coreos.com/network"
    assert found.subnet_file == "/run/flannel/subnet.env"
    assert (found.renew_margin_s, found.iptables_resync_s) == (3600, 5)
    assert (found.ip_masq, found.iptables_forward_rules, found.set_node_network_unavailable) == (False, True, True)
    assert (found.healthz_ip, found.healthz_port, found.v) == ("0.0.0.0", 0, 0)
    assert (found.state_dir, found.log_format) == ("/var/lib/flanneld", "text")


def test_command_line_wins_over_environment() -> None:
    assert options(["--etcd-prefix=/flag"], {"FLANNELD_ETCD_PREFIX": "/env"}).etcd_prefix == "/flag"


def test_interfaces_from_the_command_line_are_not_merged_with_the_variable() -> None:
    # contract 1.5
    assert options(["--iface=a", "--iface=b"], {"FLANNELD_IFACE": "c"}).iface == ("a", "b")


def test_every_field_has_a_flag_and_every_flag_a_field() -> None:
    assert {flag.field for flag in DAEMON_FLAGS} - {"version"} == {field.name for field in fields(Options)}
    assert {flag.field for flag in ETCD_FLAGS} == {field.name for field in fields(EtcdOptions)}


def test_every_flag_is_covered_by_a_case() -> None:
    cases = {name for name, *_ in ACCEPTED} | {name for name, *_ in REFUSED}
    assert cases == {flag.name for flag in DAEMON_FLAGS} - {"version"}


@pytest.mark.parametrize(("name", "text", "field", "value"), ACCEPTED)
def test_value_has_the_type_of_its_field(name: str, text: str, field: str, value: object) -> None:
    hint = str(get_type_hints(Options)[field])
    kind = type(getattr(options([f"--{name}={text}"]), field)).__name__
    assert kind in hint or (kind == "bytes" and "IP" in hint)


def test_password_is_not_in_repr() -> None:
    assert "hunter2" not in repr(options(["--etcd-password=hunter2"]))


def test_flannelctl_reads_the_same_etcd_flags_and_variables() -> None:
    given = scan(["leases", "--etcd-prefix=/n", "list"], ETCD_FLAGS, take_words=True)
    found = etcd_options(given.values, {"FLANNELD_ETCD_ENDPOINTS": "http://a:1", "FLANNELD_V": "junk"})
    assert found == EtcdOptions(etcd_prefix="/n", etcd_endpoints="http://a:1")


def test_flannelctl_may_have_flags_of_its_own() -> None:
    assert etcd_options({"output": "json", "etcd_prefix": "/n"}, {}) == EtcdOptions(etcd_prefix="/n")
