"""The udp backend as an operator sees it: daemons, etcd, pods, every data path against every other. Contract 6G.

A host's data path is chosen as in a rolling change: the configuration in etcd says another one before the next
daemon starts, and those that run keep theirs.
"""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.daemon import own_command
from flanneld.lab.netns import run_in
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.lab.spec import CONFIG_KEY, POD_NETWORK, SUBNETS_KEY
from flanneld.lab.transfer import tcp_transfer, udp_transfer
from flanneld.model.addr import Family
from tests.support.live import Stream, until
from tests.support.plain_peer import PlainPeer

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("udp_kernel", "iptables")]

MakeLab = Callable[..., Lab]
TCP_BYTES = 4 << 20
SOL_UDP, UDP_SEGMENT = 17, 103  # include/uapi/linux/udp.h
PLAIN = "plain"
"""Instead of a data path: no daemon, but a peer as plain as Go flanneld."""


IPSEC_POLICY = "ip xfrm policy add src 203.0.113.0/24 dst 203.0.113.0/24 dir out priority 9 action block"
"""A real reason not to use the kernel path, which would go around it."""


def choose(lab: Lab, **backend: object) -> None:
    """Write the network configuration for daemons that start from now on."""
    lab.etcd.put(CONFIG_KEY, json.dumps({"Network": POD_NETWORK, "Backend": {"Type": "udp", **backend}}))


@contextmanager
def cluster(make_lab: MakeLab, *rungs: str) -> Iterator[Lab]:
    """A host for each data path named, their pods connected."""
    lab = make_lab(len(rungs), backend={"Type": "udp"})
    lab.up(daemons=False)
    for host, rung in zip(lab.hosts, rungs, strict=True):
        if rung != PLAIN:
            choose(lab, DataPath=rung)
            host.daemon.start()
            host.daemon.wait_ready()
            host.attach_pod()
    if PLAIN in rungs:
        with PlainPeer(lab, rungs.index(PLAIN) + 1):
            settled(lab)
            yield lab
    else:
        settled(lab)
        yield lab


def settled(lab: Lab) -> None:
    """Wait until pods reach each other and every daemon has told its peers how it receives."""
    for one, other in permutations(lab.hosts, 2):
        until(partial(connected, one, other), f"{one.pod.name} reaches {other.pod.name}")
    for host in lab.hosts:
        if host.daemon.is_running():
            until(partial(announces_its_rung, lab, host.number), f"the lease of {host.name} says how it receives")


def connected(source: Host, target: Host) -> bool:
    return ping(source.pod, target.pod_address()).lost == 0


def says(host: Host, sentence: str, since: int = 0) -> bool:
    return sentence in host.daemon.log()[since:]


def announces_its_rung(lab: Lab, number: int) -> bool:
    return ("KernelRx" in lease_of(lab, number)) is (rung_of(lab, number) == "kernel")


def rung_of(lab: Lab, number: int) -> str:
    """The data path that a host's daemon said last to be in use."""
    said: list[str] = re.findall(r"udp data path (\w+)(?: \(|$)", lab.host(number).daemon.log(), re.MULTILINE)
    return said[-1]


def lease_of(lab: Lab, number: int) -> str:
    """A host's lease as it stands in etcd."""
    return lab.etcd.get(lease_key(lab, number)) or ""


def lease_key(lab: Lab, number: int) -> str:
    return SUBNETS_KEY + lab.host(number).subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")


def assert_pods_exchange_data(lab: Lab) -> None:
    for source, target in ((1, 2), (2, 1)):
        tcp = tcp_transfer(lab, source, target, Family.V4, TCP_BYTES)
        assert tcp.is_intact, f"TCP from pod{source} to pod{target}: {tcp.complaint}"
        udp = udp_transfer(lab, source, target, Family.V4, 400)
        assert udp.is_intact, f"UDP from pod{source} to pod{target}: {udp.complaint}"


def super_packets_arrive(lab: Lab, source: int, target: int) -> int:
    """Send 100 datagrams, ten at a time by UDP_SEGMENT as QUIC does; how many arrived as they were sent."""

    def bound(number: int) -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.bind((lab.host(number).pod_address(), 0))
            made.settimeout(2)
            return made

        return run_in(lab.host(number).pod.netns, make)

    with bound(target) as into, bound(source) as out:
        out.setsockopt(SOL_UDP, UDP_SEGMENT, 1200)
        wanted = {bytes([number]) * 1200 for number in range(100)}
        for first in range(0, 100, 10):
            out.sendto(b"".join(bytes([number]) * 1200 for number in range(first, first + 10)), into.getsockname())
            try:
                for _ in range(10):
                    wanted.discard(into.recv(65536))
            except TimeoutError:
                break
        return 100 - len(wanted)


def is_unreachable(lab: Lab, number: int, address: str) -> bool:
    """Whether a connection from a pod is refused at once because nobody holds its destination (contract 6.53)."""

    def connect() -> int:
        with socket.socket() as sock:
            sock.settimeout(0.5)
            return sock.connect_ex((address, 9))

    return run_in(lab.host(number).pod.netns, connect) == errno.ENETUNREACH


MATRIX = [
    ("kernel", "kernel"),
    ("kernel", "gso"),
    ("kernel", PLAIN),
    ("gso", "gso"),
    ("gso", PLAIN),
    ("basic", "kernel"),
    ("basic", PLAIN),
]


@pytest.mark.parametrize("rungs", MATRIX, ids="-".join)
def test_any_two_data_paths_carry_tcp_and_udp_bit_by_bit(make_lab: MakeLab, rungs: tuple[str, str]) -> None:
    """The release gate: a ping passes where TCP and UDP die of checksums that nobody finished."""
    with cluster(make_lab, *rungs) as lab:
        one, two = lab.hosts
        for number, rung in enumerate(rungs, start=1):
            assert rung == PLAIN or rung_of(lab, number) == rung
        assert_pods_exchange_data(lab)
        assert super_packets_arrive(lab, 1, 2) == super_packets_arrive(lab, 2, 1) == 100
        for size in (56, 1444, 4000):
            assert ping(one.pod, two.pod_address(), 3, size).lost == 0, f"{size} bytes"
        whole = ping(one.pod, two.pod_address(), 1, 1472 - 28, whole=True)
        assert whole.lost == 0, "FLANNEL_MTU's size, unfragmented"
        assert is_unreachable(lab, 1, "10.244.250.9")


def test_leases_are_go_flannels_bytes_and_only_a_receiving_kernel_adds_to_them(make_lab: MakeLab) -> None:
    """Contract 3.16, 3.17: a Go reader takes ``BackendData`` as raw JSON and its udp backend never looks at it."""
    with cluster(make_lab, "kernel", "gso") as lab:
        ours = r',"FlanneldID":"[0-9a-f]{32}"}'
        plain, told = r'{"PublicIP":"198.18.0.12","PublicIPv6":null', r'{"PublicIP":"198.18.0.11","PublicIPv6":null'
        assert re.fullmatch(re.escape(plain) + ours, lease_of(lab, 2))
        assert re.fullmatch(re.escape(told + ',"BackendData":{"KernelRx":true}') + ours, lease_of(lab, 1))
        assert lab.host(1).daemon.subnet_file.read_text().endswith("FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n")


class TcpStream:
    """One TCP connection from pod 1 to pod 2, numbered words sent and checked, while something happens."""

    def __init__(self, lab: Lab) -> None:
        one, two = lab.hosts[:2]
        address = two.pod_address()
        self._server = run_in(two.pod.netns, lambda: socket.create_server((address, 0)))
        self._out = run_in(one.pod.netns, lambda: socket.create_connection(self._server.getsockname(), timeout=10))
        self._into, _ = self._server.accept()
        self._into.settimeout(10)
        self._stop = False
        self.received = 0
        self.fault = ""
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()
        until(lambda: self.received, "the stream flows")

    def _send(self) -> None:
        word = 0
        try:
            while not self._stop:
                self._out.sendall(b"".join(number.to_bytes(8, "big") for number in range(word, word + 512)))
                word += 512
                time.sleep(0.001)  # not to starve everything else on two cores
            self._out.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.fault = f"sending: {error}"

    def _receive(self) -> None:
        rest, word = b"", 0
        try:
            while part := self._into.recv(1 << 16):
                rest += part
                whole = len(rest) // 8
                for at in range(whole):
                    if int.from_bytes(rest[at * 8 : at * 8 + 8], "big") != word + at:
                        self.fault = f"word {word + at} is damaged"
                        return
                word, rest = word + whole, rest[whole * 8 :]
                self.received = word * 8
        except OSError as error:
            self.fault = f"receiving: {error}"

    def flows(self) -> bool:
        """Whether anything arrives now."""
        before, deadline = self.received, time.monotonic() + 5
        while time.monotonic() < deadline:
            if self.received > before or self.fault:
                return not self.fault
            time.sleep(0.01)
        return False

    def end(self) -> str:
        """Stop; what went wrong, empty for nothing."""
        self._stop = True
        for thread in self._threads:
            thread.join()
        for sock in (self._out, self._into, self._server):
            sock.close()
        return self.fault


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_a_daemon_that_dies_or_is_upgraded_on_the_kernel_path_loses_nothing(make_lab: MakeLab, ending: str) -> None:
    with cluster(make_lab, "kernel", "kernel") as lab:
        pings, stream = Stream(lab), TcpStream(lab)
        lease = lease_of(lab, 1)
        getattr(lab.host(1).daemon, ending)()
        assert stream.flows(), "without a daemon"
        revision = lab.etcd.ctl("get", lease_key(lab, 1), "-w", "json")
        lab.host(1).daemon.start()
        lab.host(1).daemon.wait_ready()
        assert stream.flows(), "under the next daemon"
        assert pings.lost() == 0
        assert stream.end() == ""
        assert rung_of(lab, 1) == "kernel"
        assert lease_of(lab, 1) == lease
        before, after = (
            json.loads(text)["kvs"][0]["version"]
            for text in (revision, lab.etcd.ctl("get", lease_key(lab, 1), "-w", "json"))
        )
        assert after - before <= 1, "peers are not told twice that nothing changed"


def test_a_restart_in_user_space_recovers_within_a_second(make_lab: MakeLab) -> None:
    with cluster(make_lab, "gso", "gso") as lab:
        stream = Stream(lab)
        lab.host(1).daemon.stop()
        assert "flannel0" not in lab.host(1).ip("link")
        begun = time.monotonic()
        lab.host(1).daemon.start()
        until(partial(connected, lab.host(1), lab.host(2)), "the pods are connected again")
        assert time.monotonic() - begun < 2, "a second, and one for a machine that is busy with other tests"
        assert stream.lost() < 300


def test_a_next_daemon_on_another_path_removes_what_the_kernel_path_left(make_lab: MakeLab) -> None:
    with cluster(make_lab, "kernel", "gso") as lab:
        first = lab.host(1)
        first.daemon.kill()
        choose(lab, DataPath="gso")
        first.daemon.start()
        first.daemon.wait_ready()
        until(lambda: "KernelRx" not in lease_of(lab, 1), "the announcement is taken back")
        settled(lab)
        assert "flanneld" not in first.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
        assert "flannel0c0" not in first.ip("link")
        assert_pods_exchange_data(lab)
        first.daemon.stop()
        assert "flannel0" not in first.ip("link")


DAMAGE = {
    "device deleted": "ip link del flannel0",
    "device down": "ip link set flannel0 down",
    "address flushed": "ip addr flush dev flannel0",
    "pair deleted": "ip link del flannel0c0",
    "qdisc deleted": "tc qdisc del dev eth0 clsact",
    "filters deleted": "tc filter del dev flannel0 egress",
    "route deleted": "ip route del 10.244.0.0/16",
}


def test_each_disturbance_of_the_kernel_path_heals_while_a_ping_runs(make_lab: MakeLab) -> None:
    with cluster(make_lab, "kernel", "gso") as lab:  # gso: so that the pair is needed
        first, second = lab.hosts
        for damage, command in DAMAGE.items():
            logged = len(first.daemon.log())
            stream = Stream(lab)
            first.run(*command.split())
            until(partial(says, first, "restored", logged), f"{damage}: the log says what was repaired")
            until(partial(connected, first, second), f"{damage}: connected again")
            assert stream.lost() <= 50, damage
            tcp = tcp_transfer(lab, 1, 2, Family.V4, 1 << 20)
            assert tcp.is_intact, f"{damage}: {tcp.complaint}"
        assert first.daemon.is_ready()


def test_filters_of_others_on_the_external_interface_stay_and_come_first(make_lab: MakeLab) -> None:
    lab = make_lab(2, backend={"Type": "udp", "DataPath": "kernel"})
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    host.run("sh", "-c", "tc filter add dev eth0 ingress protocol ip prio 77 u32 match u32 0 0 classid 1:1")

    def others() -> str:
        lines = host.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout.splitlines()
        return "\n".join(line for line in lines if "pref 77 " in line)

    before = others()
    assert "u32" in before
    lab.start_daemons()
    lab.attach_pods()
    settled(lab)
    assert "flanneld-udp-flannel0-decap" in host.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    assert others() == before
    host.daemon.kill()
    host.daemon.start()
    host.daemon.wait_ready()
    assert others() == before
    assert ping(host.pod, lab.host(2).pod_address()).lost == 0


@pytest.mark.parametrize("rung", ["kernel", "gso"])
def test_a_new_external_address_or_mtu_is_followed_here_and_by_the_peer(make_lab: MakeLab, rung: str) -> None:
    with cluster(make_lab, rung, rung) as lab:
        first, second = lab.hosts
        first.ip("addr", "del", f"{first.address()}/24", "dev", "eth0")
        first.ip("addr", "add", "198.18.0.77/24", "dev", "eth0")
        first.ip("route", "replace", "default", "via", "198.18.0.1")
        until(lambda: "198.18.0.77" in lease_of(lab, 1), "the lease tells the new address")
        until(partial(connected, second, first), "the pods are connected again")
        for host in lab.hosts:
            host.ip("link", "set", "eth0", "mtu", "1400")
        until(lambda: all(h.subnet_env()["FLANNEL_MTU"] == "1372" for h in lab.hosts), "subnet.env follows")
        until(lambda: "mtu 1372" in first.ip("link", "show", "flannel0"), "the device follows")
        lab.attach_pods()
        until(lambda: ping(second.pod, first.pod_address(), 1, 1372 - 28, whole=True).lost == 0, "full size passes")
        assert_pods_exchange_data(lab)


def test_a_route_that_leads_a_peer_through_another_interface_is_followed_there_and_back(make_lab: MakeLab) -> None:
    """The programs send by one interface, so such a peer is the pump's."""
    with cluster(make_lab, "kernel", "kernel") as lab:
        first, second = lab.hosts
        first.ip("link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", second.netns)
        for host, other in ((first, second), (second, first)):
            host.ip("link", "set", "eth1", "up")
            host.ip("addr", "add", f"198.18.9.{host.number}/24", "dev", "eth1")
            host.ip("route", "add", other.address(), "via", f"198.18.9.{other.number}")

        def carried() -> int:
            [link] = json.loads(first.ip("-s", "-j", "link", "show", "eth1"))
            return int(link["stats64"]["tx"]["packets"])

        def goes_by_eth1() -> bool:
            before = carried()
            ping(first.pod, second.pod_address(), 10)
            return carried() - before >= 10

        until(goes_by_eth1, "packets go where the route leads")
        assert_pods_exchange_data(lab)
        for host, other in ((first, second), (second, first)):
            host.ip("route", "del", other.address())
        until(lambda: not goes_by_eth1(), "and back")
        assert_pods_exchange_data(lab)


def test_a_peer_that_moves_to_another_address_or_data_path_is_followed_by_its_lease(make_lab: MakeLab) -> None:
    """By a lease written by hand, so that nothing but the lease tells."""
    with cluster(make_lab, "kernel", PLAIN) as lab:
        first, second = lab.hosts
        stream = Stream(lab)
        second.ip("addr", "add", "198.18.0.99/24", "dev", "eth0")
        lab.etcd.put(lease_key(lab, 2), '{"PublicIP":"198.18.0.99","PublicIPv6":null}')
        until(lambda: "198.18.0.99" in lab.host(1).run("ip", "neigh").stdout, "packets go to the new address")
        lab.etcd.put(lease_key(lab, 2), '{"PublicIP":"198.18.0.12","PublicIPv6":null}')
        until(partial(connected, first, second), "and back")
        stream.lost()
        # a promise that is false here shows that promises are followed: plain peers cannot finish checksums
        lab.etcd.put(lease_key(lab, 2), '{"PublicIP":"198.18.0.12","PublicIPv6":null,"BackendData":{"KernelRx":true}}')
        until(lambda: not udp_transfer(lab, 1, 2, Family.V4, 20).is_intact, "the announcement is believed")
        lab.etcd.put(lease_key(lab, 2), '{"PublicIP":"198.18.0.12","PublicIPv6":null,"BackendData":"what"}')
        until(lambda: udp_transfer(lab, 1, 2, Family.V4, 20).is_intact, "and its withdrawal")


def test_a_flood_of_small_packets_leaves_health_and_leases_in_time(make_lab: MakeLab) -> None:
    with cluster(make_lab, "gso", "gso") as lab:
        first, second = lab.hosts
        address = second.pod_address()
        sender = run_in(first.pod.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        stop = threading.Event()

        def flood() -> None:
            sender.setsockopt(SOL_UDP, UDP_SEGMENT, 64)
            while not stop.is_set():
                sender.sendto(bytes(64 * 60), (address, 9))

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            longest = 0.0
            for number in range(20):
                begun = time.monotonic()
                assert first.daemon.ask("/healthz")[0] == second.daemon.ask("/healthz")[0] == 200
                longest = max(longest, time.monotonic() - begun)
                if number == 5:
                    lab.etcd.put(SUBNETS_KEY + "10.244.251.0-24", '{"PublicIP":"198.18.0.98","PublicIPv6":null}')
                    written = time.monotonic()
            until(lambda: not is_unreachable(lab, 1, "10.244.251.2"), "a new peer is taken")
            assert time.monotonic() - written < 5
        finally:
            stop.set()
            flooding.join()
            sender.close()
        assert longest < 1
        until(lambda: ping(first.pod, address).lost == 0, "the flood is over")


def test_a_second_daemon_on_the_port_is_told_so_and_takes_nothing(make_lab: MakeLab) -> None:
    lab = make_lab(1, backend={"Type": "udp"})
    lab.up(daemons=False)
    host = lab.host(1)

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((host.address(), 8285))
        return made

    with run_in(host.netns, bound):
        host.daemon.start()
        sentence = "listen on UDP 198.18.0.11:8285: Address already in use"
        until(lambda: sentence in host.daemon.log(), "the log says that the port is taken")
        assert "is another flanneld using it? Backend.Port chooses another, on every host" in host.daemon.log()
        status, reason = host.daemon.ask("/readyz")
        assert status == 503
        assert sentence in reason
        assert "filter" not in host.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    host.daemon.wait_ready()


def test_without_dev_net_tun_the_daemon_says_what_to_do_and_is_not_ready(make_lab: MakeLab) -> None:
    lab = make_lab(1, backend={"Type": "udp"})
    lab.up(daemons=False)
    host = lab.host(1)
    hide = 'mount -t tmpfs none /dev/net && exec "$@"'
    host.daemon.command = ("unshare", "-m", "sh", "-c", hide, "sh", *own_command())
    host.daemon.start()
    until(lambda: "/dev/net/tun is missing: load the tun module" in host.daemon.log(), "the log says what is missing")
    status, reason = host.daemon.ask("/readyz")
    assert (status, "/dev/net/tun is missing" in reason) == (503, True)
    assert host.daemon.is_running()
    assert host.daemon.log().count("/dev/net/tun is missing") == 1


def test_why_the_kernel_path_is_not_used_is_logged_once_and_shown_in_the_status(
    make_lab: MakeLab, tmp_path: Path
) -> None:
    lab = make_lab(2, backend={"Type": "udp"})
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("sh", "-c", IPSEC_POLICY)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        host.daemon.start(env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        lab.host(2).daemon.start()
        status = ""
        while "READY=1" not in status:
            status = systemd.recv(4096).decode()
    host.daemon.wait_ready()
    lab.host(2).daemon.wait_ready()
    reason = "this host has IPsec policies, which the kernel data path would go around"
    assert f"udp data path gso (kernel: {reason})" in status
    assert host.daemon.log().count(f"udp data path kernel is not used: {reason}") == 1
    lab.attach_pods()
    settled(lab)
    assert (rung_of(lab, 1), rung_of(lab, 2)) == ("gso", "kernel")
    assert_pods_exchange_data(lab)


def test_a_data_path_asked_for_by_name_that_cannot_be_had_is_an_error_with_its_reason(make_lab: MakeLab) -> None:
    lab = make_lab(1, backend={"Type": "udp", "DataPath": "kernel"})
    lab.up(daemons=False)
    host = lab.host(1)
    host.run("sh", "-c", IPSEC_POLICY)
    host.daemon.start()
    why = 'use the data path "kernel", as Backend.DataPath says: failed (this host has IPsec policies'
    until(lambda: why in host.daemon.ask("/readyz")[1], "/readyz says what cannot be had")
    assert host.daemon.log().count(why) == 1
    host.ip("xfrm", "policy", "flush")
    host.daemon.wait_ready()
