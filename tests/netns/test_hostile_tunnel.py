"""Frames that somebody makes up and sends into a host's tunnel, with no guard in the way: what they can change there.

A vxlan device is a wire with everybody on it. Frames from a pod that knows how (``test_hostile_pod.py``) come out of
``flannel.1`` as if a peer had sent them, ARP and redirects included. Hosts need none of these: every entry comes from
a lease. design/threat-model.md says what remains.
"""

from __future__ import annotations

import json
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from backends.udp_packet import checksum_of
from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from flanneld.model.addr import MAC, Family, format_mac, parse_ip, parse_mac
from tests.netns.test_hostile_pod import UDP_PORT, VXLAN_PORT, cpu_s
from tests.support.live import ON_DEMAND, Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

RUNGS = ["basic", "gso", pytest.param("kernel", marks=pytest.mark.needs("udp_kernel"))]

MakeLab = Callable[..., Lab]
LIAR = bytes.fromhex("020000000099")
EVERYBODY = b"\xff" * 6
ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
SOLICITATION, ADVERTISEMENT = 135, 136
SEND_LINES = """
import socket, sys
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
for line in sys.stdin:
    sock.sendto(bytes.fromhex(line), (sys.argv[1], int(sys.argv[2])))
"""


def frame(to: bytes, kind: int, payload: bytes) -> bytes:
    """A frame of the liar's, as vxlan carries it (RFC 7348), VNI 1."""
    return bytes.fromhex("0800000000000100") + to + LIAR + kind.to_bytes(2, "big") + payload


def arp(operation: int, claims: str, asks: str) -> bytes:
    """ARP (RFC 826): the liar has the address ``claims``."""
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + LIAR + parse_ip(claims) + bytes(6) + parse_ip(asks)


def packet(protocol: int, source: str, to: str, payload: bytes) -> bytes:
    """An IPv4 packet."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + parse_ip(source) + parse_ip(to)
    return head[:10] + checksum_of(head).to_bytes(2, "big") + head[12:] + payload


def redirect(gateway: str, victim: str, target: str, instead: str) -> bytes:
    """ICMP (RFC 792): ``gateway`` says that packets to ``target`` had better go through ``instead``."""
    answered = packet(1, victim, target, bytes(8))  # as if the victim had answered a ping, which needs no socket
    icmp = struct.pack("!BBH", 5, 1, 0) + parse_ip(instead) + answered
    return packet(1, gateway, victim, icmp[:2] + checksum_of(icmp).to_bytes(2, "big") + icmp[4:])


def mac_of(host: Host, device: str = "flannel.1") -> bytes:
    return parse_mac(re.findall(r"link/ether (\S+)", host.ip("link", "show", device))[0])


def base(host: Host) -> str:
    """The address of a host's tunnel device."""
    return host.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0")


def neighbours(host: Host, device: str = "flannel.1") -> dict[str, str]:
    """By address, whom a host takes for its neighbour on the tunnel."""
    found = json.loads(host.ip("-j", "neigh", "show", "dev", device))
    return {n["dst"]: n.get("lladdr", "") for n in found}


def send(attacker: Host, victim: Host, frames: Iterable[bytes], port: int = VXLAN_PORT) -> None:
    """From a pod of the attacker to the victim."""
    lines = "\n".join(one.hex() for one in frames)
    attacker.pod.run(sys.executable, "-c", SEND_LINES, victim.address(), str(port), stdin=lines)


def received(host: Host, device: str = "flannel.1") -> int:
    return int(json.loads(host.ip("-j", "-s", "link", "show", device))[0]["stats64"]["rx"]["packets"])


@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, ON_DEMAND], ids=["ahead", "on demand"])
def test_lies_about_who_has_an_address_lead_nobody_astray(make_lab: MakeLab, backend: dict[str, object]) -> None:
    """Of hosts and of pods, in questions and in answers, to us and to everybody."""
    lab = make_lab(3, backend=backend)
    lab.up()
    attacker, victim, third = lab.hosts
    before, heard = neighbours(victim), received(victim)
    lies = [
        frame(to, ARP, arp(operation, claims, base(victim)))
        for claims in (base(third), third.pod_address())
        for operation in (1, 2)
        for to in (mac_of(victim), EVERYBODY)
    ]
    send(attacker, victim, lies * 10)
    assert received(victim) - heard >= 80, "they came out of the tunnel"
    assert neighbours(victim) == before
    assert ping(victim.pod, third.pod_address()).lost == 0
    assert_all_pods_connected(lab)


def test_lies_by_the_thousand_do_not_fill_the_machines_table_of_neighbours(make_lab: MakeLab) -> None:
    """It is one table for all networks of a machine, of 1024 entries by default."""
    lab = make_lab(2)
    lab.up()
    attacker, victim = lab.hosts
    before, heard, mac, own = neighbours(victim), received(victim), mac_of(victim), base(victim)
    claims = (f"10.244.{n // 250}.{n % 250 + 1}" for n in range(3000))
    send(attacker, victim, [frame(mac, ARP, arp(1, claim, own)) for claim in claims])
    assert received(victim) - heard > 1000, "they came out of the tunnel"
    assert neighbours(victim) == before


def test_a_redirect_over_the_tunnel_changes_no_way(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    lab.up()
    attacker, victim, third = lab.hosts
    target = third.pod_address()
    lie = frame(mac_of(victim), IPV4, redirect(base(third), base(victim), target, base(attacker)))
    assert ping(victim, target).lost == 0
    send(attacker, victim, [lie] * 20)
    assert f"via {base(third)} " in victim.ip("route", "get", target)


# ---- IPv6, whose kernel believes every question ------------------------------------------------------------


def discovery(kind: int, source: str, to: str, target: str, option: int) -> bytes:
    """Neighbour discovery (RFC 4861): a question of ``source``, or the answer that the liar has ``target``."""
    said = struct.pack("!BBHI", kind, 0, 0, 0x60000000 if kind == ADVERTISEMENT else 0)
    said += parse_ip(target) + bytes((option, 1)) + LIAR
    pseudo = parse_ip(source) + parse_ip(to) + struct.pack("!II", len(said), 58)
    said = said[:2] + checksum_of(pseudo + said).to_bytes(2, "big") + said[4:]
    return struct.pack("!IHBB", 6 << 28, len(said), 58, 255) + parse_ip(source) + parse_ip(to) + said


def base6(host: Host) -> str:
    return host.subnet_env()["FLANNEL_IPV6_SUBNET"].replace("::1/64", "::")


def send6(attacker: Host, victim: Host, frames: Iterable[bytes]) -> None:
    lines = "\n".join(one.hex() for one in frames)
    there = victim.address(Family.V6)
    attacker.pod.run(sys.executable, "-c", SEND_LINES, there, str(VXLAN_PORT), stdin=lines)


def lies6(victim: Host, claims: Iterable[str]) -> list[bytes]:
    """The liar has each of these addresses."""
    mac, own = mac_of(victim, "flannel-v6.1"), base6(victim)
    return [
        frame(mac, IPV6, said)
        for claim in claims
        for said in (discovery(SOLICITATION, claim, own, own, 1), discovery(ADVERTISEMENT, claim, own, claim, 2))
    ]


def test_lies_of_neighbour_discovery_are_taken_back_at_once(make_lab: MakeLab) -> None:
    """Without that a destination that is not in the tables would be cut off for half a minute a lie."""
    lab = make_lab(3, backend=ON_DEMAND, ipv6="only")
    lab.up()
    attacker, victim, third = lab.hosts
    target, heard = third.pod_address(Family.V6), received(victim, "flannel-v6.1")
    send6(attacker, victim, lies6(victim, (target, base6(third))) * 5)
    assert received(victim, "flannel-v6.1") - heard >= 20, "they came out of the tunnel"
    until(lambda: format_mac(MAC(LIAR)) not in neighbours(victim, "flannel-v6.1").values(), "nothing is left of it")
    assert ping(victim.pod, target).lost == 0
    assert_all_pods_connected(lab)


def test_lies_of_neighbour_discovery_by_the_thousand_are_bounded(make_lab: MakeLab) -> None:
    lab = make_lab(3, backend=ON_DEMAND, ipv6="only")
    lab.up()
    attacker, victim, _third = lab.hosts
    assert victim.daemon.pid is not None
    lines, began, cpu = victim.daemon.log().count("\n"), time.monotonic(), cpu_s(victim.daemon.pid)
    lies = lies6(victim, (f"fd00:244:{n:x}::5" for n in range(1000)))
    stream = Stream(lab, Family.V6, source=2, target=3)
    for _ in range(5):
        send6(attacker, victim, lies)
    took_s, used_s = time.monotonic() - began, cpu_s(victim.daemon.pid) - cpu
    until(lambda: len(neighbours(victim, "flannel-v6.1")) < 5, "nothing is left of it")
    assert stream.lost() == 0
    assert used_s / took_s < 0.9
    assert victim.daemon.log().count("\n") - lines < 150
    assert victim.daemon.is_ready()


# ---- what no host would send -----------------------------------------------------------------------------


def rubbish(to: str, rng: random.Random) -> Iterator[bytes]:
    """What is no IPv4 packet, or hardly one: cut anywhere, with lengths that lie, in fragments, as large as can be."""
    whole = packet(17, "10.244.250.6", to, struct.pack("!HHHH", 9, 9, 108, 0) + bytes(100))
    yield from (whole[:length] for length in range(1, len(whole)))
    for at in range(20):
        yield from (whole[:at] + bytes((value,)) + whole[at + 1 :] for value in (0, 1, 0x0F, 0x4F, 0x60, 0x7F, 0xFF))
    yield from (rng.randbytes(rng.randrange(1, 3000)) for _ in range(300))
    for length in (1473, 9000, 65507):  # the datagram itself comes in fragments
        yield packet(17, "10.244.250.6", to, bytes(length - 20))
    for more, offset in ((1, 0), (1, 8189), (0, 8191)):  # fragments that never become whole, or too large
        yield whole[:6] + (more << 13 | offset).to_bytes(2, "big") + whole[8:]


@pytest.mark.parametrize("rung", RUNGS)
def test_rubbish_from_a_peers_address_costs_nobody_a_packet(make_lab: MakeLab, rung: str) -> None:
    """Of the udp backend, whose datagrams our own code reads. Sizes above the link's come in fragments."""
    lab = make_lab(3, backend={"Type": "udp", "DataPath": rung})
    lab.up()
    attacker, victim, _third = lab.hosts
    stream = Stream(lab)
    rng = random.Random(5)
    for _ in range(3):
        send(attacker, victim, rubbish(victim.pod_address(), rng), UDP_PORT)
    assert stream.lost() == 0
    assert_all_pods_connected(lab)
    assert victim.daemon.is_ready()
    assert victim.daemon.log().count("\n") < 60


@pytest.mark.parametrize("backend", [{"Type": "vxlan"}, ON_DEMAND], ids=["ahead", "on demand"])
def test_rubbish_in_vxlan_costs_nobody_a_packet(make_lab: MakeLab, backend: dict[str, object]) -> None:
    lab = make_lab(3, backend=backend)
    lab.up()
    attacker, victim, _third = lab.hosts
    stream, rng, mac = Stream(lab), random.Random(5), mac_of(victim)
    frames = [frame(mac, IPV4, one) for one in rubbish(victim.pod_address(), rng) if len(one) < 65000]
    send(attacker, victim, [*frames, *(one[: rng.randrange(len(one))] for one in frames)])
    assert stream.lost() == 0
    assert_all_pods_connected(lab)
    assert victim.daemon.log().count("\n") < 60
