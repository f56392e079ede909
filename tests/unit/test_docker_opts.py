"""``flannelctl docker-opts`` writes what mk-docker-opts.sh writes (contract 10.2 to 10.4, 12.40)."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flanneld.ctl import docker_opts
from flanneld.ctl.main import main
from flanneld.model.addr import Prefix

SUBNET_ENV = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
BIP, IPMASQ, MTU = (
    'DOCKER_OPT_BIP="--bip=10.5.72.1/24"\n',
    'DOCKER_OPT_IPMASQ="--ip-masq=false"\n',
    'DOCKER_OPT_MTU="--mtu=1450"\n',
)
ALL = 'DOCKER_OPTS=" --bip=10.5.72.1/24 --ip-masq=false --mtu=1450"\n'
NO_ROUTES = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DOCKER_OPTS", "DOCKER_OPT_BIP", "DOCKER_OPT_MTU", "DOCKER_OPT_IPMASQ"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "subnet.env").write_text(SUBNET_ENV)
    (tmp_path / "route").write_text(NO_ROUTES)
    monkeypatch.setattr(docker_opts, "_ROUTES", tmp_path / "route")


def made(folder: Path, *options: str) -> str:
    output = folder / "docker_opts.env"
    assert main(["docker-opts", "-f", str(folder / "subnet.env"), "-d", str(output), *options]) == 0
    return output.read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], BIP + IPMASQ + MTU + ALL),
        (["-i", "-c"], BIP + IPMASQ + MTU + ALL),
        (["-ic"], BIP + IPMASQ + MTU + ALL),
        (["-i"], BIP + IPMASQ + MTU),
        (["-c"], ALL),
        (["-c", "-k", "DOCKER_NETWORK_OPTIONS"], ALL.replace("DOCKER_OPTS", "DOCKER_NETWORK_OPTIONS")),
        (["-ckX_1"], ALL.replace("DOCKER_OPTS", "X_1")),
        (["-m"], BIP + MTU + 'DOCKER_OPTS=" --bip=10.5.72.1/24 --mtu=1450"\n'),
        (["-im"], BIP + MTU),
    ],
)
def test_each_form_of_output_byte_for_byte(tmp_path: Path, options: list[str], text: str) -> None:
    assert made(tmp_path, *options) == text


def test_ip_masq_is_the_opposite_of_flannels(tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("IPMASQ=true", "IPMASQ=false"))
    assert 'DOCKER_OPT_IPMASQ="--ip-masq=true"\n' in made(tmp_path, "-i")


def test_the_old_value_of_the_combined_variable_stays_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_OPTS", "--debug")
    assert made(tmp_path, "-c") == ALL.replace('" --bip', '"--debug --bip')
    assert made(tmp_path, "-c", "-k", "OTHER") == ALL.replace("DOCKER_OPTS", "OTHER")


def test_other_docker_opt_variables_are_taken_in_alphabetical_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_OPT_LOG", "--log-level=warn")
    monkeypatch.setenv("DOCKER_OPT_BIP", "--bip=192.0.2.1/24")  # ours wins
    log = 'DOCKER_OPT_LOG="--log-level=warn"\n'
    both = ALL.replace(" --mtu", " --log-level=warn --mtu")
    assert made(tmp_path) == BIP + IPMASQ + log + MTU + both


def test_a_shell_gets_back_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_OPT_LABEL", '--label=a="$HOME `id` \\"')
    output = tmp_path / "docker_opts.env"
    made(tmp_path, "-i")
    script = f'. {shlex.quote(str(output))}; printf %s "$DOCKER_OPT_LABEL"'
    assert subprocess.check_output(["sh", "-c", script], text=True, env={}) == '--label=a="$HOME `id` \\"'


def test_ipv6_only_leaves_the_bridge_address_out(tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text("FLANNEL_IPV6_SUBNET=2001:db8::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n")
    assert made(tmp_path, "-c") == 'DOCKER_OPTS=" --ip-masq=false --mtu=1430"\n'


def test_the_file_before_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "docker_opts.env").write_text("DOCKER_OPT_OLD=1\n" * 100)
    assert made(tmp_path, "-c") == ALL


def test_a_symbolic_link_and_standard_output_stay_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "docker_opts.env").symlink_to("real")
    assert made(tmp_path, "-c") == ALL
    assert (tmp_path / "docker_opts.env").is_symlink()
    argv = [sys.executable, "-m", "flanneld.ctl.main", "docker-opts", "-c", "-f", str(tmp_path / "subnet.env"), "-d"]
    for output in ("/dev/stdout", "-"):
        assert subprocess.check_output([*argv, output], text=True) == ALL
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("help_option", ["-h", "-?", "--help"])
def test_help_names_every_option(help_option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docker-opts", help_option]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {option} " in shown for option in ("-f", "-d", "-i", "-c", "-k", "-m"))


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["-f", "/nonexistent/subnet.env"], 1, "there is no subnet file /nonexistent/subnet.env"),
        (["-f", "/"], 1, "the subnet file / cannot be read: Is a directory"),
        (["-d", "/proc/none/docker_opts.env"], 1, "/proc/none/docker_opts.env"),
        (["-x"], 2, "option -x not recognized"),
        (["-k"], 2, "option -k requires argument"),
        (["-k", "A B"], 2, "'A B' is no name of a variable"),
        (["now"], 2, "takes no word 'now'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, sentence: str
) -> None:
    given = ["-f", str(tmp_path / "subnet.env"), "-d", str(tmp_path / "docker_opts.env")]
    assert main(["docker-opts", *given, *options]) == status
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("value", ["yes", "True", "1"])
def test_ip_masq_that_is_neither_true_nor_false_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    (tmp_path / "subnet.env").write_text(SUBNET_ENV.replace("IPMASQ=true", f"IPMASQ={value}"))
    output = tmp_path / "docker_opts.env"
    assert main(["docker-opts", "-f", str(tmp_path / "subnet.env"), "-d", str(output)]) == 1
    assert f"FLANNEL_IPMASQ in the subnet file is {value!r}: it has to be true or false" in capsys.readouterr().err
    assert not output.exists()


def test_a_gateway_route_to_the_subnet_is_told_after_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "route").write_text(NO_ROUTES + "eth0\t0048050A\t0B0200C0\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
    output = tmp_path / "docker_opts.env"
    assert main(["docker-opts", "-c", "-f", str(tmp_path / "subnet.env"), "-d", str(output)]) == 1
    told = capsys.readouterr().err
    assert "already has 10.5.72.0/24 via 192.0.2.11 dev eth0: remove that route (ip route delete 10.5.72.0/24)" in told
    assert output.read_text() == ALL


@pytest.mark.parametrize(
    "row",
    [
        "docker0\t0048050A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n",  # Docker's own, from its last run
        "eth0\t0048050A\t0B0200C0\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0\n",  # a wider one
        "eth0\t00000000\t0B0200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
    ],
)
def test_other_routes_are_no_conflict(row: str) -> None:
    assert docker_opts.gateway_of(Prefix.parse("10.5.72.0/24"), NO_ROUTES + row) == ""
