"""deploy/README.md, section 2: its commands as they stand there, on three machines that are booted for it.

The machines have no way to Debian's archive, PyPI or a registry. So `apt-get install` finds the packages installed, pip
takes wheels from a directory, Docker and containerd have the image; the one line that would pull it is left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import debian, readme
from tests.support.netns import Netns
from tests.support.nspawn import machines
from tests.support.systemd_host import REPOSITORY, wheels
from tests.support.tell import Tell

pytestmark = [
    pytest.mark.needs("systemd-nspawn", "debian", "vxlan"),
    pytest.mark.timeout(400),  # the first run may have to get a Debian and the wheels
]

PACKAGES = [
    *("systemd", "systemd-sysv", "udev", "iproute2", "iputils-ping", "procps", "openssh-server", "openssh-client"),
    *("openssl", "etcd-server", "etcd-client", "python3-venv", "iptables"),
    *("docker.io", "containerd", "containernetworking-plugins", "busybox-static"),
]
ADDRESSES = {"etcd": "192.0.2.10", "docker": "192.0.2.11", "containerd": "192.0.2.12"}
"""The machines by the role that the page gives them, and their addresses there."""
PULL = "ctr image pull docker.io/library/busybox:latest\n"
IMAGE = """
mkdir -p /root/image/bin
cp /bin/busybox /root/image/bin/
for name in sleep ip ping; do ln -s busybox /root/image/bin/$name; done
tar -C /root/image -c . | docker import -c 'CMD ["sh"]' - busybox:latest
docker save busybox:latest | ctr image import -
"""
SSH = "Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
CLIENT = "export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=https://192.0.2.10:2379 ETCDCTL_CACERT=/etc/flanneld/ca.pem\n"
AS_FLANNELD = f"{CLIENT}export ETCDCTL_CERT=/etc/flanneld/flanneld.pem ETCDCTL_KEY=/etc/flanneld/flanneld-key.pem\n"
# What flanneld's key could be misused for: certifying an administrator.
FORGE = f"""{CLIENT}cd /etc/flanneld
openssl req -x509 -CA flanneld.pem -CAkey flanneld-key.pem -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 9 \\
    -subj /CN=root -addext extendedKeyUsage=clientAuth -keyout /tmp/root-key.pem -out /tmp/root.pem 2>/dev/null
cat flanneld.pem >>/tmp/root.pem
timeout 5 etcdctl --cert=/tmp/root.pem --key=/tmp/root-key.pem user list 2>&1 ||
openssl verify -purpose sslclient -CAfile ca.pem -untrusted flanneld.pem /tmp/root.pem 2>&1
"""


class Site:
    """Three machines on one segment, with what their operator had before opening the page."""

    def __init__(self, folder: Path, wheel_folder: Path, stack: ExitStack) -> None:
        binds = {wheel_folder.parent / "tree": "/src", wheel_folder: "/wheels"}
        self.machines = stack.enter_context(machines(folder / "machines", ADDRESSES, PACKAGES, binds))
        self._segment = stack.enter_context(Netns("flt-readme"))
        self._segment.run("ip", "link", "add", "segment", "up", "type", "bridge")
        self._segment.run("ip", "addr", "add", "192.0.2.1/24", "dev", "segment")
        key = folder / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        for role, address in ADDRESSES.items():
            self._boot(role, address, key)

    def _boot(self, role: str, address: str, key: Path) -> None:
        host = self.machines[role]
        (host.root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        ssh = host.root / "root/.ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
        if role == "etcd":
            shutil.copy(key, ssh)
            (ssh / "config").write_text(SSH)
        host.boot()
        host.delegate()
        host.plug(self._segment, "segment", role)
        host.sh(f"ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1")

    def run(self, role: str, commands: str, check: bool = True) -> str:
        """Run commands as root, in a clone of this repository; returns what they wrote."""
        script = f"cd /src\n{commands}"
        return self.machines[role].run("bash", "-euo", "pipefail", "-c", script, check=check)


class Page:
    """The page's commands for each role, and what they wrote when they were run."""

    def __init__(self, path: Path) -> None:
        self._commands: dict[str, list[str]] = {}
        for role, commands in readme.blocks(path):
            self._commands.setdefault(role, []).append(commands)
        self.said: dict[str, str] = {}
        self.lines, self.took_s = 0, 0.0

    def follow(self, site: Site) -> None:
        """Do what it says, on each machine in a shell that stays open from step to step."""
        began = time.monotonic()
        self.lines = sum(commands.count("\n") for given in self._commands.values() for commands in given)
        (docker, self.docker_ping), (containerd, self.containerd_ping) = (
            self._commands[role] for role in ("docker", "containerd")
        )
        self.said["etcd"] = site.run("etcd", "".join(self._commands["etcd"]))
        for role in ("docker", "containerd"):
            self.said[f"flanneld, {role}"] = site.run(role, "".join(self._commands["hosts"]))
            site.run(role, IMAGE)
        assert PULL in containerd
        self.said["docker"] = site.run("docker", docker)
        self.said["containerd"] = site.run("containerd", containerd.replace(PULL, ""))
        self.took_s = time.monotonic() - began


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("readme")
    try:
        debian.tarball(PACKAGES)
    except debian.NotMadeError as error:
        pytest.skip(str(error))
    made = wheels(folder, "3.11")
    shutil.copytree(REPOSITORY / "deploy", folder / "tree/deploy")
    with ExitStack() as stack:
        yield Site(folder, made, stack)


@pytest.fixture(scope="module")
def page(site: Site) -> Page:
    page = Page(REPOSITORY / "deploy/README.md")
    page.follow(site)
    return page


def test_containers_of_two_hosts_reach_each_other_when_the_page_was_followed(
    site: Site, page: Page, tell: Tell
) -> None:
    docker = page.said["docker"].split()[-1]
    containerd = page.said["containerd"].split("inet ")[1].partition("/")[0]
    # not "0% packet loss", as tests of the daemon claim: all tests that run share the kernel's table of neighbours
    assert f"64 bytes from {containerd}" in site.run("docker", page.docker_ping.replace("ADDRESS", containerd))
    assert f"64 bytes from {docker}" in site.run("containerd", page.containerd_ping.replace("ADDRESS", docker))
    tell(f"{page.lines} lines of commands run in {page.took_s:.0f} s on {', '.join(ADDRESSES.values())}")
    tell(f"container {docker} of Docker and container {containerd} of containerd reached each other")


def test_hosts_that_were_set_up_by_the_page_have_nothing_to_warn_of(site: Site, page: Page) -> None:
    assert "warn" not in page.said["etcd"]
    assert "1 lease, ours included" in page.said["flanneld, docker"]
    assert "2 leases, ours included" in page.said["flanneld, containerd"]
    for role in ("docker", "containerd"):
        assert re.search("^state +ready$", page.said[f"flanneld, {role}"], re.MULTILINE)
        journal = site.run(role, "journalctl -u flanneld -o cat").splitlines()
        # a container cannot load modules, which is this test's, not the page's
        assert [line for line in journal if line[:1] in "WE" and "br_netfilter" not in line] == []


def test_certificate_of_flanneld_opens_what_it_needs_in_etcd_and_no_more(site: Site, page: Page, tell: Tell) -> None:
    def denied(command: str) -> bool:
        return "permission denied" in site.run("docker", f"{AS_FLANNELD}etcdctl {command} 2>&1", check=False)

    assert "10.5.0.0/16" in site.run("docker", f"{AS_FLANNELD}etcdctl get /coreos.com/network/config")
    assert denied("put /coreos.com/network/config {}")
    assert denied("get /coreos.com/other")
    assert denied("get --prefix /")
    assert denied("user add intruder:secret")
    tell("by flanneld's certificate: configuration read, not written; nothing beside the prefix; no users")


def test_certificate_of_flanneld_cannot_certify_an_administrator(site: Site, page: Page) -> None:
    said = site.run("docker", FORGE, check=False)
    assert "root" not in said.split()  # the list of users
    assert "invalid CA certificate" in said


def test_etcd_does_not_talk_to_a_client_without_certificate(site: Site, page: Page) -> None:
    said = site.run("docker", f"{CLIENT}etcdctl --command-timeout=2s get --prefix / 2>&1", check=False)
    assert "bad certificate" in said or "certificate required" in said or "deadline exceeded" in said, said
