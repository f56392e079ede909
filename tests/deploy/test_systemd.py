"""flanneld as a service of systemd, on a Debian that is booted for it: what deploy/systemd/ promises.

One machine for all tests, in their order: it is installed in the first and uninstalled in the last.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

import pytest

from tests.support import debian
from tests.support.nspawn import machine
from tests.support.systemd_host import (
    ADDRESS,
    GATEWAY,
    NEIGHBOUR,
    NEIGHBOUR_POD,
    NEIGHBOUR_SUBNET,
    PACKAGES,
    SUBNET,
    SystemdHost,
    binds,
    lost,
    wheels,
)
from tests.support.tell import Tell
from tests.support.wait import until

pytestmark = [
    pytest.mark.needs("systemd-nspawn", "debian", "etcd", "vxlan"),
    pytest.mark.timeout(400),  # the first may have to get a Debian and the wheels
]

MAX_EXPOSURE = 2.5
SUBNET_ENV = f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={GATEWAY}/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
CONTAINER = """
ip netns add container
ip link add veth9 type veth peer name eth0 netns container
ip link set veth9 master docker0 up
ip -n container addr add 10.5.1.2/24 dev eth0
ip -n container link set eth0 up
ip -n container route add default via 10.5.1.1
"""
FINGERPRINT = "find /opt/flanneld /etc -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
# For networkd: one card as an operator configures it, and a file for everything else, as many hosts have one.
CARD = f"[Match]\nName=eth0\n[Network]\nLinkLocalAddressing=no\nAddress={ADDRESS}/24\nGateway={NEIGHBOUR}\n"
EVERYTHING = "[Match]\nName=*\n[Network]\nLinkLocalAddressing=no\nAddress=198.51.100.99/24\n"
# Ethernet devices with carrier, which address programs take for network cards.
VETH_PAIRS = """
for name in flannel.9 cni9 veth9 other0; do
    ip link add $name type veth peer name peer-$name; ip link set $name up; ip link set peer-$name up
done
"""


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdHost]:
    folder = tmp_path_factory.mktemp("systemd")
    made = wheels(folder, debian_python())
    with machine(folder, PACKAGES, binds(made)) as there:
        host = SystemdHost(there)
        host.prepare()
        there.boot()
        yield host


@pytest.fixture(scope="module")
def installed(booted: SystemdHost) -> SystemdHost:
    booted.install("/wheels/flanneld-*.whl")
    return booted


@pytest.fixture
def host(installed: SystemdHost) -> Iterator[SystemdHost]:
    yield installed
    installed.reset()


def debian_python() -> str:
    return {"bookworm": "3.11", "trixie": "3.13"}[debian.SUITE]


def test_installing_starts_nothing_and_says_what_it_wrote(booted: SystemdHost, tell: Tell) -> None:
    began = time.monotonic()
    said = booted.install("/wheels/flanneld-*.whl")
    tell(f"installed from the wheel in {time.monotonic() - began:.1f} s")
    assert "wrote /etc/systemd/system/flanneld.service" in said
    assert booted.show("ActiveState") == "inactive"
    assert booted.show("UnitFileState") == "disabled"
    assert booted.run("/opt/flanneld/bin/flanneld", "--version").strip()
    assert booted.run("stat", "-c", "%a", "/etc/flanneld/flanneld.env").strip() == "600"
    assert booted.sh("find /opt/flanneld/bin/../lib -name 'app.*.pyc' | head -n 1").strip()  # compiled
    tell(f"it takes {booted.sh('du -sm /opt/flanneld | cut -f1').strip()} MB in /opt/flanneld")


def test_installing_again_keeps_what_was_edited_and_changes_nothing_else(host: SystemdHost, tell: Tell) -> None:
    host.sh("echo FLANNELD_V=1 >>/etc/flanneld/flanneld.env")
    before = host.sh(FINGERPRINT)
    said = host.install("/wheels/flanneld-*.whl")
    assert said.splitlines() == [
        "flanneld: kept /etc/flanneld/flanneld.env, which was edited (ours is /src/deploy/systemd/flanneld.env)",
        "flanneld: to start it: edit /etc/flanneld/flanneld.env, then /src/deploy/systemd/install.sh --start",
    ]
    assert host.sh(FINGERPRINT) == before
    host.sh("sed -i /FLANNELD_V=/d /etc/flanneld/flanneld.env")
    tell("an edited environment file outlived the second installation")


def test_another_flanneld_of_that_name_is_not_taken_for_ours(host: SystemdHost, tell: Tell) -> None:
    unit = "/etc/systemd/system/flanneld.service"
    host.sh(f"cp {unit} /root; sed -i s,^ExecStart=.*,ExecStart=/usr/bin/flanneld.go, {unit}")
    said = host.machine.sh("/src/deploy/systemd/install.sh /wheels/flanneld-*.whl 2>&1", check=False)
    host.sh(f"mv /root/flanneld.service {unit}; systemctl daemon-reload")
    assert said.startswith(f"flanneld: {unit} is another flanneld's: stop that and rename it")
    tell(said.strip())


def test_unit_is_valid_and_little_exposed(host: SystemdHost, tell: Tell) -> None:
    assert host.run("systemd-analyze", "verify", "/etc/systemd/system/flanneld.service") == ""
    host.run("systemd-analyze", "security", f"--threshold={MAX_EXPOSURE * 10:g}", "flanneld")
    tell(host.run("systemd-analyze", "security", "--no-pager", "flanneld").splitlines()[-1].lstrip("→ "))


@pytest.mark.parametrize(
    ("backend", "keys", "iptables"),
    [
        ("vxlan", {}, "nft"),
        ("vxlan", {}, "legacy"),
        ("vxlan", {"EnableNFTables": True, "EnableIPv6": True, "IPv6Network": "2001:db8:5::/56"}, "nft"),
        ("host-gw", {}, "nft"),
        ("udp", {}, "nft"),
    ],
    ids=["vxlan", "vxlan, iptables-legacy", "vxlan, IPv6, nftables", "host-gw", "udp"],
)
def test_backend_gets_ready_under_the_hardening(
    host: SystemdHost, tell: Tell, backend: str, keys: dict[str, object], iptables: str
) -> None:
    for tool in ("iptables", "ip6tables"):
        host.run("update-alternatives", "--set", tool, f"/usr/sbin/{tool}-{iptables}")
    host.configure(backend, keys)
    began = time.monotonic()
    host.start()
    tell(f"started in {time.monotonic() - began:.2f} s: {host.show('StatusText')}")
    assert host.show("StatusText").startswith(f"ready subnet={SUBNET}")
    assert host.run("cat", "/run/flannel/subnet.env").startswith("FLANNEL_NETWORK=10.5.0.0/16\n")
    warned = [line for line in host.journal().splitlines() if line[:1] in "WE" and "forwarding is off" not in line]
    assert [line for line in warned if "bridge of do not pass" not in line and "of one bridge" not in line] == []
    if backend != "udp":
        host.connect_neighbour(backend)
        assert lost(host.ping()) == "0%"
        tell("pinged the neighbour's container: nothing lost")


@pytest.mark.needs("udp_kernel")
def test_udp_moves_packets_in_the_kernel(host: SystemdHost, tell: Tell) -> None:
    host.configure("udp")
    host.start()
    assert "udp data path kernel" in host.show("StatusText")
    tell(host.show("StatusText"))


def test_what_it_may_do_is_bounded(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    status = dict(line.split(":\t", 1) for line in host.status_file().splitlines())
    assert host.capabilities() == ["net_admin", "net_raw", "bpf"]
    assert host.show("WatchdogUSec") == "30s"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert host.show("LimitCORE") == "0"
    inside = shlex.join(["nsenter", f"--target={host.pid}", "--mount"])
    assert "Read-only file system" in host.sh(f"{inside} touch /etc/x /usr/x /run/x 2>&1 || true")
    assert "Read-only file system" in host.sh(f"{inside} sh -c 'echo 0 >/proc/sys/kernel/dmesg_restrict' 2>&1 || true")
    assert host.sh(f"{inside} ls /home /root").split() == ["/home:", "/root:"]
    tell(
        "capabilities net_admin, net_raw, bpf; no new privileges; seccomp; /etc, /usr, /run, /proc/sys/kernel read-only"
    )


async def test_killed_daemon_is_restarted_and_no_packet_is_lost(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    host.connect_neighbour("vxlan")
    file = host.run("stat", "-c", "%i", "/run/flannel/subnet.env")
    pid, ping = host.pid, host.ping(200)
    assert ping.stdout
    ping.stdout.readline()  # it has begun
    host.run("kill", "-KILL", str(pid))
    await until(lambda: host.show("SubState") == "auto-restart")
    assert host.run("cat", "/run/flannel/subnet.env") == SUBNET_ENV
    await host.ready(not_pid=pid)
    assert host.show("NRestarts") == "1"
    assert host.run("stat", "-c", "%i", "/run/flannel/subnet.env") == file
    assert lost(ping) == "0%"
    tell("killed, restarted by systemd, ready again; 200 pings across it, none lost; subnet.env untouched")


async def test_stopped_process_is_noticed_by_the_watchdog_and_replaced(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan", drop_in="WatchdogSec=1\nRestartSec=0")
    host.start()
    pid = host.pid
    host.run("kill", "-STOP", str(pid))
    began = time.monotonic()
    await host.ready(not_pid=pid)
    assert "Watchdog timeout" in host.journal()
    tell(f"stopped by SIGSTOP under WatchdogSec=1: another process was ready after {time.monotonic() - began:.1f} s")


async def test_reload_reads_the_configuration_again_in_the_same_process(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    pid = host.pid
    host.run("systemctl", "reload", "flanneld")
    await until(lambda: "SIGHUP received" in host.journal())
    await until(lambda: host.show("SubState") == "running")
    assert host.pid == pid
    assert host.show("StatusText").startswith("ready")
    tell("systemctl reload: SIGHUP received, still the same process, ready")


async def test_start_waits_for_etcd_beyond_its_timeout(host: SystemdHost, tell: Tell) -> None:
    host.run("systemctl", "stop", "etcd")
    host.drop_in("TimeoutStartSec=1")
    host.run("systemctl", "start", "--no-block", "flanneld")
    began = time.monotonic()
    await until(lambda: "waiting for the network configuration" in host.show("StatusText"))
    await until(lambda: time.monotonic() - began > 3)
    assert (host.show("ActiveState"), host.show("NRestarts")) == ("activating", "0")
    host.run("systemctl", "start", "etcd")
    host.configure("vxlan")
    await host.ready()
    await until(lambda: host.show("ActiveState") == "active")
    assert host.show("NRestarts") == "0"
    tell("three times TimeoutStartSec without etcd: activating, not restarted; with etcd ready")


async def test_stop_is_clean_and_leaves_the_data_path(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    host.connect_neighbour("vxlan")
    began = time.monotonic()
    host.run("systemctl", "stop", "flanneld")
    took = time.monotonic() - began
    assert took < 5.5
    assert (host.show("Result"), host.show("ExecMainStatus")) == ("success", "0")
    assert host.show("ActiveState") == "inactive"
    assert host.run("cat", "/run/flannel/subnet.env") == SUBNET_ENV
    assert lost(host.ping()) == "0%"
    tell(f"stopped in {took:.1f} s with status 0; containers still reach the neighbour, subnet.env is there")


async def test_wrong_setting_fails_once_and_says_why(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan", drop_in="Environment=FLANNELD_IPTABLES_RESYNC=often")
    host.run("systemctl", "start", "flanneld", check=False)
    assert (host.show("ActiveState"), host.show("ExecMainStatus"), host.show("NRestarts")) == ("failed", "2", "0")
    (why,) = [line for line in host.journal().splitlines() if "FLANNELD_IPTABLES_RESYNC" in line]
    tell(why)


async def test_networkd_leaves_our_devices_alone(host: SystemdHost, tell: Tell) -> None:
    host.run("tee", "/etc/systemd/network/08-card.network", stdin=CARD)
    host.run("tee", "/etc/systemd/network/10-everything.network", stdin=EVERYTHING)
    host.configure("host-gw")
    host.start()
    host.sh("for name in flannel.9 cni0 other; do ip link add $name type bridge; ip link set $name up; done")
    try:
        host.run("systemctl", "start", "systemd-networkd")
        await until(lambda: addressed(host) == {"lo", "other"})
        route = f"{NEIGHBOUR_SUBNET} via {NEIGHBOUR} dev eth0"
        assert route in host.run("ip", "route")
        # it removes all addresses first, with which the kernel removes all routes
        host.run("networkctl", "reconfigure", "eth0")
        await until(lambda: route in host.run("ip", "route"))
        await host.ready()
        assert addressed(host) == {"lo", "other"}
    finally:
        host.sh("systemctl stop -q systemd-networkd.socket systemd-networkd; rm /etc/systemd/network/*-[ce]*.network")
        host.sh("ip link delete other; ip addr del 198.51.100.99/24 dev lo")
    tell("networkd with [Match] Name=* took other and left flannel.9 and cni0; routes it flushed from eth0 came back")


def addressed(host: SystemdHost) -> set[str]:
    """Devices with the address that networkd would give to all."""
    lines = host.run("ip", "-o", "-4", "addr").splitlines()
    return {line.split()[1] for line in lines if "198.51.100.99/24" in line}


async def test_networkmanager_leaves_our_devices_alone(host: SystemdHost, tell: Tell) -> None:
    host.sh(VETH_PAIRS)
    host.sh("systemctl unmask -q NetworkManager; systemctl mask -q NetworkManager-wait-online")
    try:
        host.run("systemctl", "start", "NetworkManager")
        host.sh("nmcli device set eth0 managed no")
        await until(lambda: nm_states(host).get("other0", "unmanaged") != "unmanaged")
        states = nm_states(host)
    finally:
        host.sh("systemctl stop NetworkManager; systemctl mask -q NetworkManager; ip link delete other0")
    assert {states[name] for name in ("flannel.9", "cni9", "veth9")} == {"unmanaged"}
    tell(", ".join(f"{name} {state}" for name, state in sorted(states.items())))


def nm_states(host: SystemdHost) -> dict[str, str]:
    lines = host.run("nmcli", "-t", "-f", "DEVICE,STATE", "device", check=False).splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


async def test_dhcpcd_leaves_our_devices_alone(host: SystemdHost, tell: Tell) -> None:
    assert host.run("head", "-n", "1", "/etc/dhcpcd.conf") == "# begin flanneld\n"
    host.sh(VETH_PAIRS)
    # nodev: without udev's word for it that a device is complete
    said = host.sh("timeout 3 dhcpcd --nobackground --debug --nodev --denyinterfaces eth0 2>&1 || true")
    host.sh("ip link delete other0")
    asked = {line.partition(":")[0] for line in said.splitlines() if "soliciting" in line}
    assert "other0" in asked, said
    assert not asked & {"flannel.9", "cni9", "veth9"}
    tell(f"dhcpcd asked for an address on {', '.join(sorted(asked))}, not on flannel.9, cni9, veth9")


def test_udev_changes_the_mac_of_other_devices_and_not_of_ours(host: SystemdHost, tell: Tell) -> None:
    def macs(name: str) -> list[str]:
        """Before and after udev set the device up."""
        address = f"cat /sys/class/net/{name}/address"
        setup = f"udevadm test-builtin net_setup_link /sys/class/net/{name} >/dev/null 2>&1"
        return host.sh(f"ip link add {name} type bridge; {address}; {setup}; {address}; ip link delete {name}").split()

    before, after = macs("other.9")
    assert before != after
    before, after = macs("flannel.9")
    assert before == after
    tell("udev gave other.9 a MAC of its own making and left that of flannel.9")


async def test_docker_takes_its_subnet_and_is_not_restarted_with_flanneld(host: SystemdHost, tell: Tell) -> None:
    host.sh("echo 'DOCKER_OPTS=--log-level=warn' >/etc/default/docker")
    host.install("--docker", "/wheels/flanneld-*.whl")
    host.sh("systemctl unmask -q docker.service docker.socket containerd.service")
    try:
        host.sh("systemctl stop etcd; systemctl start --no-block docker")
        await until(lambda: "waiting" in host.show("StatusText"))
        assert host.show("SubState", "docker") == "dead"  # its turn comes when there is a subnet
        host.run("systemctl", "start", "etcd")
        host.configure("vxlan")
        await until(lambda: host.show("ActiveState", "docker") == "active")
        assert f"inet {GATEWAY}/24" in host.run("ip", "addr", "show", "docker0")
        assert dockerd(host).endswith(f"--log-level=warn --bip={GATEWAY}/24 --ip-masq=false --mtu=1450")
        tell(dockerd(host))
        host.connect_neighbour("vxlan", bridge=False)
        host.sh(CONTAINER)
        host.run(
            "ip", "netns", "exec", "container", "ping", "-c", "3", "-i", "0.2", "-M", "do", "-s", "1422", NEIGHBOUR_POD
        )
        tell("full-sized packets from behind docker0 reach the neighbour's container, past Docker's FORWARD policy")
        pid = host.show("MainPID", "docker")
        host.run("systemctl", "restart", "flanneld")
        assert host.show("MainPID", "docker") == pid
        tell("a restart of flanneld left docker running")
        before = dockerd(host)
        host.run("systemctl", "restart", "docker")
        assert dockerd(host) == before  # options do not pile up
    finally:
        host.sh("systemctl stop docker.socket docker containerd; systemctl mask -q docker docker.socket containerd")


def dockerd(host: SystemdHost) -> str:
    """The command line of the running Docker."""
    return host.sh(f"tr '\\0' ' ' </proc/{host.show('MainPID', 'docker')}/cmdline").strip()


async def test_it_is_ready_after_a_boot_with_the_same_subnet(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.install("--start", "/wheels/flanneld-*.whl")
    await host.ready()
    before = host.run("cat", "/sys/class/net/flannel.1/address")
    host.machine.halt()
    took = host.machine.boot()
    await host.ready()
    tell(f"booted in {took:.1f} s; {host.show('StatusText')}")
    assert host.run("cat", "/run/flannel/subnet.env") == SUBNET_ENV
    assert host.run("cat", "/sys/class/net/flannel.1/address") == before
    assert host.run("sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"
    assert "forwarding is off" not in host.journal()


async def test_upgrade_takes_effect_at_restart_and_can_be_taken_back(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    pid = host.pid
    before = host.run("readlink", "/opt/flanneld/bin").strip()
    said = host.install()  # from the source tree
    after = host.run("readlink", "/opt/flanneld/bin").strip()
    assert after != before
    assert f"before: /opt/flanneld/{before.removesuffix('/bin')}" in said
    assert said.endswith("flanneld: the version before runs until systemctl restart flanneld\n")
    assert host.pid == pid
    host.run("systemctl", "restart", "flanneld")
    assert after in host.sh(f"tr '\\0' ' ' </proc/{host.pid}/cmdline; readlink -f /opt/flanneld/bin")
    host.sh(f"ln -sfn {before} /opt/flanneld/bin; systemctl restart flanneld")
    assert host.show("StatusText").startswith("ready")
    tell(f"built from the tree beside the running version: {before} -> {after}, and back by a symbolic link")


def test_uninstalling_leaves_edited_files_and_the_data_path_only(host: SystemdHost, tell: Tell) -> None:
    host.configure("vxlan")
    host.start()
    host.sh("echo '# mine' >>/etc/flanneld/flanneld.env")
    said = host.install("--uninstall")
    assert "kept /etc/flanneld/flanneld.env, which was edited" in said
    left = host.sh("find /etc /opt /run /usr /var -xdev -name '*flanneld*' -not -path '/var/log/*' ")
    assert "flanneld" not in host.run("cat", "/etc/dhcpcd.conf")
    assert sorted(left.split()) == ["/etc/flanneld", "/etc/flanneld/flanneld.env", "/var/lib/flanneld"]
    assert host.show("LoadState") == "not-found"
    assert "10.5.9.0/24" in host.run("ip", "route")
    tell("uninstalled; left: /etc/flanneld/flanneld.env (edited), /var/lib/flanneld, the data path")
