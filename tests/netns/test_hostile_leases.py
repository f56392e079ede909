"""A writer to etcd whose leases are wrong in every way: each costs its owner and one line, nobody else anything.

Real daemons, a real etcd, real packets. That a writer may overwrite others' keys is etcd's to prevent: see
design/threat-model.md.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import ping
from tests.netns.test_scan import resident_kib
from tests.support.live import Stream, until
from tests.support.wild_etcd import WildEtcd

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables"), pytest.mark.timeout(180)]

MakeLab = Callable[..., Lab]
ESCAPE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
STRANGER = "198.18.0.77"
"""An address of the underlay that nobody has."""


class Site(NamedTuple):
    """What the attacker knows of the cluster, seen from the host whose log is read."""

    own: str
    """Its subnet, such as ``10.244.3``."""
    peer: str
    """Likewise of the second host."""
    free: str
    """Of nobody."""
    own_address: str
    peer_address: str
    own_mac: str
    peer_mac: str


class Bad(NamedTuple):
    """A lease that must not be used."""

    key: bytes
    value: bytes
    reason: str
    """Pattern that the one line about it matches."""


def value(ip: str = STRANGER, mac: object = "02:00:00:00:00:77", **more: object) -> bytes:
    """A vxlan lease as flanneld writes it, with parts of one's own choice."""
    data: object = {"VNI": 1, "VtepMAC": mac}
    return json.dumps(
        {"PublicIP": ip, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data, **more}
    ).encode()


def overlapping(site: Site) -> dict[str, Bad]:
    """Claims to addresses that are leased already."""
    blocks = {
        "ours, same base but longer": f"{site.own}.0-26",
        "ours, a part": f"{site.own}.64-26",
        "ours, all around": _around(site.own, 0xFE, 23),
        "a peer's, same base but longer": f"{site.peer}.0-26",
        "a peer's, a part": f"{site.peer}.64-26",
        "a peer's pod": f"{site.peer}.2-31",
        "a peer's, all around": _around(site.peer, 0xFC, 22),
        "half of the network": f"{_half(site.peer)}-17",
        "the whole network": "10.244.0.0-16",
        "more than the network": "10.0.0.0-8",
    }
    return {name: Bad(block.encode(), value(), "overlaps|lies outside") for name, block in blocks.items()}


def _around(three: str, mask: int, length: int) -> str:
    first, second, third = three.split(".")
    return f"{first}.{second}.{int(third) & mask}.0-{length}"


def _half(three: str) -> str:
    return f"10.244.{int(three.split('.')[2]) & 0x80}.0"


def elsewhere(site: Site) -> dict[str, Bad]:
    """Subnets that are not of our network."""
    blocks = ["10.99.0.0-24", "198.18.0.0-24", "127.0.0.0-8", "224.0.0.0-4", "169.254.0.0-16", "255.255.255.254-31"]
    return {f"subnet {block}": Bad(block.encode(), value(), "lies outside") for block in blocks}


def misaddressed(site: Site) -> dict[str, Bad]:
    """Public addresses to which packets for a peer cannot be sent."""
    addresses = {
        "127.0.0.1": "unusable public address",
        "0.0.0.0": "no public IPv4 address",
        "0.1.2.3": "unusable public address",
        "224.0.0.251": "unusable public address",
        "255.255.255.255": "unusable public address",
        "169.254.169.254": "link-local",
        "198.18.0.255": "unusable public address",
        site.own_address: "our own public address",
        f"{site.peer}.2": "inside",
        f"{site.own}.1": "inside",
    }
    return {
        f"address {ip}": Bad(f"10.244.250.{8 * number}-29".encode(), value(ip), why)
        for number, (ip, why) in enumerate(addresses.items())
    }


def masqueraders(site: Site) -> dict[str, Bad]:
    """MAC addresses that belong to others or to nobody."""
    macs = {
        "ff:ff:ff:ff:ff:ff": "unusable VtepMAC",
        "01:00:5e:00:00:01": "unusable VtepMAC",
        "00:00:00:00:00:00": "unusable VtepMAC",
        site.own_mac: "our own VtepMAC",
        site.peer_mac: "has the VtepMAC",
        "02:00:00:00:00": "no VtepMAC",
        "x; rm -rf /": "no VtepMAC",
    }
    return {
        f"MAC {mac}": Bad(f"10.244.251.{8 * number}-29".encode(), value(mac=mac), why)
        for number, (mac, why) in enumerate(macs.items())
    }


def malformed(site: Site) -> dict[str, Bad]:
    """Values that are no leases."""
    deep = b"[" * 10_000 + b"]" * 10_000
    values = {
        "empty": b"",
        "not JSON": b"{",
        "a number for an address": b'{"PublicIP":3232235777}',
        "a list for an address": b'{"PublicIP":["198.18.0.77"]}',
        "a list for data": value(BackendData=[1]),
        "text for data": value(BackendData='{"VtepMAC":"02:00:00:00:00:77"}'),
        "a number for a MAC": value(mac=5),
        "a number for a type": value(BackendType=7),
        "deep": deep,
        "deep data": b'{"PublicIP":"198.18.0.77","BackendType":"vxlan","BackendData":%s}' % deep,
        "deep where nobody looks": b'{"x":%s,"PublicIP":"198.18.0.77","BackendType":"vxlan"}' % deep,
        "a mebibyte": value(Padding="x" * (1 << 20)),
        "a mebibyte of data": value(BackendData={"VtepMAC": "02:00:00:00:00:77", "x": "y" * (1 << 20)}),
        "not UTF-8": b'{"PublicIP":"198.18.0.77\xff"}',
        "NUL": b'{"PublicIP":"198.18.0.77\\u0000"}',
        "a forged line": b'{"PublicIP":"1.2.3.4\\nE0101 00:00:00.000000 1 flanneld] all leases are lost"}',
        "terminal codes": '{"PublicIP":"\x1b[2J\x1b]0;x\x07\u202e\u009b31m"}'.encode(),
        "a forged type": value(BackendType="\x1b[31m\nE0101 00:00:00.000000 1 flanneld] down\u202e" + "x" * 5000),
    }
    return {
        f"value: {name}": Bad(f"10.244.252.{8 * number}-29".encode(), raw, "not a lease|not used|too large")
        for number, (name, raw) in enumerate(values.items())
    }


def misnamed(site: Site) -> dict[str, Bad]:
    """Keys that are no subnets."""
    keys = [
        b"",
        b"10.244.253.0",
        b"10.244.253.0-32",
        b"10.244.253.0-24/",
        b"10.244.253.0-24\n",
        b"10.244.253.0-24&",
        b"10.244.253.0-24&fd00::-0",
        b"010.244.253.0-24",
        b"\xff\xfe-24",
        b"\xe2\x80\xae10.244.253.0-x",
        b"\x1b[2J\x1b[31m",
        b"x\nE0101 00:00:00.000000 1 flanneld] forged",
        b"\0",
        b"a/../../config",
        b"9" * 4000,
        b"$(reboot)",
    ]
    return {
        f"key {key[:20]!r}": Bad(key, value(), "does not end in a subnet|names no subnet|claims every") for key in keys
    }


def site_of(lab: Lab) -> Site:
    first, second, *_ = lab.hosts

    def three(host: Host) -> str:
        return host.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0]

    def mac(host: Host) -> str:
        found = re.search(r"link/ether (\S+)", host.ip("link", "show", "flannel.1"))
        assert found is not None
        return found[1]

    return Site(three(first), three(second), "10.244.200", first.address(), second.address(), mac(first), mac(second))


def new_lines(host: Host, since: int) -> list[str]:
    return host.daemon.log()[since:].splitlines()


def complaints(lines: list[str]) -> list[str]:
    """What the log says is wrong; not that subnets run out, which is of all keys and of none."""
    return [line for line in lines if line.startswith(("W", "E")) and "] the network is " not in line]


def entries(lab: Lab) -> set[str]:
    """All routes and forwarding entries of all hosts, by host's name."""
    fdb = ["bridge", "fdb", "show", "dev", "flannel.1"]
    return {
        f"{host.name} {line.strip()}"
        for host in lab.hosts
        for text in (host.ip("route"), host.run(*fdb).stdout)
        for line in text.splitlines()
    }


KINDS = [overlapping, elsewhere, misaddressed, masqueraders, malformed, misnamed]


# nobody gets a subnet that the tests use
CONFIG: Mapping[str, object] = {"SubnetMin": "10.244.10.0", "SubnetMax": "10.244.99.0"}


def test_each_bad_lease_costs_one_line_and_nobody_a_packet(make_lab: MakeLab) -> None:
    lab = make_lab(3, config=CONFIG)
    lab.up()
    site = site_of(lab)
    first = lab.host(1)
    pid = first.daemon.pid
    assert pid is not None
    bad = {name: lease for kind in KINDS for name, lease in kind(site).items()}
    tables = entries(lab)
    before_kib = resident_kib(pid)
    streams = [Stream(lab), Stream(lab, source=1, target=3), Stream(lab, source=2, target=3)]
    wrong: dict[str, list[str]] = {}
    with WildEtcd(lab) as etcd:
        for name, lease in bad.items():
            since = len(first.daemon.log())
            etcd.put(lease.key, lease.value)
            deadline = time.monotonic() + 3
            while not complaints(new_lines(first, since)) and time.monotonic() < deadline:
                time.sleep(0.01)
            etcd.put(b"10.244.254.0-24", value("198.18.0.78", "02:00:00:00:00:78"))  # a marker that all is read
            until(lambda: "198.18.0.78" in first.run("bridge", "fdb", "show", "dev", "flannel.1").stdout, "good one")
            etcd.delete(b"10.244.254.0-24")
            until(lambda: "198.18.0.78" not in first.run("bridge", "fdb", "show", "dev", "flannel.1").stdout, "gone")
            told = complaints(new_lines(first, since))
            if len(told) != 1 or not re.search(lease.reason, told[0]) or len(told[0]) > 600:
                wrong[name] = [line[:300] for line in told]
        lost = [stream.lost() for stream in streams]
        after = entries(lab)
        grown_kib = resident_kib(pid) - before_kib
    assert wrong == {}
    assert lost == [0, 0, 0]
    assert tables <= after
    assert not {line for line in after - tables if line.startswith("h1 ")}
    assert grown_kib < 12 * 1024
    for host in lab.hosts:
        assert host.daemon.is_ready()
        assert not ESCAPE.search(host.daemon.log())
        assert "\nE0101" not in host.daemon.log()


@pytest.mark.parametrize("backend", ["host-gw", pytest.param("udp", marks=pytest.mark.needs("udp_kernel"))])
def test_bad_leases_of_other_backends_cost_one_line_and_nobody_a_packet(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(3, config=CONFIG, backend={"Type": backend})
    lab.up()
    first, subnets = lab.host(1), [host.subnet_env()["FLANNEL_SUBNET"].rpartition(".")[0] for host in lab.hosts]
    addresses = [host.address() for host in lab.hosts]
    site = Site(subnets[0], subnets[1], "10.244.200", addresses[0], addresses[1], "", "")
    published = {} if backend == "udp" else {"BackendType": backend}  # contract 3.17
    bad = {name: lease for kind in (overlapping, elsewhere, misaddressed) for name, lease in kind(site).items()}
    routes = first.ip("route")
    streams = [Stream(lab), Stream(lab, source=2, target=3)]
    wrong: dict[str, list[str]] = {}
    with WildEtcd(lab) as etcd:
        for name, lease in bad.items():
            since = len(first.daemon.log())
            etcd.put(lease.key, json.dumps({"PublicIP": json.loads(lease.value)["PublicIP"], **published}).encode())
            until(lambda since=since: complaints(new_lines(first, since)), f"{name} is refused")  # type: ignore[misc]
            told = complaints(new_lines(first, since))
            if len(told) != 1 or not re.search(lease.reason, told[0]):
                wrong[name] = told
        assert wrong == {}
    assert [stream.lost() for stream in streams] == [0, 0]
    assert first.ip("route") == routes
    assert first.daemon.is_ready()


def test_leases_that_are_strange_but_harmless_are_used_and_harm_nobody(make_lab: MakeLab) -> None:
    """Contract 3.18: Linux ignores a peer's VNI. Two hosts behind one address are none of our business either."""
    lab = make_lab(2, config=CONFIG)
    lab.up()
    site, first = site_of(lab), lab.host(1)
    stream = Stream(lab)
    with WildEtcd(lab) as etcd:
        etcd.put(b"10.244.200.0-24", value(BackendData={"VNI": "x", "VtepMAC": "02-00-00-00-00-77", "y": [None]}))
        etcd.put(b"10.244.201.0-24", value(site.peer_address, "02:00:00:00:00:78", x={"y": 1}))
        etcd.put(b"10.244.202.0-24", value(site.peer_address, site.peer_mac))
        etcd.put(b"wild/prefix/10.244.203.9-24", value("198.18.0.79", "0200.0000.0079"))
        for number in (200, 201, 202, 203):
            until(lambda number=number: f"10.244.{number}.0/24" in first.ip("route"), f"{number} is routed")  # type: ignore[misc]
    assert stream.lost() == 0
    assert first.daemon.is_ready()


NUMBER = 20_000
"""Keys of each kind."""


def test_thousands_of_bad_leases_cost_bounded_memory_time_and_log(make_lab: MakeLab) -> None:
    lab = make_lab(2, config=CONFIG)
    lab.up()
    first = lab.host(1)
    pid = first.daemon.pid
    assert pid is not None
    before_kib, since = resident_kib(pid), len(first.daemon.log())
    stream = Stream(lab)
    with WildEtcd(lab) as etcd:
        etcd.put_all((b"junk-%d" % n, b"x" * 100) for n in range(NUMBER))
        etcd.put_all((b"11.%d.%d.0-24" % divmod(n, 256), value()) for n in range(NUMBER))
        etcd.put(b"10.244.200.0-24", value())
        until(lambda: "10.244.200.0/24" in first.ip("route"), "all is read")
        begun = time.monotonic()
        assert first.daemon.ask("/healthz")[0] == 200
        assert time.monotonic() - begun < 1
        assert stream.lost() == 0
        assert len(new_lines(first, since)) < 400
        for kind in ("keys", "leases"):
            told = re.compile(rf"and \d+ more {kind}")
            until(lambda told=told: told.search(first.daemon.log()[since:]), "a count")  # type: ignore[misc]
        grown = (resident_kib(pid) - before_kib) * 1024 / NUMBER
        assert grown < 3000, "bytes for two bad keys"
        first.daemon.kill()
        stream = Stream(lab)
        first.daemon.start()
        first.daemon.wait_ready()
        assert stream.lost() == 0
        assert ping(lab.host(2).pod, first.pod_address()).lost == 0
