"""A container that means harm: it scans, and makes up tunnel packets. design/threat-model.md says what is protected.

Tunnels have no keys, in any flannel. ``deploy/hardening/tunnel-guard.nft`` is what keeps pods from using that.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from backends.udp_packet import checksum_of
from flanneld.lab import Lab
from flanneld.lab.node import Node
from flanneld.lab.probe import ping
from flanneld.model.addr import parse_ip, parse_mac
from tests.support.live import ON_DEMAND, Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]
GUARD = Path(__file__).parents[2] / "deploy/hardening/tunnel-guard.nft"
STRANGER = "10.244.250.6"
"""Whom the made-up packets claim to be from: a pod of no host."""
PORT = 7777
VXLAN_PORT, UDP_PORT = 8472, 8285

LISTEN = """
import select, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 7777))
print("listening", flush=True)
while select.select([sock], [], [], 60)[0]:
    data, source = sock.recvfrom(100)
    print(data.decode(), source[0], flush=True)
"""
SEND = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(20):
    sock.sendto(bytes.fromhex(sys.argv[3]), (sys.argv[1], int(sys.argv[2])))
"""


def datagram(source: str, to: str, port: int, payload: bytes) -> bytes:
    """A whole IPv4 packet with UDP in it."""
    udp = struct.pack("!HHHH", port, port, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + parse_ip(source) + parse_ip(to)
    return head[:10] + checksum_of(head).to_bytes(2, "big") + head[12:] + udp


def inner(to: str, text: str) -> bytes:
    """From the stranger to a pod."""
    return datagram(STRANGER, to, PORT, text.encode())


def in_vxlan(packet: bytes, mac: str) -> bytes:
    """The same as vxlan carries it (RFC 7348), VNI 1."""
    return bytes.fromhex("0800000000000100") + parse_mac(mac) + bytes.fromhex("020000000099") + b"\x08\x00" + packet


SEND_RAW = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for _ in range(20):
    sock.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 0))
"""
SCAN = """
import ipaddress, random, socket, sys
network = list(ipaddress.ip_network(sys.argv[1]))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    random.shuffle(network)
    for address in network:
        try:
            sock.sendto(b"x", (str(address), 9))
        except OSError:
            pass
"""


class Ear:
    """A pod that tells what it hears on its port."""

    def __init__(self, pod: Node) -> None:
        argv = pod.command(sys.executable, "-c", LISTEN)
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._numbers = count()
        self._out = self._process.stdout
        assert self._out.readline() == "listening\n"

    def heard(self, honest: Node, own: str) -> set[str]:
        """All but honest words that came before an honest pod's word, which is sent now."""
        last = f"honest-{next(self._numbers)}"
        honest.run(sys.executable, "-c", SEND, own, str(PORT), last.encode().hex())
        words = set()
        while (line := self._out.readline()) and not line.startswith(last):
            words.add(line.split()[0])
        return {word for word in words if not word.startswith("honest")}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_the_guard_keeps_pods_from_making_up_vxlan_packets_and_lets_tunnels_work(make_lab: MakeLab) -> None:
    lab = make_lab(3, ipv6="on")
    lab.up()
    first, second, third = lab.hosts
    mac = re.findall(r"link/ether (\S+)", second.ip("link", "show", "flannel.1"))[0]
    target, ear = second.pod_address(), Ear(second.pod)
    attacks = {
        "by-its-own-pod": (second.pod, second.address()),
        "from-another-host": (first.pod, second.address()),  # masqueraded: it comes from that host's address
        "from-outside": (lab.outside, second.address()),
    }

    def attack() -> set[str]:
        for name, (node, at) in attacks.items():
            packet = in_vxlan(inner(target, name), mac)
            node.run(sys.executable, "-c", SEND, at, str(VXLAN_PORT), packet.hex(), check=False)
        lie = datagram(third.address(), second.address(), VXLAN_PORT, in_vxlan(inner(target, "as-a-host"), mac))
        second.pod.run(sys.executable, "-c", SEND_RAW, second.address(), lie.hex())
        return ear.heard(third.pod, target)

    try:
        assert attack() == {*attacks, "as-a-host"}, "without the guard all get through, as with every flannel"
        stream = Stream(lab)
        for host in lab.hosts:
            host.run("nft", "-f", str(GUARD))
            host.run("nft", "-f", str(GUARD))  # again: it replaces itself
        assert attack() == set()
        assert stream.lost() == 0
        assert_all_pods_connected(lab)
        assert all(host.daemon.is_ready() for host in lab.hosts)
    finally:
        ear.close()


def test_a_stranger_cannot_speak_over_the_udp_backend_and_the_guard_keeps_pods_out_too(make_lab: MakeLab) -> None:
    """Unlike Go flanneld (contract 11.52): datagrams count only if they come from the address of a lease."""
    lab = make_lab(3, backend={"Type": "udp"})
    lab.up()
    first, second, third = lab.hosts
    target, ear = second.pod_address(), Ear(second.pod)

    def attack(**nodes: Node) -> set[str]:
        for name, node in nodes.items():
            packet = inner(target, name)
            node.run(sys.executable, "-c", SEND, second.address(), str(UDP_PORT), packet.hex(), check=False)
        return ear.heard(third.pod, target)

    try:
        assert attack(outside=lab.outside, own_pod=second.pod) == set()
        assert attack(pod_of_a_peer=first.pod) == {"pod_of_a_peer"}, "it comes with its host's address"
        for host in lab.hosts:
            host.run("nft", "-f", str(GUARD))
        assert attack(outside=lab.outside, own_pod=second.pod, pod_of_a_peer=first.pod) == set()
        assert_all_pods_connected(lab)
    finally:
        ear.close()


@pytest.mark.timeout(120)
def test_while_a_pod_scans_the_network_other_pods_first_packets_are_answered_at_once(make_lab: MakeLab) -> None:
    lab = make_lab(6, backend=ON_DEMAND)
    lab.up()
    first = lab.host(1)
    pid = first.daemon.pid
    assert pid is not None
    begun, cpu = time.monotonic(), cpu_s(pid)
    scan = subprocess.Popen(first.pod.command(sys.executable, "-c", SCAN, "10.244.0.0/16"))
    try:
        waits = []
        for host in lab.hosts[1:]:
            time.sleep(0.1)
            answer = ping(first, host.pod_address())  # of the host itself; a pod's is forwarded the same way
            waits.append(answer.first_ms or 1000.0)
        assert scan.poll() is None
    finally:
        scan.kill()
        scan.wait()
    # the neighbour table is one for all namespaces of a machine, so what else runs on it may cost some of them a packet
    assert sorted(waits)[len(waits) // 2] < 100
    assert (cpu_s(pid) - cpu) / (time.monotonic() - begun) < 0.9
    neighbours = first.ip("neigh", "show", "dev", "flannel.1").splitlines()
    assert len(neighbours) <= 1024
    until(lambda: first.daemon.is_ready(), "ready")


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
