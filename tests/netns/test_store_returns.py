"""A host that started from its memory, and what the store says when it is back (failures F16, F17)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY, SUBNETS_KEY
from tests.netns.test_cold_start import power_cut, remembers_all, subnet_of
from tests.netns.test_end_to_end import assert_all_pods_connected, until

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
