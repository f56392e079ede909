"""A container runtime of the world takes the CNI configuration that flanneld writes: podman, on a host of the lab.

::

    h1 (namespace)                               h2
      flanneld ── net.d/10-flannel.conflist        flanneld
      podman run ── plugins ── cni0 ─ container    cni0 ─ pod2

containerd and CRI-O read the same directory with the same library (libcni), but need a whole machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.netns import NETNS_DIR
from flanneld.lab.node import Host
from tests.support.programs import storage
from tests.support.tell import Tell

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("vxlan", "iptables", "cni", "podman"),
]

# not `ip netns exec`: its own /sys has no cgroups, without which no runtime starts anything
ENTER = 'mount --bind "$0" /var/lib && exec "$@"'
# a container may have no more than we have, and cgroups are often not ours to make
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--privileged")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The file system of a container that has this machine's programs."""
    root = tmp_path / "root"
    for name in ("usr", "proc", "sys", "dev", "etc", "tmp", "run"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    return root


def podman(host: Host, stores: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run podman on a host of the lab, with CNI as its network backend and a /var/lib of its own."""
    var = host.directory / "podman"
    var.mkdir(exist_ok=True)
    enter = [f"--net={NETNS_DIR / host.netns}", "unshare", "--mount", "sh", "-c", ENTER, str(var)]
    conf = ["--network-backend=cni", f"--network-config-dir={host.daemon.cni_conf_dir}"]
    argv = ["nsenter", *enter, "podman", *stores, "--runtime=runc", "--cgroup-manager=cgroupfs", *conf, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=50, stdin=subprocess.DEVNULL)


def test_a_container_of_podman_is_connected_by_the_configuration_that_flanneld_writes(
    make_lab: Callable[..., Lab], root: Path, tell: Tell
) -> None:
    lab = make_lab(2, cni=True)
    lab.up()
    host, peer = lab.hosts
    stores = storage(host.directory)  # a short name: podman refuses more than 50 characters
    known = podman(host, stores, "network", "inspect", "cbr0", "--format", "{{.NetworkInterface}}")
    if "not enabled in this build" in known.stderr:  # podman 5
        pytest.skip(f"this machine lacks a podman with CNI: {known.stderr.strip()}")
    assert (known.stdout.strip(), known.stderr) == ("cni0", "")

    script = f"ip -4 -o addr show eth0; ip link show eth0; ping -c 2 -W 2 {peer.pod_address()}"
    container = ["--rm", "--network=cbr0", *LIMITS, "--volume=/usr:/usr:ro", "--rootfs", str(root)]
    done = podman(host, stores, "run", *container, "sh", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 received, 0% packet loss" in done.stdout
    assert f"mtu {host.subnet_env()['FLANNEL_MTU']}" in done.stdout
    address = done.stdout.split()[3]
    assert address.startswith(host.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0])
    assert not list(host.directory.glob(f"podman/cni/networks/cbr0/{address.partition('/')[0]}"))
    tell(f"podman: a container on h1 got {address} from 10-flannel.conflist and reached pod2 with its first packet")
