"""The program as its user meets it: exit status, streams, sentences (contract 0.1, 0.3, 1.6, 11.50, 11.51)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SECRET = "hunter2-hunter2"


def flanneld(*argv: str, before: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLANNELD_")}
    return subprocess.run(
        [*before, sys.executable, "-m", "flanneld", *argv],
        env=env | environ,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_version_goes_to_stderr_with_success() -> None:
    done = flanneld("--version", FLANNELD_V="junk")  # contract 0.1: before the environment is read
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.strip()[0].isdigit()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout_with_success(flag: str) -> None:
    done = flanneld(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--subnet-lease-renew-margin MINUTES" in done.stdout
    assert "(default 60)" in done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ip-mask"], "flanneld: there is no flag --ip-mask: did you mean --ip-masq?\n"),
        (["--ip-masq=maybe"], "flanneld: --ip-masq is 'maybe': use true or false\n"),
        (["--iptables-resync=0"], "flanneld: --iptables-resync is '0': use a number of seconds from 1 to 2147483647\n"),
        (["run"], "flanneld: 'run' is not a flag: every option begins with -- and a value with blanks needs quotes\n"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(argv: list[str], says: str) -> None:
    done = flanneld(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)


def test_wrong_variable_is_one_sentence_and_status_2() -> None:
    done = flanneld(FLANNELD_HEALTHZ_PORT="http")
    assert done.returncode == 2
    assert done.stderr == "flanneld: FLANNELD_HEALTHZ_PORT is 'http': use a port from 1 to 65535, or 0 for no server\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon looks at its rights first, and these are root's")
@pytest.mark.parametrize(
    ("flag", "value"),
    [("--etcd-endpoints", "192.0.2.1:2379"), ("--etcd-certfile", "/etc/x.pem")],  # no scheme; no key beside it
)
def test_flag_that_etcds_client_cannot_use_is_status_2_too(tmp_path: Path, flag: str, value: str) -> None:
    done = flanneld(
        f"{flag}={value}", f"--subnet-file={tmp_path}/env", f"--state-dir={tmp_path}"
    )  # systemd does not start it again for that (RestartPreventExitStatus)
    assert done.returncode == 2
    assert flag in done.stderr
    assert done.stderr.count("\n") == 1


def test_undecodable_argument_is_refused_like_any_other() -> None:
    done = flanneld("--ip-masq=" + os.fsdecode(b"\xff"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--help", f"--etcd-password={SECRET}"],
        [f"--etcd-password={SECRET}", "--help"],
        [f"--etcd-password={SECRET}", "--ip-masq=maybe"],
        [f"--etcd-pasword={SECRET}"],
        ["--etcd-password", "two", SECRET],
        ["--etcd-password", SECRET, "--kube-subnet-mgr"],
    ],
)
def test_password_is_never_shown(argv: list[str]) -> None:
    done = flanneld(*argv, FLANNELD_ETCD_PASSWORD=SECRET)
    assert SECRET not in done.stdout + done.stderr


def without_net_admin() -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ()
    if not shutil.which("setpriv"):
        pytest.skip("setpriv (util-linux) is needed to drop capabilities")
    return ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")


def test_missing_rights_are_one_sentence_and_status_1() -> None:
    done = flanneld("-v=9", f"--etcd-password={SECRET}", before=without_net_admin())
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("E")
    assert done.stderr.endswith(
        "flanneld may not configure the network: run it as root, or in a container with the capability NET_ADMIN\n"
    )
    assert SECRET not in done.stderr


def test_log_lines_are_json_when_asked_for_and_misspelt_variables_are_noted() -> None:
    done = flanneld("--log-format=json", before=without_net_admin(), FLANNELD_ETCD_PREFX=SECRET)
    warning, error = map(json.loads, done.stderr.splitlines())
    assert warning["level"] == "warning"
    assert warning["msg"].endswith("did you mean FLANNELD_ETCD_PREFIX?")
    assert error["level"] == "error"
    assert SECRET not in done.stderr


def test_help_and_mistakes_need_no_event_loop() -> None:
    # start-up of a health probe's `flanneld --version` and of a mistyped unit file stays instant
    code = "import sys, flanneld.cli; print({'asyncio', 'ssl', 'msgspec', 'grpclib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "set()\n"
