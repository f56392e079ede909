"""``flannelctl cleanup``: removes all and only what flannel made, for every backend, by whom ever it was made.

The measure is a snapshot of the host before the first start. Beside flannel's things the host has others' that look
alike: a vxlan device, firewall tables, routes, a bridge with a pod.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import Lab, wiring
from flanneld.lab.daemon import own_command
from flanneld.lab.etcd import binary
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.lab.spec import SUBNETS_KEY
from flanneld.model.addr import Family
from tests.support.crashes import COMMAND
from tests.support.go_state import SimulatedGo
from tests.support.live import until
from tests.support.snapshot import Snapshot, differences, iptables_rules, snapshot

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
OWN_SUBNET = {"SubnetMin": "10.244.7.0", "SubnetMax": "10.244.8.0"}
FOREIGN = """\
ip link add vx7 type vxlan id 7 dev eth0 dstport 4789
ip link set vx7 up
ip addr add 10.99.0.1/24 dev vx7
ip neigh add 10.99.0.9 lladdr 02:00:00:00:00:99 nud permanent dev vx7
bridge fdb add 02:00:00:00:00:99 dev vx7 dst 198.18.0.99 self permanent
ip link add flannel.99 type vxlan id 99 dev eth0 dstport 4790
ip link set flannel.99 alias "flanneld /other" up
ip addr add 10.77.1.0/32 dev flannel.99
ip route add 10.98.0.0/16 via 198.18.0.1 proto 86
ip route add 10.244.128.0/20 via 198.18.0.1
ip route add 192.0.2.0/24 via 198.18.0.1
ip nexthop add id 7 via 198.18.0.1 dev eth0
nft add table ip mine
nft 'add chain ip mine postrtg { type nat hook postrouting priority 100; }'
nft 'add rule ip mine postrtg ip saddr 10.244.0.0/16 counter'
iptables -t nat -N MINE
iptables -t nat -A MINE -s 10.244.0.0/16 -m comment --comment flannel -j RETURN
iptables -t nat -A POSTROUTING -j MINE
iptables -A INPUT -s 192.0.2.9 -j DROP
"""


def cleanup(host: Host, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command on a host of the lab, with the lab's places."""
    where = (f"--subnet-file={host.daemon.subnet_file}", f"--state-dir={host.daemon.state_dir}")
    argv = (sys.executable, "-m", "flanneld.ctl.main", "cleanup", *where, *flags)
    return host.run(*argv, check=check)


def a_lab_with_others_things(make_lab: MakeLab, **spec: object) -> Lab:
    """Two hosts, no daemon yet; on the first everything of FOREIGN, a bridge and a pod."""
    config: dict[str, object] = {**OWN_SUBNET, **spec.pop("config", {})}  # type: ignore[dict-item]
    lab = make_lab(2, config=config, **spec)
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("sh", "-e", stdin=FOREIGN)
    dual = len(lab.spec.families) == 2
    # Go flanneld had this host's subnet before, so it is known whose the pod's address is
    lab.etcd.put(
        f"{SUBNETS_KEY}10.244.7.0-24{'&fd00:244:0:7::-64' if dual else ''}",
        f'{{"PublicIP":"{host.address()}","PublicIPv6":{json.dumps(host.address(Family.V6) if dual else None)}}}',
    )
    gateways = ["10.244.7.1/24"] + (["fd00:244:0:7::1/64"] if dual else [])
    wiring.attach_pod(lab.spec, 1, gateways, 1400)
    return lab


def settled(host: Host) -> Snapshot:
    """The host when the kernel has finished with a dead daemon: a TUN loses its carrier, or goes, a moment later."""
    found = [snapshot(host)]

    def is_still() -> bool:
        found.append(snapshot(host))
        return found[-1] == found[-2]

    until(is_still, "nothing changes any more")
    return found[-1]


def run_daemons(lab: Lab, **env: str) -> None:
    """Start both, use the network, leave what use leaves: entries, answers to misses, refused blocks."""
    host, peer = lab.hosts
    host.daemon.start(env=env or None)
    host.daemon.wait_ready()
    peer.daemon.start()
    peer.daemon.wait_ready()
    peer.attach_pod()
    until(lambda: ping(host.pod, peer.pod_address()).lost == 0, "the pods are connected")
    ping(host.pod, "10.244.200.1")


CASES = {
    "vxlan": {"backend": {"Type": "vxlan"}},
    "vxlan on demand": {"backend": {"Type": "vxlan", "PageAhead": 0}},
    "vxlan direct": {"backend": {"Type": "vxlan", "DirectRouting": True}},
    "vxlan dual": {
        "backend": {"Type": "vxlan"},
        "ipv6": "on",
        "config": {"IPv6SubnetMin": "fd00:244:0:7::", "IPv6SubnetMax": "fd00:244:0:8::"},
    },
    "vxlan nftables": {"backend": {"Type": "vxlan"}, "config": {"EnableNFTables": True}},
    "host-gw": {"backend": {"Type": "host-gw"}, "daemon_flags": ("--ip-blackhole-route",)},
    "host-gw nftables": {"backend": {"Type": "host-gw"}, "config": {"EnableNFTables": True}},
    "udp kernel": {"backend": {"Type": "udp", "DataPath": "kernel"}},
    "udp gso": {"backend": {"Type": "udp", "DataPath": "gso"}},
    "udp basic": {"backend": {"Type": "udp", "DataPath": "basic"}},
}


KILLED = ("vxlan dual", "host-gw", "udp kernel", "udp gso")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.needs("udp_kernel")) if "kernel" in case else case for case in CASES]
)
def test_the_host_is_as_before_the_first_start(make_lab: MakeLab, case: str) -> None:
    lab = a_lab_with_others_things(make_lab, **CASES[case])  # type: ignore[arg-type]
    host = lab.host(1)
    before = snapshot(host)
    run_daemons(lab)
    (host.daemon.kill if case in KILLED else host.daemon.stop)()
    used = settled(host)
    shown = cleanup(host, "--dry-run", "--state").stdout
    assert differences(used, snapshot(host)) == [], "a dry run changes nothing"
    done = cleanup(host, "--yes", "--state").stdout
    assert differences(before, snapshot(host)) == []
    assert [line.replace("removed ", "  ") for line in done.splitlines()] == shown.splitlines()[1:]
    again = cleanup(host, "--yes", "--state")
    assert (again.stdout.startswith("nothing to remove"), again.stderr) == (True, "")


def test_rules_in_the_legacy_variant_are_removed_too(make_lab: MakeLab, tmp_path: Path) -> None:
    for stem in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            (tmp_path / f"{stem}{suffix}").symlink_to("/usr/sbin/xtables-legacy-multi")
    lab = a_lab_with_others_things(make_lab, backend={"Type": "host-gw"})
    host = lab.host(1)
    host.run("iptables-legacy", "-t", "nat", "-A", "POSTROUTING", "-s", "203.0.113.0/24", "-j", "RETURN")
    before = snapshot(host)
    run_daemons(lab, PATH=f"{tmp_path}:{os.environ['PATH']}:/usr/sbin:/sbin")
    host.daemon.stop()
    assert "FLANNEL-POSTRTG" in host.run("iptables-legacy-save").stdout
    cleanup(host, "--yes", "--state")
    assert differences(before, snapshot(host)) == []


def test_alloc_leaves_nothing_behind(make_lab: MakeLab) -> None:
    lab = a_lab_with_others_things(make_lab, backend={"Type": "alloc"})
    host = lab.host(1)
    before = snapshot(host)
    host.daemon.start()
    host.daemon.wait_ready()
    host.daemon.stop()
    cleanup(host, "--yes", "--state")
    assert differences(before, snapshot(host)) == []


@pytest.mark.parametrize("firewall", ["iptables", "nftables"])
@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_what_go_flanneld_left_is_removed_as_well(make_lab: MakeLab, backend: str, firewall: str) -> None:
    """Its device has no mark, its direct routes no protocol number: address and shape tell (ADR 4)."""
    config = {"EnableNFTables": firewall == "nftables"}
    lab = a_lab_with_others_things(make_lab, backend={"Type": backend}, config=config)
    host, peer = lab.hosts
    peer.daemon.start()
    peer.daemon.wait_ready()
    before = snapshot(host)
    SimulatedGo(lab, 1).start()
    assert differences(before, snapshot(host)) != []
    cleanup(host, "--yes")
    assert differences(before, snapshot(host)) == []


def test_hundreds_of_routes_through_nexthop_objects_go_with_their_objects(make_lab: MakeLab) -> None:
    """Above a number of peers routes go through objects of ours (ADR 7); an operator's own objects stay."""
    lab = make_lab(1, backend={"Type": "host-gw"})
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("ip", "nexthop", "add", "id", "7", "via", "198.18.0.1", "dev", "eth0")
    before = snapshot(host)
    with_peers(lab, 600)
    host.daemon.start()
    host.daemon.wait_ready()
    until(lambda: host.ip("route").count("nhid") > 50, "routes go through objects")
    host.daemon.stop()
    cleanup(host, "--yes", "--state")
    assert differences(before, snapshot(host)) == []


def with_peers(lab: Lab, count: int) -> None:
    """Write leases of hosts that are on our segment, or so it seems."""
    value = '{{"PublicIP":"198.18.0.{}","PublicIPv6":null,"BackendType":"host-gw"}}'
    writes = [
        f"put {SUBNETS_KEY}10.244.{n // 4}.{n % 4 * 64}-26 {json.dumps(value.format(100 + n % 100))}"
        for n in range(16, 16 + count)
    ]
    argv = lab.switch.command(binary("etcdctl"), f"--endpoints={lab.etcd.endpoints}", "txn")
    for first in range(0, count, 100):
        text = "\n" + "\n".join(writes[first : first + 100]) + "\n\n\n"
        subprocess.run(argv, input=text, text=True, check=True, capture_output=True)


# ---- whatever a daemon was doing ---------------------------------------------------------------------------


@pytest.mark.timeout(180)
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", pytest.param("udp", marks=pytest.mark.needs("udp_kernel"))])
def test_wherever_a_daemon_was_killed_nothing_of_it_stays(make_lab: MakeLab, backend: str) -> None:
    """Before some of all things that it does at a start, those with files among them, which leave half of one."""
    lab = make_lab(1, backend={"Type": backend})
    lab.up(daemons=False)
    host = lab.host(1)
    host.daemon.command = COMMAND
    trace = host.directory / "trace"
    before = snapshot(host)

    def run(**env: str) -> None:
        host.daemon.start(env={"CRASH_FROM": "start", **env})
        until(lambda: not host.daemon.is_running() or host.daemon.is_ready(), "its end, or its start's")
        host.daemon.kill()

    run(CRASH_TRACE=str(trace))
    things = trace.read_text().splitlines()
    trace.unlink()
    files = [number for number, thing in enumerate(things, 1) if "os.rename" in thing]
    for point in sorted({*files[:3], *range(len(things) // 5, len(things), len(things) // 5)}):
        cleanup(host, "--yes", "--state")
        assert differences(before, snapshot(host)) == []
        run(CRASH_AT=str(point))
        cleanup(host, "--yes", "--state")
        assert differences(before, snapshot(host)) == [], things[point - 1]
        assert not [*host.directory.rglob(".*"), *host.daemon.state_dir.rglob("*.*")], things[point - 1]


def test_a_device_of_a_former_vni_goes_too(make_lab: MakeLab) -> None:
    """A daemon that was killed between taking another VNI and removing the old device leaves both."""
    lab = make_lab(1)
    lab.up(daemons=False)
    host = lab.host(1)
    before = snapshot(host)
    host.daemon.start()
    host.daemon.wait_ready()
    host.daemon.kill()
    host.ip("link", "add", "flannel.7", "type", "vxlan", "id", "7", "dev", "eth0", "dstport", "8473")
    host.ip("link", "set", "flannel.7", "alias", "flanneld /coreos.com/network", "up")
    cleanup(host, "--yes", "--state")
    assert differences(before, snapshot(host)) == []


# ---- another network on the same host ------------------------------------------------------------------


OTHER = "/other/network"


def test_a_second_network_on_the_host_stays_as_it_is(make_lab: MakeLab) -> None:
    """Its daemon may even run: device, routes and rules are told apart by mark and blocks (failure F21)."""
    lab = make_lab(2, backend={"Type": "vxlan"}, daemon_flags=("--ip-masq=false", "--iptables-forward-rules=false"))
    lab.up()
    host = lab.host(1)
    lab.etcd.put(f"{OTHER}/config", '{"Network":"10.66.0.0/16","Backend":{"Type":"host-gw"}}')
    lab.etcd.put(
        f"{OTHER}/subnets/10.66.9.0-24", '{"PublicIP":"198.18.0.12","PublicIPv6":null,"BackendType":"host-gw"}'
    )
    second = second_daemon(host, lab)
    try:
        until(lambda: "10.66.9.0/24 via 198.18.0.12" in host.ip("route"), "the second network works")
        until(lambda: "FLANNEL-FWD" in host.run("iptables-save").stdout, "its rules are there")
        refused = cleanup(host, "--yes", f"--etcd-prefix={OTHER}", check=False)
        assert (refused.returncode, "serves /other/network on this host" in refused.stderr) == (1, True)
        host.daemon.stop()
        routes, rules = host.ip("route", "show", "root", "10.66.0.0/16"), iptables_rules(host, "iptables-nft")
        done = cleanup(host, "--yes", "--state")
        assert "flannel.1" not in host.ip("link")
        assert host.ip("route", "show", "root", "10.66.0.0/16") == routes
        assert iptables_rules(host, "iptables-nft") == rules
        assert (
            "stays: iptables-nft nat: chain FLANNEL-POSTRTG with 6 rules and 1 in POSTROUTING: of 10.66." in done.stderr
        )
        assert second.poll() is None
        assert (host.daemon.state_dir / f"netns-{host.netns}" / "identity").exists(), "the other daemon's too"
    finally:
        second.terminate()
        second.wait(10)


def test_a_mistaken_prefix_removes_nothing_of_the_network_that_was_here(make_lab: MakeLab) -> None:
    """The files that the command looks at without being told others tell of that network, and not of the named one."""
    lab = make_lab(2, backend={"Type": "host-gw"}, daemon_flags=("--ip-masq",))
    lab.up()
    host = lab.host(1)
    host.daemon.stop()
    before = snapshot(host)
    done = cleanup(host, "--yes", "--state", f"--etcd-prefix={OTHER}")
    assert differences(before, snapshot(host)) == []
    file = host.daemon.subnet_file
    assert f"stays: file {file}: it is of the network /coreos.com/network; --subnet-file names another" in done.stderr
    assert f"nothing to remove for {OTHER}" in done.stdout


def second_daemon(host: Host, lab: Lab) -> subprocess.Popen[bytes]:
    flags = [
        f"--etcd-endpoints={lab.etcd.endpoints}",
        f"--etcd-prefix={OTHER}",
        "--iface=eth0",
        "--ip-masq",
        f"--subnet-file={host.directory / 'other.env'}",
        f"--state-dir={host.daemon.state_dir}",
    ]
    argv = host.command(*own_command(), *flags)
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ---- the command ---------------------------------------------------------------------------------------


def test_it_refuses_while_a_daemon_runs_unless_forced(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.up()
    host = lab.host(1)
    refused = cleanup(host, "--yes", check=False)
    assert refused.returncode == 1
    assert f"flanneld (pid {host.daemon.pid}) serves /coreos.com/network on this host" in refused.stderr
    assert "stop it first, or say --force" in refused.stderr
    without_lock = cleanup(host, "--yes", f"--state-dir={host.directory / 'elsewhere'}", check=False)
    assert (without_lock.returncode, f"(pid {host.daemon.pid})" in without_lock.stderr) == (1, True)
    assert "flannel.1" in host.ip("link")
    assert "link flannel.1" in cleanup(host, "--dry-run").stdout, "to look does no harm"


def test_without_yes_and_without_a_terminal_it_shows_and_does_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.up()
    host = lab.host(1)
    host.daemon.stop()
    before = snapshot(host)
    asked = cleanup(host, check=False)
    assert (asked.returncode, asked.stderr) == (1, "nothing was changed; --yes does it without asking\n")
    first, *lines = asked.stdout.splitlines()
    assert first == "would remove for /coreos.com/network (10.244.0.0/16):"
    subnet = host.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0")
    assert any(line.startswith("  link flannel.1 ") and "with 2 addresses" in line for line in lines)
    assert f"  file {host.daemon.subnet_file}" in lines
    assert subnet in host.ip("addr", "show", "dev", "flannel.1")
    assert differences(before, snapshot(host)) == []


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("y", 0)])
def test_at_a_terminal_it_asks(make_lab: MakeLab, answer: str, status: int) -> None:
    lab = make_lab(1)
    lab.up()
    host = lab.host(1)
    host.daemon.stop()
    ours, theirs = pty.openpty()
    argv = host.command(
        sys.executable, "-m", "flanneld.ctl.main", "cleanup", f"--subnet-file={host.daemon.subnet_file}"
    )
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs) as asking:
        os.close(theirs)
        shown = b""
        while b"Go on? [y/N] " not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, f"{answer}\n".encode())
        assert asking.wait(20) == status
    os.close(ours)
    assert ("flannel.1" in host.ip("link")) is (answer == "n")


def test_the_cni_configuration_goes_and_others_files_stay(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.up(daemons=False)
    host = lab.host(1)
    conf_dir = host.directory / "net.d"
    conf_dir.mkdir()
    (conf_dir / "90-other.conflist").write_text("{}")
    before = snapshot(host)
    flag = f"--cni-conf-dir={conf_dir}"
    host.daemon.start(flag)
    host.daemon.wait_ready()
    host.daemon.stop()
    ours = conf_dir / "10-flannel.conflist"
    text = ours.read_text()
    ours.write_text(text.replace('"bridge"', '"macvlan"'))
    assert f"stays: file {ours}: not as we write it" in cleanup(host, "--dry-run", flag).stderr
    ours.write_text(text)
    cleanup(host, "--yes", "--state", flag)
    assert differences(before, snapshot(host)) == []


def test_the_lease_is_given_back_on_request_and_nobody_elses(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    lab.up()
    host, peer = lab.hosts
    own = SUBNETS_KEY + host.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
    host.daemon.stop()
    cleanup(host, "--yes")
    assert own in lab.etcd.items(SUBNETS_KEY)
    done = cleanup(host, "--yes", "--lease", f"--etcd-endpoints={lab.etcd.endpoints}")
    assert f"removed lease {own.removeprefix(SUBNETS_KEY)} of {host.address()}" in done.stdout
    other = SUBNETS_KEY + peer.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0-")
    assert list(lab.etcd.items(SUBNETS_KEY)) == [other]


def test_a_lost_subnet_file_costs_nothing_where_a_device_or_rules_tell_the_network(make_lab: MakeLab) -> None:
    lab = make_lab(1, backend={"Type": "host-gw"})
    lab.up(daemons=False)
    host = lab.host(1)
    before = snapshot(host)
    host.daemon.start()
    host.daemon.wait_ready()
    host.daemon.stop()
    host.daemon.subnet_file.unlink()
    assert "(10.244.0.0/16)" in cleanup(host, "--dry-run").stdout
    cleanup(host, "--yes", "--state")
    assert differences(before, snapshot(host)) == []


def test_what_nobody_can_attribute_stays_until_the_operator_names_the_network(make_lab: MakeLab) -> None:
    lab = make_lab(1, backend={"Type": "vxlan"})
    lab.up(daemons=False)
    host = lab.host(1)
    before = snapshot(host)
    SimulatedGo(lab, 1).start()
    host.daemon.subnet_file.unlink()
    done = cleanup(host, "--yes")
    assert (
        "stays: link flannel.1: it could be another network's; --network CIDR says which network is meant"
        in done.stderr
    )
    assert "flannel.1" in host.ip("link")
    cleanup(host, "--yes", "--network=10.244.0.0/16")
    assert differences(before, snapshot(host)) == []
