"""Go's command-line syntax, with its silences turned into errors (contract 1.1, 1.4-1.6)."""

from __future__ import annotations

import pytest

from flanneld.errors import UsageError
from flanneld.flag_values import boolean, integer
from flanneld.goflags import Flag, Scanned, from_environment, misspelt_variables, parse_value, scan, usage

FLAGS = (
    Flag("ip-masq", boolean, "masquerade", ""),
    Flag("etcd-prefix", str, "prefix"),
    Flag("etcd-password", str, "password", secret=True),
    Flag("iface", str, "interface", repeated=True),
    Flag("healthz-port", integer(-5, 99), "port", "PORT"),
    Flag("v", integer(0, 99), "verbosity"),
    Flag("log_backtrace_at", str, "klog's"),
    Flag("version", boolean, "version", "", env=False),
)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("-ip-masq", {"ip_masq": True}),
        ("--ip-masq", {"ip_masq": True}),
        ("-ip-masq=false", {"ip_masq": False}),
        ("--ip-masq=T", {"ip_masq": True}),
        ("-v=3", {"v": 3}),
        ("-v 3", {"v": 3}),
        ("--v=0x1f", {"v": 31}),
        ("--healthz-port -1", {"healthz_port": -1}),
        ("--etcd-prefix /a", {"etcd_prefix": "/a"}),
        ("--etcd-prefix=", {"etcd_prefix": ""}),
        ("--etcd-prefix=a=b", {"etcd_prefix": "a=b"}),
        ("--etcd-password --ip-masq", {"etcd_password": "--ip-masq"}),
        ("--iface a -iface=b --iface c", {"iface": ("a", "b", "c")}),
        ("--etcd-prefix=/a --etcd-prefix=/b", {"etcd_prefix": "/b"}),
        ("--log_backtrace_at=:0", {"log_backtrace_at": ":0"}),
        ("--ip-masq --", {"ip_masq": True}),
    ],
)
def test_syntax_is_that_of_go(line: str, values: dict[str, object]) -> None:
    assert scan(line.split(), FLAGS) == Scanned(values, ())


@pytest.mark.parametrize("word", ["-h", "--help", "-help", "--h"])
def test_help_is_seen_before_later_mistakes(word: str) -> None:
    assert scan([word, "--nonsense"], FLAGS).help


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--ip-masq false --foo", "'false' after --ip-masq is not a flag: write --ip-masq=true or --ip-masq=false"),
        ("start", "'start' is not a flag: every option begins with -- and a value with blanks needs quotes"),
        ("-- start", "'start' is not a flag"),
        ("-", "'-' is not a flag"),
        ("--ip-mask", "there is no flag --ip-mask: did you mean --ip-masq?"),
        ("--etcd_prefix=/a", "did you mean --etcd-prefix?"),
        ("-v3", "did you mean -v?"),
        ("--qqqqqqqq", "there is no flag --qqqqqqqq: --help lists all flags"),
        ("---v", "'---v' is not a flag: write --name or --name=value"),
        ("--=3", "'--' is not a flag: write --name or --name=value"),
        ("--etcd-prefix", "--etcd-prefix needs a value: write --etcd-prefix=TEXT"),
        ("--ip-masq=yes", "--ip-masq is 'yes': use true or false"),
        ("--ip-masq=", "--ip-masq is '': use true or false"),
        ("-v=1.5", "-v is '1.5': use a number from 0 to 99"),
    ],
)
def test_mistake_is_named_with_its_remedy(line: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        scan(line.split(), FLAGS)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "--etcd-pasword=hunter2",
        "--etcd-password:hunter2",
        "--etcd-passwordhunter2",
        "--etcd-password=correct hunter2",
        "--etcd-password correct hunter2",
    ],
)
def test_mistyped_secret_is_not_repeated(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        scan(line.split(), FLAGS)
    assert "hunter2" not in str(caught.value)


def test_wrong_secret_is_not_repeated() -> None:
    flag = Flag("pin", integer(0, 9), "", secret=True)
    with pytest.raises(UsageError, match="--pin has a value that cannot be used: use a number from 0 to 9"):
        parse_value(flag, "hunter2", "--pin")


def test_words_may_stand_between_flags_when_asked_for() -> None:
    found = scan(["leases", "-v", "1", "show", "--iface=a", "10.5.0.0/24"], FLAGS, take_words=True)
    assert found == Scanned({"v": 1, "iface": ("a",)}, ("leases", "show", "10.5.0.0/24"))


def test_environment_fills_what_was_not_given() -> None:
    environ = {"FLANNELD_ETCD_PREFIX": "/env", "FLANNELD_V": "7", "FLANNELD_LOG_BACKTRACE_AT": ":0"}
    assert from_environment(environ, FLAGS, {"v"}) == {"etcd_prefix": "/env", "log_backtrace_at": ":0"}


def test_empty_variable_is_unset() -> None:
    assert from_environment({"FLANNELD_V": ""}, FLAGS, ()) == {}


def test_repeated_flag_takes_one_value_from_its_variable() -> None:
    # contract 1.4: no comma splitting
    assert from_environment({"FLANNELD_IFACE": "a,b"}, FLAGS, ()) == {"iface": ("a,b",)}


def test_version_has_no_variable() -> None:
    assert from_environment({"FLANNELD_VERSION": "true"}, FLAGS, ()) == {}


def test_wrong_variable_is_named() -> None:
    with pytest.raises(UsageError, match="FLANNELD_IP_MASQ is 'yes': use true or false"):
        from_environment({"FLANNELD_IP_MASQ": "yes"}, FLAGS, ())


def test_wrong_variable_under_a_given_flag_does_not_matter() -> None:
    assert from_environment({"FLANNELD_IP_MASQ": "yes"}, FLAGS, {"ip_masq"}) == {}


def test_misspelt_variable_is_noticed_but_kubernetes_own_are_not() -> None:
    environ = {"FLANNELD_ETCD_PREFX": "/a", "FLANNELD_SERVICE_HOST": "10.0.0.1", "FLANNELD_PORT": "tcp://", "HOME": "/"}
    assert misspelt_variables(environ, FLAGS) == [
        "environment variable FLANNELD_ETCD_PREFX has no effect: did you mean FLANNELD_ETCD_PREFIX?"
    ]


def test_help_shows_no_secret_default() -> None:
    class Defaults:
        etcd_password = "hunter2"
        etcd_prefix = "/default"

    text = usage("Usage: x", FLAGS, Defaults())
    assert "hunter2" not in text
    assert "/default" in text
    assert all(flag.label in text for flag in FLAGS)
