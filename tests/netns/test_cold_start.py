"""A start without the store: from memory to the full mesh, into order when the store answers (failures F17)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY
from flanneld.model.remembered import decode, encode
from tests.support.live import Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]


def subnet_of(host: Host) -> str:
    """Our subnet as subnet.env has it; empty without the file."""
    if not host.daemon.subnet_file.exists():
        return ""
    lines = dict(line.split("=", 1) for line in host.daemon.subnet_file.read_text().split())
    return lines["FLANNEL_SUBNET"].replace(".1/", ".0/")


def memory(host: Host) -> list[str]:
    """The lines of a host's memory; empty when it has none."""
    found = list(host.daemon.state_dir.glob("**/*.cache"))
    return found[0].read_text().splitlines() if found else []


def remembers_all(lab: Lab) -> bool:
    return all(len(memory(host)) == len(lab.hosts) + 2 for host in lab.hosts)


def power_cut(host: Host) -> None:
    """What a reboot leaves: the disk; no daemon, no device, no rules, no /run."""
    host.daemon.kill()
    for link in json.loads(host.run("ip", "-j", "link", "show").stdout):
        if link["ifname"].startswith("flannel"):
            host.run("ip", "link", "del", link["ifname"], check=False)  # a veth goes with its peer
    for family in ("-4", "-6"):
        host.run("ip", family, "route", "flush", "proto", "86")
        host.run("ip", family, "route", "flush", "type", "blackhole")
    host.run("sh", "-c", "iptables -F; iptables -X; iptables -t nat -F; iptables -t nat -X")
    host.daemon.subnet_file.unlink(missing_ok=True)


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_reboot_with_etcd_down_gives_the_same_subnets_and_the_full_mesh(make_lab: MakeLab, backend: str) -> None:
    with make_lab(backend={"Type": backend}) as lab:
        subnets = [subnet_of(host) for host in lab.hosts]
        until(lambda: remembers_all(lab), "every host remembers three leases")
        lab.etcd.stop_member(1)
        for host in lab.hosts:
            power_cut(host)
        lab.start_daemons()
        assert [subnet_of(host) for host in lab.hosts] == subnets
        assert_all_pods_connected(lab)
        assert all("starting from memory" in host.daemon.log() for host in lab.hosts)
        assert all("peers are those of" in host.daemon.ask("/readyz")[1] for host in lab.hosts), "ready, and degraded"

        lab.etcd.start()
        until(lambda: all("remembered lease is confirmed" in h.daemon.log() for h in lab.hosts), "leases are claimed")
        assert len(lab.etcd.items(SUBNETS_KEY)) == 3
        until(
            lambda: all(h.daemon.ask("/readyz") == (200, "flanneld is ready") for h in lab.hosts), "nothing to remark"
        )
        assert_all_pods_connected(lab)


def test_etcd_wiped_while_all_hosts_were_down_gets_its_leases_back(make_lab: MakeLab) -> None:
    with make_lab() as lab:
        subnets = [subnet_of(host) for host in lab.hosts]
        until(lambda: remembers_all(lab), "every host remembers three leases")
        lab.etcd.stop_member(1)
        for host in lab.hosts:
            power_cut(host)
        shutil.rmtree(lab.directory / "etcd1")
        lab.etcd.start()
        lab.start_daemons()
        until(lambda: len(lab.etcd.items(SUBNETS_KEY)) == 3, "three leases in the new store")
        assert [subnet_of(host) for host in lab.hosts] == subnets
        assert_all_pods_connected(lab)
        # the configuration is an operator's to write again; until then everybody works from memory
        assert lab.etcd.get(CONFIG_KEY) is None


def test_subnet_that_another_host_leased_meanwhile_is_left_in_an_orderly_way(make_lab: MakeLab) -> None:
    with make_lab() as lab:
        first = lab.host(1)
        subnet = subnet_of(first)
        until(lambda: remembers_all(lab), "every host remembers three leases")
        power_cut(first)
        key = next(key for key in lab.etcd.items(SUBNETS_KEY) if subnet.replace("/", "-") in key)
        lease = json.loads(lab.etcd.items(SUBNETS_KEY)[key])
        data = {**lease["BackendData"], "VtepMAC": "02:00:00:00:00:07"}
        other = {"PublicIP": "198.51.100.7", "FlanneldID": "f" * 32, "BackendData": data}
        lab.etcd.put(key, json.dumps({**lease, **other}))
        lab.etcd.stop_member(1)
        first.daemon.start()
        first.daemon.wait_ready()
        assert subnet_of(first) == subnet, "nobody could tell it otherwise yet"

        lab.etcd.start()
        until(lambda: subnet_of(first) != subnet, "another subnet in subnet.env")
        until(lambda: "its containers are cut off" in first.daemon.log(), "what stands in the way of the new owner")
        first.ip("link", "del", "cni0")  # as the operator was told
        first.daemon.wait_ready()
        assert "belongs to another host by now" in first.daemon.log()
        first.attach_pod()
        assert_all_pods_connected(lab)


@pytest.mark.parametrize(
    "harm", [lambda raw: raw[:-100], lambda raw: raw.replace(b"10.", b"11.", 1), lambda _: b"", lambda _: b"\xff{"]
)
def test_damaged_memory_is_set_aside_and_the_store_waited_for(
    make_lab: MakeLab, harm: Callable[[bytes], bytes]
) -> None:
    with make_lab(hosts=1) as lab:
        host = lab.host(1)
        until(lambda: remembers_all(lab), "the host remembers its lease")
        lab.etcd.stop_member(1)
        power_cut(host)
        (path,) = host.daemon.state_dir.glob("**/*.cache")
        path.write_bytes(harm(path.read_bytes()))
        host.daemon.start()
        until(lambda: "set aside" in host.daemon.log(), "the damage is told")
        assert not host.daemon.is_ready()
        lab.etcd.start()
        host.daemon.wait_ready()
        assert list(path.parent.glob("*.cache.unusable"))


def test_restart_with_etcd_down_loses_nothing(make_lab: MakeLab) -> None:
    with make_lab() as lab:
        until(lambda: remembers_all(lab), "every host remembers three leases")
        lab.etcd.stop_member(1)
        stream = Stream(lab)
        for host in lab.hosts:
            host.daemon.kill()
            host.daemon.start()
            host.daemon.wait_ready()
        assert stream.lost() == 0


def test_lease_that_ran_out_before_a_reboot_is_not_used_unasked(make_lab: MakeLab) -> None:
    """Another host may have it by now, and no container here uses it yet."""
    with make_lab(hosts=1) as lab:
        host = lab.host(1)
        until(lambda: remembers_all(lab), "the host remembers its lease")
        lab.etcd.stop_member(1)
        power_cut(host)
        (path,) = host.daemon.state_dir.glob("**/*.cache")
        memory = decode(path.read_bytes())
        late = replace(memory.header, boot="another", expires=memory.header.saved - 1)
        path.write_bytes(b"".join(encode(late, memory.leases())))
        host.daemon.start()
        until(lambda: "ran out while this host was down" in host.daemon.log(), "the reason is told")
        assert not host.daemon.is_ready()
        lab.etcd.start()
        host.daemon.wait_ready()


def test_running_host_says_that_the_store_is_away_and_stays_ready(make_lab: MakeLab) -> None:
    with make_lab(hosts=1) as lab:
        daemon = lab.host(1).daemon
        lab.etcd.stop_member(1)
        until(lambda: "etcd cannot be watched" in daemon.ask("/readyz")[1], "the outage is shown")
        assert daemon.ask("/readyz")[0] == 200
        lab.etcd.start()
        until(lambda: daemon.ask("/readyz") == (200, "flanneld is ready"), "and its end")
