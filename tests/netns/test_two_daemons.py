"""Two daemons on one host: of two networks they leave each other alone, of one the second is refused (failures F21)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.daemon import own_command
from flanneld.lab.node import Host
from flanneld.lab.probe import egress_source
from flanneld.lab.spec import OUTSIDE
from flanneld.model.addr import Family
from tests.support.live import assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
SECOND = "/second/network"
POD = "10.66.7.9"
TOOLS = ["iptables", "nftables"]


class Second:
    """The daemon of a second network on a host of the lab."""

    def __init__(self, lab: Lab, host: Host, *flags: str) -> None:
        self.host = host
        self.subnet_file = host.directory / "second.env"
        self.log_file = host.directory / "second.log"
        self._argv = host.command(
            *own_command(),
            f"--etcd-endpoints={lab.etcd.endpoints}",
            f"--etcd-prefix={SECOND}",
            "--iface=eth0",
            "--ip-masq",
            f"--subnet-file={self.subnet_file}",
            f"--state-dir={host.daemon.state_dir}",
            "--healthz-port=8470",
            *flags,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self._argv, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def log(self) -> str:
        return self.log_file.read_text()

    def is_ready(self) -> bool:
        return " ready subnet=" in self.log()


def configure(lab: Lab, *, nftables: bool) -> None:
    network = {"Network": "10.66.0.0/16", "SubnetMin": "10.66.7.0", "SubnetMax": "10.66.7.0"}
    backend = {"Type": "vxlan", "VNI": 2}
    lab.etcd.put(f"{SECOND}/config", json.dumps({**network, "EnableNFTables": nftables, "Backend": backend}))


@pytest.fixture
def started() -> Iterator[list[Second]]:
    daemons: list[Second] = []
    yield daemons
    for daemon in daemons:
        daemon.stop()


def masquerades_second(lab: Lab) -> bool:
    """Whether what a pod of the second network sends comes from the host; the pod is an address on the host."""
    host = lab.host(1)
    host.ip("addr", "replace", f"{POD}/32", "dev", "lo")
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        f"s.bind(('{POD}', 0)); s.sendto(b'x', ('{OUTSIDE[Family.V4]}', 8473))"
    )
    receive = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2);"
        "s.bind(('0.0.0.0', 8473)); print('listening', flush=True); print(s.recvfrom(9)[1][0])"
    )
    argv = lab.outside.command("python3", "-c", receive)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as receiver:
        assert receiver.stdout
        assert receiver.stdout.readline() == "listening\n"
        host.run("python3", "-c", script)
        return receiver.communicate(timeout=10)[0].strip() == host.address()


def rules(host: Host) -> str:
    """All rules of either tool, counters and handles left out, in an order of their own."""
    lines = host.run("iptables-save").stdout.splitlines() + host.run("nft", "list", "ruleset").stdout.splitlines()
    return "\n".join(
        sorted(re.sub(r"\[\d+:\d+\]|counter packets \d+ bytes \d+ ", "", line) for line in lines if line[:1] != "#")
    )


def names_aside(text: str) -> list[str]:
    return sorted(re.sub(r"(FLANNEL-POSTRTG|FLANNEL-FWD|flannel-ipv[46])(-[0-9a-f]{8})?", r"\1", text).splitlines())


@pytest.mark.parametrize("tool", TOOLS)
def test_rules_of_both_networks_stand_side_by_side_and_stay(
    make_lab: MakeLab, tool: str, started: list[Second]
) -> None:
    lab = make_lab(2, config={"EnableNFTables": tool == "nftables"})
    lab.up()
    configure(lab, nftables=tool == "nftables")
    host, second = lab.host(1), Second(lab, lab.host(1))
    started.append(second)
    second.start()
    until(second.is_ready, "the second network's daemon is ready")
    until(lambda: masquerades_second(lab), "the second network is masqueraded")
    assert_all_pods_connected(lab)

    before = rules(host)
    for flush in (["iptables", "-t", "nat", "-F"], ["nft", "flush", "ruleset"]):
        host.run(*flush)
        until(lambda: egress_source(lab, 1, Family.V4) == host.address(), "the first network's rules are back")
        until(lambda: masquerades_second(lab), "the second network's rules are back")
        assert_all_pods_connected(lab)
    # which of the two has the plain name may have changed, what they say has not
    until(lambda: names_aside(rules(host)) == names_aside(before), "and nothing else is there")

    assert "again and again" not in host.daemon.log() + second.log(), "they fight"
    told = host.daemon.log(), second.log()
    host.daemon.stop()
    host.daemon.start()
    host.daemon.wait_ready()
    second.stop()
    second.start()
    until(lambda: second.log().count(" ready subnet=") == 2, "the second one is ready again")
    assert masquerades_second(lab)
    assert_all_pods_connected(lab)
    news = host.daemon.log().removeprefix(told[0]) + second.log().removeprefix(told[1])
    assert "chain" not in news, "a restart changes no rule"
    assert "nftables table" not in news


@pytest.mark.parametrize("tool", TOOLS)
def test_one_network_goes_and_the_others_rules_stay(make_lab: MakeLab, tool: str, started: list[Second]) -> None:
    lab = make_lab(1, config={"EnableNFTables": tool == "nftables"})
    lab.up()
    host, second = lab.host(1), Second(lab, lab.host(1))
    before = rules(host)
    configure(lab, nftables=tool == "nftables")
    started.append(second)
    second.start()
    until(second.is_ready, "the second network's daemon is ready")
    second.stop()
    cleanup(second)
    assert rules(host) == before

    second.start()
    until(lambda: second.log().count(" ready subnet=") == 2, "the second one is ready again")
    host.daemon.stop()
    host.run(*CLEANUP, f"--subnet-file={host.daemon.subnet_file}", f"--state-dir={host.daemon.state_dir}")
    assert "10.244." not in rules(host)
    until(lambda: masquerades_second(lab), "the second network still works")
    second.stop()
    cleanup(second)
    assert "flannel" not in rules(host).lower()


CLEANUP = (str(Path(own_command()[0]).with_name("flannelctl")), "cleanup", "--yes")


def cleanup(second: Second) -> None:
    second.host.run(
        *CLEANUP,
        f"--etcd-prefix={SECOND}",
        f"--subnet-file={second.subnet_file}",
        f"--state-dir={second.host.daemon.state_dir}",
    )


def test_networks_with_different_tools_leave_each_other_alone(make_lab: MakeLab, started: list[Second]) -> None:
    """Each removes what the other tool left of its own network (contract 8.20), not of others."""
    lab = make_lab(1)
    lab.up()
    configure(lab, nftables=True)
    second = Second(lab, lab.host(1))
    started.append(second)
    second.start()
    until(second.is_ready, "the second network's daemon is ready")
    until(lambda: masquerades_second(lab), "the second network is masqueraded")
    assert egress_source(lab, 1, Family.V4) == lab.host(1).address()


@pytest.mark.parametrize("own_directory", [False, True], ids=["same state directory", "another state directory"])
def test_second_daemon_of_a_network_is_refused_with_the_pid_of_the_first(
    make_lab: MakeLab, own_directory: bool
) -> None:
    lab = make_lab(2)
    lab.up()
    host = lab.host(1)
    state_dir = host.directory / "elsewhere" if own_directory else host.daemon.state_dir
    argv = [*own_command(), *host.daemon.flags(), f"--state-dir={state_dir}", "--healthz-port=0"]
    done = host.run(*argv, check=False)
    assert done.returncode == 1
    said = [line for line in (done.stdout + done.stderr).splitlines() if "another flanneld" in line]
    assert len(said) == 1
    assert f"another flanneld (pid {host.daemon.pid}) serves the network /coreos.com/network on this host" in said[0]
    assert_all_pods_connected(lab)
    assert host.daemon.is_ready()


def test_second_daemon_with_the_firsts_subnet_file_or_device_is_refused(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up()
    host = lab.host(1)
    configure(lab, nftables=False)
    same_file = Second(lab, host, f"--subnet-file={host.daemon.subnet_file}")
    lab.etcd.put(f"{SECOND}/config", '{"Network":"10.66.0.0/16","Backend":{"Type":"vxlan"}}')
    for second, sentence in (
        (same_file, f"(pid {host.daemon.pid}) holds the subnet file {host.daemon.subnet_file}"),
        (Second(lab, host), 'device flannel.1 belongs to "flanneld /coreos.com/network"'),
    ):
        second.start()
        assert second.process
        assert second.process.wait(20) == 1
        assert sentence in second.log()
    assert_all_pods_connected(lab)
    assert host.daemon.is_ready()
