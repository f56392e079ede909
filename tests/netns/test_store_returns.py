"""A host that started from its memory, and what the store says when it is back (failures F16, F17)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY
from tests.netns.test_cold_start import power_cut, remembers_all, subnet_of
from tests.netns.test_fencing_lab import THIEF, key_of, status
from tests.support.live import assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]


def configure(lab: Lab, **changes: Any) -> None:
    """Change the network configuration in etcd."""
    lab.etcd.put(CONFIG_KEY, json.dumps({**json.loads(lab.etcd.get(CONFIG_KEY) or "{}"), **changes}))


def start_from_memory(lab: Lab, *hosts: Host) -> None:
    """Hosts that are down come up while etcd is away."""
    lab.etcd.stop_member(1)
    for host in hosts:
        host.daemon.start()
    for host in hosts:
        host.daemon.wait_ready()
        assert "starting from memory" in host.daemon.log()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"Network": "10.99.0.0/16"}, "FLANNEL_NETWORK=10.99.0.0/16"),
        ({"SubnetLen": 25}, "/25"),
        ({"Backend": {"Type": "host-gw"}}, "FLANNEL_MTU=1500"),
    ],
    ids=["network", "length", "backend"],
)
def test_a_configuration_that_became_another_while_the_host_was_down_is_taken_when_the_store_is_back(
    make_lab: MakeLab, changes: Mapping[str, Any], shown: str
) -> None:
    with make_lab(2) as lab:
        until(lambda: remembers_all(lab), "every host remembers both leases")
        for host in lab.hosts:
            power_cut(host)
        configure(lab, **changes)
        start_from_memory(lab, *lab.hosts)
        pids = [host.daemon.pid for host in lab.hosts]
        lab.etcd.start()
        until(lambda: all(shown in host.daemon.subnet_file.read_text() for host in lab.hosts), "the new configuration")
        for host in lab.hosts:
            host.daemon.wait_ready()
            assert host.ip("link", "del", "cni0") is not None  # its containers are restarted
            host.attach_pod()
        assert_all_pods_connected(lab)
        assert [host.daemon.pid for host in lab.hosts] == pids
        assert all(host.daemon.log().count("beginning anew") == 1 for host in lab.hosts)
        until(lambda: len(lab.etcd.items(SUBNETS_KEY)) == 2, "no lease of the former network")


def test_a_setting_that_can_change_live_is_taken_when_the_store_is_back(make_lab: MakeLab) -> None:
    with make_lab(1) as lab:
        host = lab.host(1)
        until(lambda: remembers_all(lab), "it remembers its lease")
        power_cut(host)
        configure(lab, EnableNFTables=True)
        start_from_memory(lab, host)
        lab.etcd.start()
        until(lambda: "flannel-ipv4" in host.run("nft", "list", "tables").stdout, "rules by the other tool")
        assert "beginning anew" not in host.daemon.log()


@pytest.mark.parametrize("raw", ["{", '{"Network":"10.244.0.0/16","Backend":{"Type":"warp"}}'])
def test_a_configuration_that_cannot_be_taken_leaves_the_host_with_its_memory_and_is_shown(
    make_lab: MakeLab, raw: str
) -> None:
    with make_lab(1) as lab:
        host = lab.host(1)
        subnet = subnet_of(host)
        until(lambda: remembers_all(lab), "it remembers its lease")
        power_cut(host)
        good = lab.etcd.get(CONFIG_KEY) or ""
        lab.etcd.put(CONFIG_KEY, raw)
        start_from_memory(lab, host)
        lab.etcd.start()
        until(lambda: "remembered lease is confirmed" in host.daemon.log(), "the lease is claimed")
        until(lambda: "configuration" in host.daemon.ask("/readyz")[1], "it is shown that the old one is kept")
        assert host.daemon.ask("/readyz")[0] == 200
        assert subnet_of(host) == subnet
        lab.etcd.put(CONFIG_KEY, good)
        until(lambda: host.daemon.ask("/readyz") == (200, "flanneld is ready"), "nothing to remark any more")


def test_leases_that_all_hosts_lost_are_back_though_the_configuration_is_missing_for_a_while(make_lab: MakeLab) -> None:
    with make_lab(2) as lab:
        subnets = [subnet_of(host) for host in lab.hosts]
        config = lab.etcd.get(CONFIG_KEY) or ""
        lab.etcd.delete(CONFIG_KEY)
        for key in lab.etcd.items(SUBNETS_KEY):
            lab.etcd.delete(key)
        until(lambda: len(lab.etcd.items(SUBNETS_KEY)) == 2, "both leases are back")
        lab.etcd.put(CONFIG_KEY, config)
        assert [subnet_of(host) for host in lab.hosts] == subnets
        assert_all_pods_connected(lab)


def test_a_node_made_anew_with_another_pod_cidr_while_its_host_was_down_gives_that_subnet(make_lab: MakeLab) -> None:
    """The Kubernetes store has no quarantine: the control plane gives subnets, and never one to two nodes."""
    lab = make_lab(2, store="kube")
    lab.up()
    host, peer = lab.hosts
    until(lambda: remembers_all(lab), "every host remembers both leases")
    power_cut(host)
    lab.kube.delete_node(1)
    lab.kube.add_node(1, ["10.244.77.0/24"])
    lab.kube.stop()
    host.daemon.start()
    host.daemon.wait_ready()
    assert subnet_of(host) == "10.244.1.0/24", "nobody could tell it otherwise yet"
    lab.kube.start()
    until(lambda: subnet_of(host) == "10.244.77.0/24", "the node's subnet in subnet.env")
    host.ip("link", "del", "cni0")
    host.attach_pod()
    host.daemon.wait_ready()
    assert "restart the containers of this host" in host.daemon.log()
    until(lambda: "10.244.77.0/24" in peer.ip("route"), "the peer routes to it")
    assert_all_pods_connected(lab)


class Process:
    """What a process has of the system."""

    def __init__(self, pid: int) -> None:
        proc = Path(f"/proc/{pid}")
        self.files = sorted(os.readlink(link).partition("[")[0] for link in (proc / "fd").iterdir())
        self.threads = len(list((proc / "task").iterdir()))
        self.environment = sorted((proc / "environ").read_bytes().split(b"\0"))
        self.words = (proc / "cmdline").read_bytes()
        self.children = (proc / "task" / str(pid) / "children").read_text()


def test_a_host_that_has_to_move_again_and_again_leaves_nothing_behind(make_lab: MakeLab) -> None:
    """It begins anew in its own process each time."""
    with make_lab(1) as lab:
        host = lab.host(1)
        pid = host.daemon.pid
        assert pid
        seen: list[Process] = []
        for _ in range(4):
            former, key = subnet_of(host), key_of(lab, host)
            value = lab.etcd.items(SUBNETS_KEY)[key]
            host.daemon.signal(signal.SIGSTOP)
            lab.etcd.delete(key)
            lab.etcd.put(key, json.dumps({**json.loads(value), **THIEF}))
            host.daemon.signal(signal.SIGCONT)
            until(lambda before=former: subnet_of(host) not in ("", before), "another subnet")  # type: ignore[misc]
            until(lambda: status(host).get("state") in ("ready", "degraded"), "it works")
            seen.append(Process(pid))
        first, last = seen[0], seen[-1]
        assert last.files == first.files
        assert last.threads <= first.threads + 1, "pools grow as needed"
        assert (last.environment, last.words, last.children) == (first.environment, first.words, first.children)
        links = [link["ifname"] for link in json.loads(host.run("ip", "-j", "link", "show").stdout)]
        assert [name for name in links if name.startswith("flannel")] == ["flannel.1"]
        assert len([key for key, value in lab.etcd.items(SUBNETS_KEY).items() if THIEF["FlanneldID"] not in value]) == 1


@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_state_directory_on_a_disk_that_takes_nothing_is_told_and_the_host_works(make_lab: MakeLab, how: str) -> None:
    """A memory from before still counts on a read-only disk: reading is all that a start without the store needs."""
    lab = make_lab(1)
    lab.up()
    host = lab.host(1)
    until(lambda: remembers_all(lab), "it remembers its lease")
    subnet, disk = subnet_of(host), host.daemon.state_dir
    power_cut(host)
    shutil.copytree(disk, lab.directory / "kept")
    mount(disk, "size=64k")
    try:
        shutil.copytree(lab.directory / "kept", disk, dirs_exist_ok=True)
        if how == "full":
            fill(disk / "ballast")
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        start_from_memory(lab, host)
        assert subnet_of(host) == subnet
        lab.etcd.start()
        until(lambda: "cannot be remembered" in host.daemon.log(), "it is told")
        assert host.daemon.is_ready()
        assert host.daemon.log().count("cannot be remembered") == 1
    finally:
        host.daemon.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def mount(at: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "fd-disk", str(at)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return
