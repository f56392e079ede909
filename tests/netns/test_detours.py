"""A routing rule of another program that leads packets past our routes is told, with its remedy, until it is gone."""

from __future__ import annotations

from contextlib import closing

import pytest

from flanneld.kernel.ways import Ways
from flanneld.lab import Lab
from flanneld.lab.netns import run_in
from flanneld.model.addr import Prefix
from tests.netns.test_audit import MakeLab, status
from tests.support.live import until
from tests.support.netns import Netns

pytestmark = [pytest.mark.kernel]

NETWORK = {"-4": "10.244.0.0/16", "-6": "fd00:244::/48"}
VXLAN, HOST_GW, UDP = ({"Type": kind} for kind in ("vxlan", "host-gw", "udp"))


def _peer(lab: Lab, flag: str) -> str:
    """The block of the second host."""
    key = "FLANNEL_SUBNET" if flag == "-4" else "FLANNEL_IPV6_SUBNET"
    return str(Prefix.parse(lab.host(2).subnet_env()[key]).masked())


@pytest.mark.etcd
@pytest.mark.needs("vxlan", "iptables")
@pytest.mark.parametrize(
    ("backend", "flag", "rule", "told"),
    [
        (VXLAN, "-4", "prohibit", "are refused (Permission denied)"),
        (VXLAN, "-6", "prohibit", "are refused (Permission denied)"),
        (HOST_GW, "-4", "lookup 1099", "go to table 1099, through lo"),
        (UDP, "-4", "blackhole", "are refused (Invalid argument)"),
    ],
)
def test_a_rule_of_another_program_that_leads_past_our_routes_is_named_while_it_is_there(
    make_lab: MakeLab, backend: dict[str, object], flag: str, rule: str, told: str
) -> None:
    with make_lab(hosts=2, backend=backend, ipv6="on" if flag == "-6" else "off") as lab:
        host = lab.host(1)
        host.run("ip", flag, "route", "add", NETWORK[flag], "dev", "lo", "table", "1099")
        host.run("ip", flag, "rule", "add", "to", NETWORK[flag], "pref", "99", *rule.split())
        until(lambda: status(host)["state"] == "degraded", "it is noticed")
        [remark] = status(host)["remarks"]
        block = NETWORK[flag] if backend is UDP else _peer(lab, flag)
        assert f"packets to {block} {told}" in remark
        assert "`ip rule`" in remark
        assert host.daemon.is_ready(), "it is for whoever made the rule to decide"
        assert host.ip(flag, "rule", "show", "pref", "99"), "and it is not ours to remove"
        host.run("ip", flag, "rule", "del", "pref", "99")
        until(lambda: status(host)["state"] == "ready", "it is over")


def test_a_block_whose_packets_take_the_main_table_is_no_detour_whatever_rules_there_are() -> None:
    with Netns("fc") as ns:
        for line in (
            "link set lo up",
            "route add 10.5.0.0/16 dev lo",
            "route add unreachable 10.5.9.0/24",
            "rule add to 10.6.0.0/16 prohibit",
            "rule add fwmark 7 prohibit",
        ):
            ns.run("ip", *line.split())
        ways = run_in(ns.name, Ways)
        blocks = [Prefix.parse(text) for text in ("10.5.1.0/24", "10.5.9.0/24", "10.6.1.0/24", "10.7.0.0/24")]
        with closing(ways):
            assert ways.past(blocks) == {Prefix.parse("10.6.1.0/24"): "are refused (Permission denied)"}
