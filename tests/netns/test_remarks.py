"""A host on which much is not as it should be says each thing in a line of its own, and works as far as it can."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from tests.netns.test_audit import ctl, status
from tests.support.live import until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]

BEGIN = """
ip link add vpn0 type veth peer name far0; ip addr add 10.244.200.1/20 dev vpn0; ip link set vpn0 up
ip link add vpn1 type veth peer name far1; ip addr add 10.244.240.1/20 dev vpn1; ip link set vpn1 up
ip rule add to 10.244.0.0/16 pref 99 prohibit
nft 'table inet strict { chain through { type filter hook forward priority 0; policy drop; }; }'
echo 0 > /proc/sys/net/ipv4/ip_forward
"""
END = """
ip link del vpn0; ip link del vpn1; ip rule del pref 99
nft delete table inet strict
echo 1 > /proc/sys/net/ipv4/ip_forward
"""
SAID = (
    "Network 10.244.0.0/16 contains 10.244.192.0/20, a network of interface vpn0",
    "Network 10.244.0.0/16 contains 10.244.240.0/20, a network of interface vpn1",
    "packets to ",
    "nftables table inet strict drops ",
    "IPv4 forwarding is off",
)


def test_all_that_is_wrong_on_a_host_is_shown_a_line_each_and_ends_by_itself(make_lab: MakeLab) -> None:
    with make_lab(2) as lab:
        host = lab.host(1)
        host.run("sh", "-c", BEGIN)
        until(lambda: len(status(host)["remarks"]) == len(SAID), "all of it is noticed")
        found = status(host)
        assert all(any(text.startswith(begin) for text in found["remarks"]) for begin in SAID), found["remarks"]
        assert (found["state"], found["problems"]) == ("degraded", [])
        lines = ctl(host, "status").splitlines()
        assert [line for line in lines if line.startswith("remark ")] == [
            f"remark     {text}" for text in found["remarks"]
        ]
        assert "peers      2 leases, ours included; 253 of 255 subnets are free" in lines
        assert host.daemon.ask("/readyz") == (200, "\n".join(("flanneld is ready", *found["remarks"])))
        host.run("sh", "-c", END)
        until(lambda: status(host)["state"] == "ready", "nothing to remark any more")
