"""Passwords, tokens and keys come up in no output, whatever happens; files and sockets are for whom they are for.

Each test gives a daemon a secret that no text contains by chance, makes things go well and wrong, and looks for it in
everything that comes out: log at the highest level, pages, files, device names, ``flannelctl``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from flanneld.lab import Lab, http
from flanneld.lab.daemon import own_command
from flanneld.lab.kubeapi import FLANNEL_TOKEN
from flanneld.report.control import ask
from tests.support.etcd_bed import HEALTH_PORT, EtcdBed
from tests.support.live import until
from tests.support.netns import Netns

pytestmark = [pytest.mark.kernel, pytest.mark.etcd]

MakeLab = Callable[..., Lab]
SECRET = f"s3cret{secrets.token_hex(8)}"
ENCODED = base64.b64encode(SECRET.encode()).decode()
LOUD = ("-v=10", "--vmodule=*=10")


def leaks(*texts: str | bytes) -> list[str]:
    """Places in which the secret comes up, in any dress that it wears on a wire."""
    found = []
    for text in texts:
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        found += [line[:300] for line in plain.splitlines() if SECRET in line or ENCODED in line]
    return found


def files_below(directory: Path, *, but: tuple[str, ...] = ()) -> Iterator[bytes]:
    """Contents of all files, with their names."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.relative_to(directory).parts[0].startswith(but):
            yield f"{path}\n".encode() + path.read_bytes()


def test_an_etcd_password_and_a_private_key_come_up_nowhere_whatever_goes_wrong() -> None:
    users = {"root": "r00t", "flannel": SECRET}
    with EtcdBed(1, tls=True, users=users, flags=LOUD) as bed:
        assert bed.process
        assert bed.etcd.certificates
        key = Path(bed.etcd.certificates.key)
        key.write_text(f"{SECRET}\n{key.read_text()}")  # text before the first line of PEM means nothing
        bed.process.send_signal(signal.SIGHUP)
        bed.until(lambda: "SIGHUP received" in bed.log(), "it reloads")
        for page in ("/readyz", "/healthz", "/", f"/{SECRET[:3]}"):
            assert leaks(http.get(bed.host.name, "127.0.0.1", HEALTH_PORT, page)[1]) == []
        control = bed.directory / "subnet.sock"
        for page in ("/status", "/audit"):
            assert leaks(asyncio.run(ask(control, page))[1]) == []
        argv = [*own_command()[:-1], str(Path(own_command()[-1]).with_name("flannelctl")), "leases"]
        ctl = subprocess.run(
            ["ip", "netns", "exec", bed.host.name, *argv, f"--etcd-endpoints={bed.etcd.endpoints}"],
            env={**os.environ, "FLANNELD_ETCD_USERNAME": "flannel", "FLANNELD_ETCD_PASSWORD": SECRET},
            capture_output=True,
        )
        assert leaks(ctl.stdout, ctl.stderr) == []
        bed.etcd.ctl("user", "delete", "flannel", user=bed.root)
        key.write_text(f"{SECRET} is no key")
        bed.process.send_signal(signal.SIGHUP)
        bed.until(lambda: "cannot be re-read" in bed.log(), "it says that the key is none")
        bed.etcd.members[0].kill()
        bed.etcd.members[0].start()
        bed.until(lambda: bed.readyz()[1] != "flanneld is ready", "it notices", 40.0)
        assert leaks(bed.readyz()[1], bed.log()) == []
        assert leaks(*files_below(bed.directory, but=("tls", "m0", "etcd"))) == []
        assert (
            leaks(bed.host.run("ip", "-d", "link"), bed.host.run("sh", "-c", "iptables-save; nft list ruleset")) == []
        )


def modes_below(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): stat.S_IMODE(path.lstat().st_mode) for path in directory.rglob("*")}


def test_what_only_the_daemon_needs_only_its_user_can_open() -> None:
    with EtcdBed(1) as bed:
        bed.until(lambda: list(bed.directory.glob("state/**/*.cache")), "the leases are remembered")
        modes = modes_below(bed.directory / "state")
        assert modes
        private = {name: mode for name, mode in modes.items() if name.endswith((".cache", ".lock"))}
        assert {mode & 0o077 for mode in private.values()} == {0}
        assert not [name for name, mode in modes.items() if mode & 0o022]
        assert stat.S_IMODE((bed.directory / "subnet.sock").stat().st_mode) == 0o600
        # CNI plugins of whatever user read this one (contract 4.3), and nobody writes it
        assert stat.S_IMODE((bed.directory / "subnet.env").stat().st_mode) == 0o644


KUBECONFIG = {
    "current-context": "c",
    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    "clusters": [{"name": "k", "cluster": {"server": "https://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {"token": SECRET}}],
}


def kubeconfig(**user: object) -> str:
    return json.dumps({**KUBECONFIG, "users": [{"name": "u", "user": user}]})


BAD: Mapping[str, tuple[list[str], dict[str, str], str]] = {
    # flags, variables, content of the file FILE
    "password by flag": ([f"--etcd-password={SECRET}", "--etcd-username=u"], {}, ""),
    "password by variable": (["--etcd-username=u"], {"FLANNELD_ETCD_PASSWORD": SECRET}, ""),
    "password without a user": ([f"--etcd-password={SECRET}"], {}, ""),
    "misspelt flag": ([f"--etcd-pasword={SECRET}"], {}, ""),
    "colon for an equals sign": ([f"--etcd-password:{SECRET}"], {}, ""),
    "misspelt variable": ([], {"FLANNELD_ETCD_PASWORD": SECRET}, ""),
    "user and password in the endpoint": ([f"--etcd-endpoints=https://u:{SECRET}@127.0.0.1:1"], {}, ""),
    "among other endpoints": ([f"--etcd-endpoints=http://127.0.0.1:1,http://u:{SECRET}@x"], {}, ""),
    "in an endpoint that is none": ([f"--etcd-endpoints=u:{SECRET}@x"], {}, ""),
    "endpoint by variable": ([], {"FLANNELD_ETCD_ENDPOINTS": f"https://u:{SECRET}@127.0.0.1:1"}, ""),
    "key that is none": (
        ["--etcd-endpoints=https://127.0.0.1:1", "--etcd-keyfile=FILE", "--etcd-certfile=FILE"],
        {},
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n",
    ),
    "CA that is none": (["--etcd-endpoints=https://127.0.0.1:1", "--etcd-cafile=FILE"], {}, SECRET),
    "API server with user": (["--kube-subnet-mgr", f"--kube-api-url=https://u:{SECRET}@127.0.0.1:1"], {}, ""),
    "token": (["--kube-subnet-mgr", "--kubeconfig-file=FILE"], {"NODE_NAME": "n"}, kubeconfig(token=SECRET)),
    "token of a wrong type": (["--kube-subnet-mgr", "--kubeconfig-file=FILE"], {}, kubeconfig(token=[SECRET])),
    "token with another line": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {"NODE_NAME": "n"},
        kubeconfig(token=f"{SECRET}\nmore"),
    ),
    "password that is no UTF-8": (["--etcd-username=u"], {"FLANNELD_ETCD_PASSWORD": f"{SECRET}\udcff"}, ""),
    "token beside bad YAML": (["--kube-subnet-mgr", "--kubeconfig-file=FILE"], {}, f"token: {SECRET}\n\t- : ["),
    "client key that is none": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {"NODE_NAME": "n"},
        kubeconfig(**{"client-key-data": ENCODED, "client-certificate-data": ENCODED}),
    ),
    "client key that is no base64": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {},
        kubeconfig(**{"client-key-data": f"!{SECRET}!", "client-certificate-data": ENCODED}),
    ),
    "basic authentication": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {},
        kubeconfig(username="u", password=SECRET),
    ),
    "a program for tokens": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {},
        kubeconfig(exec={"command": "x", "env": [{"name": "S", "value": SECRET}]}),
    ),
    "server with user in a kubeconfig": (
        ["--kube-subnet-mgr", "--kubeconfig-file=FILE"],
        {},
        json.dumps(
            {**KUBECONFIG, "clusters": [{"name": "k", "cluster": {"server": f"https://u:{SECRET}@127.0.0.1:1"}}]}
        ),
    ),
}


@pytest.fixture(scope="module")
def place() -> Iterator[Netns]:
    with Netns("fl-secret") as netns:
        netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        netns.run("ip", "link", "set", "eth0", "up")
        netns.run("ip", "link", "set", "eth1", "up")
        netns.run("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        yield netns


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("what", BAD)
def test_no_mistake_repeats_a_secret(place: Netns, tmp_path: Path, what: str, form: str) -> None:
    flags, variables, content = BAD[what]
    file = tmp_path / "file"
    file.write_text(content)
    argv = [
        *("ip", "netns", "exec", place.name, *own_command(), "--iface=eth0", f"--log-format={form}", *LOUD),
        *(f"--subnet-file={tmp_path / 'run/subnet.env'}", f"--state-dir={tmp_path / 'state'}"),
        *(flag.replace("FILE", str(file)) for flag in flags),
    ]
    output = tmp_path / "output"
    with output.open("wb") as sink:
        daemon = subprocess.Popen(argv, stdout=sink, stderr=sink, env={**os.environ, **variables})
        try:
            # either it ends, or it says for what it waits; the mistakes that it can wait out are told by then
            until(lambda: daemon.poll() is not None or b"waiting" in output.read_bytes(), "it says something")
        finally:
            daemon.kill()
            daemon.wait()
    assert output.read_bytes()
    assert leaks(output.read_bytes()) == []
    assert leaks(*files_below(tmp_path, but=("file",))) == []


def test_a_password_in_the_command_line_is_remarked_upon(place: Netns, tmp_path: Path) -> None:
    """Everybody on the host can read command lines; that is the operator's to change, and only if it is told."""
    argv = [*own_command(), f"--etcd-password={SECRET}", "--etcd-endpoints=x", f"--state-dir={tmp_path}"]
    done = subprocess.run(["ip", "netns", "exec", place.name, *argv], capture_output=True, text=True)
    assert "FLANNELD_ETCD_PASSWORD" in done.stderr
    assert leaks(done.stdout, done.stderr) == []


def test_a_token_for_kubernetes_comes_up_nowhere(make_lab: MakeLab) -> None:
    lab = make_lab(2, store="kube", daemon_flags=LOUD)
    lab.up()
    first = lab.host(1)
    first.daemon.signal(signal.SIGHUP)
    until(lambda: "SIGHUP received" in first.daemon.log(), "it reloads")
    texts = [content for content in files_below(first.directory) if b"kubeconfig\n" not in content[:300]]
    assert len(texts) > 3
    assert not [text[:100] for text in texts if FLANNEL_TOKEN.encode() in text]
    assert FLANNEL_TOKEN not in first.daemon.ask("/readyz")[1]
