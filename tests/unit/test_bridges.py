"""Bridges of an earlier subnet are told to the operator (failure F36)."""

from __future__ import annotations

import pytest

from flanneld.model.addr import Family, Prefix, parse_ip
from flanneld.model.host import AddrInfo, HostNet, LinkInfo
from flanneld.plan.bridges import misplaced

NETWORKS = [Prefix.parse("10.244.0.0/16"), Prefix.parse("fd00:244::/48"), Prefix.parse("10.5.0.0/16")]
SUBNETS = {Family.V4: Prefix.parse("10.244.7.0/24"), Family.V6: Prefix.parse("fd00:244:0:7::/64")}


def host(*entries: tuple[str, str]) -> HostNet:
    links = tuple(LinkInfo(name, index, 1450, True) for index, (name, _) in enumerate(entries, 1))
    parsed = [Prefix.parse(text) for _, text in entries]
    return HostNet(links, tuple(AddrInfo(i, p.ip, p.length) for i, p in enumerate(parsed, 1)), (), {})


@pytest.mark.parametrize("text", ["10.244.3.1/24", "10.5.7.1/24", "fd00:244:0:3::1/64"])
def test_bridge_of_an_earlier_subnet_is_named_with_the_remedy(text: str) -> None:
    assert misplaced(host(("cni0", text)), "eth0", NETWORKS, SUBNETS) == [
        f"cni0 has an address of another subnet, {text}, but this host's subnet is 10.244.7.0/24+fd00:244:0:7::/64: "
        f"its containers are cut off and new ones may fail; stop them, then ip addr del {text} dev cni0"
    ]


def test_everything_that_is_right_or_not_of_the_cluster_is_passed_over() -> None:
    right = [("cni0", "10.244.7.1/24"), ("flannel.1", "10.244.7.0/32"), ("cni1", "fd00:244:0:7::1/64")]
    foreign = [("eth0", "198.18.0.11/24"), ("docker0", "172.17.0.1/16"), ("lo", "127.0.0.1/8"), ("eth1", "fe80::1/64")]
    external = [("eth2", "10.5.0.9/16")]
    stale_but_ours = [("flannel.1", "10.244.3.0/32"), ("flannel-v6.1", "fd00:244:0:3::/128")]
    assert misplaced(host(*right, *foreign, *stale_but_ours, *external), "eth2", NETWORKS, SUBNETS) == []


def test_several_addresses_of_one_bridge_are_one_sentence() -> None:
    found = HostNet(
        (LinkInfo("cni0", 1, 1450, True),),
        tuple(AddrInfo(1, parse_ip(ip), 24) for ip in ("10.244.3.1", "10.244.4.1")),
        (),
        {},
    )
    assert len(misplaced(found, "eth0", NETWORKS, SUBNETS)) == 1
