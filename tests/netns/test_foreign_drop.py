"""Rules of others that drop overlay traffic are named, and none that may let it pass (F08). Listed by the real nft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from flanneld.lab import Lab
from flanneld.lab.probe import ping
from flanneld.model.addr import Prefix
from flanneld.plan.foreign_drop import certain_drops, forward_tables, walks
from tests.netns.test_audit import status
from tests.support.live import until
from tests.support.netns import Netns

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
NETWORK, SUBNET = Prefix.parse("10.244.0.0/16"), Prefix.parse("10.244.7.1/24")
IN = "new connections from 10.244.0.0/16 to 10.244.7.0/24"
OUT = "new connections from 10.244.7.0/24 to 10.244.0.0/16"
PACKETS = walks(NETWORK, SUBNET, frozenset({"flannel.1"}))
HEAD = "type filter hook forward priority 0"

FIREWALLD = """
table inet firewalld {
  chain allow { tcp dport 22 ct state new accept; }
  chain zone_public { return; }
  chain zone_trusted { accept; }
  chain policies {
    iifname "eth1" oifname "eth2" jump zone_trusted
    ip saddr 192.0.2.0/24 jump zone_trusted
    jump zone_public
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump policies
    reject with icmpx admin-prohibited
  }
}"""

DOCKER = f"""
table ip filter {{
  chain DOCKER {{ ip daddr 172.17.0.2 iifname != "docker0" tcp dport 80 accept; }}
  chain DOCKER-USER {{ counter return; }}
  chain FORWARD {{
    {HEAD}; policy drop;
    counter jump DOCKER-USER
    oifname "docker0" ct state related,established counter accept
    oifname "docker0" counter jump DOCKER
    iifname "docker0" oifname != "docker0" counter accept
  }}
}}"""

DROPPING = {
    "firewalld": (FIREWALLD, [("inet firewalld", "filter_FORWARD", IN), ("inet firewalld", "filter_FORWARD", OUT)]),
    # what Docker lets out of docker0 may be a pod's, so only the way in is certain
    "docker": (DOCKER, [("ip filter", "FORWARD", IN)]),
    "bare policy": (
        f"table inet strict {{ chain through {{ {HEAD}; policy drop; }}; }}",
        [("inet strict", "through", IN), ("inet strict", "through", OUT)],
    ),
    "rule without matches": (
        "table ip strict { chain through { type filter hook forward priority -10; counter log drop; }; }",
        [("ip strict", "through", IN), ("ip strict", "through", OUT)],
    ),
    "block": (
        f"table ip strict {{ chain through {{ {HEAD}; ip daddr 10.0.0.0/8 ip saddr != 192.0.2.0/24 drop; }}; }}",
        [("ip strict", "through", IN), ("ip strict", "through", OUT)],
    ),
    "our device": (
        f'table ip strict {{ chain through {{ {HEAD}; iifname "flannel*" reject; }}; }}',
        [("ip strict", "through", IN)],
    ),
}

PASSING = {
    "the network": "ip saddr 10.244.0.0/16 accept; ip daddr 10.244.0.0/16 accept",
    "all of ten": "ip saddr 10.0.0.0/8 ip daddr 10.0.0.0/8 accept",
    "a set": "ip saddr { 10.244.0.0/16, 192.0.2.1 } accept",
    "a named set": "ip saddr @friends accept",
    "part of the network": "ip saddr 10.244.0.0/20 accept",
    "a device": 'iifname "flannel.1" accept; oifname "flannel.1" accept',
    "any bridge": 'iifname "cni0" accept; oifname "cni0" accept',
    "a mark": "meta mark & 0x4000 == 0x4000 accept",
    "a port": "tcp dport 443 accept",
    "a rate": "limit rate 100/second accept",
    "a map": 'iifname vmap { "flannel.1" : accept, "cni0" : accept }',
    "new ones": "ct state new accept",
    "deep": "jump one",
}


@pytest.fixture(scope="module")
def space() -> Iterator[Netns]:
    with Netns("fbdrop") as namespace:
        yield namespace


def load(space: Netns, text: str) -> list[object]:
    """All tables at the forward hook of a ruleset, as the daemon would read them."""
    space.run("nft", "flush", "ruleset")
    space.run("nft", text)
    chains = json.loads(space.run("nft", "-j", "list", "chains"))["nftables"]
    listing: list[object] = []
    for name in forward_tables(chains):
        listing += json.loads(space.run("nft", "-j", "-t", "list", "table", *name))["nftables"]
    return listing


@pytest.mark.parametrize("case", DROPPING)
def test_a_chain_that_drops_whatever_we_accept_is_named(space: Netns, case: str) -> None:
    text, named = DROPPING[case]
    found = "\n".join(certain_drops(load(space, text), PACKETS))
    for table, chain, what in ((t, c, w) for t, c, w in named):
        assert f"nftables table {table} drops " in found
        assert f"in its chain {chain}, " in found
        assert what in found
    assert (IN in found, OUT in found) == tuple(any(what == w for *_, w in named) for what in (IN, OUT))


@pytest.mark.parametrize("case", PASSING)
def test_a_chain_that_may_let_it_pass_is_not_accused(space: Netns, case: str) -> None:
    named_set = "set friends { type ipv4_addr; flags interval; elements = { 10.244.0.0/16 }; };"
    deep = "chain two { ip saddr 10.0.0.0/8 accept; }; chain one { goto two; };"
    text = f"table ip other {{ {named_set} {deep} chain through {{ {HEAD}; policy drop; {PASSING[case]}; }}; }}"
    assert certain_drops(load(space, text), PACKETS) == []


def test_what_others_do_elsewhere_or_to_others_is_not_looked_at(space: Netns) -> None:
    text = f"""
    table ip6 strict {{ chain through {{ {HEAD}; policy drop; }}; }}
    table inet other {{ chain in {{ type filter hook input priority 0; policy drop; }}
                        chain through {{ {HEAD}; ip6 saddr != ::1 drop; meta nfproto ipv6 drop; }}; }}
    table inet old {{ chain through {{ {HEAD}; ct state established drop; }}; }}
    table bridge other {{ chain through {{ {HEAD}; policy drop; }}; }}"""
    assert certain_drops(load(space, text), PACKETS) == []
    six = walks(Prefix.parse("fd00:244::/48"), Prefix.parse("fd00:244:0:7::/64"), frozenset({"flannel-v6.1"}))
    assert len(certain_drops(load(space, text), six)) == 2


def test_iptables_forward_rules_of_ours_are_seen_behind_a_dropping_policy(space: Netns) -> None:
    space.run("nft", "flush", "ruleset")
    script = """
    iptables-nft -P FORWARD DROP
    iptables-nft -N FLANNEL-FWD
    iptables-nft -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT
    iptables-nft -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment 'flanneld forward' -j ACCEPT
    iptables-nft -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD
    """
    space.run("sh", "-ec", script)
    listing = json.loads(space.run("nft", "-j", "list", "table", "ip", "filter"))["nftables"]
    assert certain_drops(listing, PACKETS) == []


def lost(lab: Lab) -> int:
    """Packets lost from the first host's pod to the second one's."""
    return ping(lab.host(1).pod, lab.host(2).pod_address()).lost


@pytest.mark.parametrize(
    ("drop", "accept", "named"),
    [
        (
            "iptables-nft -P FORWARD DROP",
            "iptables-nft -I FORWARD -s 10.244.0.0/16 -j ACCEPT",
            "table ip filter drops new connections from 10.244.0.0/16",
        ),
        (
            f"nft table inet strict {{ chain through {{ {HEAD}; policy drop; }}; }}",
            "nft delete table inet strict",
            "table inet strict drops new connections from 10.244.0.0/16",
        ),
    ],
    ids=["iptables", "nftables"],
)
def test_an_operator_reads_in_the_status_who_drops_and_when_it_is_over(
    make_lab: MakeLab, drop: str, accept: str, named: str
) -> None:
    """With nftables ours is a table of its own: Docker's policy in iptables' table still drops."""
    lab = make_lab(2, config={"EnableNFTables": True})
    lab.up()
    host = lab.host(2)
    assert lost(lab) == 0
    host.run("sh", "-c", drop if drop.startswith("ip") else f"nft '{drop.removeprefix('nft ')}'")
    until(lambda: status(host)["remarks"], "the dropping chain is told")
    [remark] = status(host)["remarks"]
    assert named in remark
    assert "by its policy" in remark
    assert lost(lab), "it is true"
    host.run("sh", "-c", accept)
    until(lambda: not status(host)["remarks"], "it is over")
    assert lost(lab) == 0
