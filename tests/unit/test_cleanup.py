"""What of a host is taken for one network's, and what is left to others. The kernel's part is in tests/netns."""

from __future__ import annotations

from pathlib import Path

import pytest

from flanneld.ctl import main as flannelctl
from flanneld.ctl.cleanup import _serves
from flanneld.ctl.remains import state_files
from flanneld.model.addr import IP, MAC, Prefix
from flanneld.model.objects import (
    PROTO_OURS,
    Address,
    Fdb,
    KernelObject,
    Link,
    Neighbour,
    Route,
    RouteKind,
    Sysctl,
    Vxlan,
)
from flanneld.model.options import Options
from flanneld.model.state import State
from flanneld.plan.cleanup import Scope, around, covering, find_devices, handover, ownership, removal, underlays
from flanneld.plan.traffic_iptables import remnants

NETWORK, OTHER = Prefix.parse("10.244.0.0/16"), Prefix.parse("10.66.0.0/16")
OWN, PEER = Prefix.parse("10.244.7.0/24"), Prefix.parse("10.244.8.0/24")
SCOPE = Scope("flanneld /coreos.com/network", (NETWORK,), (OWN,))
GATEWAY = IP(bytes((198, 18, 0, 12)))
BASE, MAC_8 = PEER.ip, MAC(b"\x02\0\0\0\0\x08")


def link(name: str, alias: str = "") -> Link:
    return Link(name, MAC(b"\x02\0\0\0\0\x01"), 1450, True, alias, Vxlan(1, 2, None, 8472))


def address(device: str, block: str) -> Address:
    prefix = Prefix.parse(block)
    return Address(device, prefix.ip, prefix.length)


class TestDevices:
    @pytest.mark.parametrize(
        ("there", "at", "ours"),
        [
            (link("flannel.1", SCOPE.alias), "", True),
            (link("was-flannel", SCOPE.alias), "", True),
            (link("flannel.1", "flanneld /other"), "10.244.7.0/32", False),
            (link("flannel.1"), "10.244.7.0/32", True),
            (link("flannel-v6.1"), "10.244.7.0/32", True),
            (link("flannel0"), "10.244.7.0/32", True),
            (link("flannel.1"), "10.66.1.0/32", False),
            (link("flannel.1"), "", False),
            (link("cni0"), "10.244.7.1/24", False),
            (link("vx1"), "10.244.7.0/32", False),
            (link("flannel-wg"), "10.244.7.0/32", False),
        ],
    )
    def test_a_mark_or_a_name_with_an_address_makes_one_ours(self, there: Link, at: str, ours: bool) -> None:
        found = find_devices(SCOPE, [there], [address(there.name, at)] if at else [], [])
        assert (there.name in found.ours, found.unclear) == (ours, ())

    def test_a_route_into_the_network_tells_as_well_as_an_address(self) -> None:
        found = find_devices(SCOPE, [link("flannel.1")], [], [Route(PEER, "flannel.1", PEER.ip, onlink=True)])
        assert found.ours == {"flannel.1"}

    def test_while_no_network_is_known_a_device_without_mark_is_nobodys(self) -> None:
        found = find_devices(SCOPE._replace(networks=()), [link("flannel.1"), link("flannel.2", "flanneld /x")], [], [])
        assert found == (frozenset(), ("flannel.1",))

    def test_the_operator_may_name_one(self) -> None:
        scope = SCOPE._replace(networks=(), devices=frozenset({"flannel.1"}))
        assert find_devices(scope, [link("flannel.1")], [], []).ours == {"flannel.1"}


class TestNetworks:
    def test_a_covering_route_tells_the_network(self) -> None:
        routes = [Route(NETWORK, "flannel.1"), Route(PEER, "flannel.1", PEER.ip), Route(OTHER, "eth0")]
        assert covering(routes, {"flannel.1"}) == (NETWORK,)

    def test_rules_around_our_subnet_tell_the_network(self) -> None:
        assert around((OWN,), [OWN, NETWORK, OTHER, Prefix.parse("0.0.0.0/0")]) == (NETWORK,)


class TestRemoval:
    def test_routes_of_ours_and_in_gos_shape_go_and_others_stay(self) -> None:
        ours = [
            Route(PEER, "eth0", GATEWAY, proto=PROTO_OURS),
            Route(Prefix.parse("10.244.9.0/24"), "eth0", GATEWAY),
            Route(Prefix.parse("10.244.128.0/17"), "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=65535),
        ]
        others = [
            Route(Prefix.parse("10.244.0.0/20"), "eth0", GATEWAY),
            Route(Prefix.parse("10.98.0.0/16"), "eth0", GATEWAY, proto=PROTO_OURS),
            Route(OWN, "cni0", proto=2),
            Route(Prefix.parse("10.244.10.0/24"), "eth0", GATEWAY, proto=4),
        ]
        own = ownership(SCOPE, frozenset())
        assert underlays(own, ours + others) == ["eth0"]
        ops = removal(State.of(ours + others), own._replace(underlay="eth0"))
        assert sorted(str(op) for op in ops) == sorted(f"delete {route}" for route in ours)


class TestHandover:
    def test_what_go_would_have_made_stays_and_the_rest_goes(self) -> None:
        device = link("flannel.1", SCOPE.alias)
        kept: list[KernelObject] = [
            Address("flannel.1", OWN.ip, 32),
            Fdb("flannel.1", MAC_8, GATEWAY),
            Neighbour("flannel.1", BASE, MAC_8),
            Route(PEER, "flannel.1", BASE, onlink=True),
        ]
        gone: list[KernelObject] = [
            Route(NETWORK, "flannel.1", scope=253),
            Route(Prefix.parse("10.244.128.0/17"), "", kind=RouteKind.UNREACHABLE, proto=PROTO_OURS, metric=65535),
            Neighbour("flannel.1", PEER.host(9), MAC_8, permanent=False),
        ]
        direct = Route(Prefix.parse("10.244.9.0/24"), "eth0", GATEWAY, proto=PROTO_OURS)
        setting = "net/ipv4/neigh/flannel.1/app_solicit"
        own = ownership(SCOPE, frozenset({"flannel.1"}))._replace(underlay="eth0")
        ops = handover(State.of([device, *kept, *gone, direct, Sysctl(setting, "3")]), own, {setting: "0"})
        assert {str(op) for op in ops} == {
            *(f"delete {obj}" for obj in gone),
            f"put {direct}",
            f"put sysctl {setting} = 0",
            f"put {device}",
        }
        assert next(op.obj for op in ops if op.obj == direct._replace(proto=3))
        assert next(op.obj for op in ops if op.obj == device._replace(alias=""))


SAVED = """\
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.7.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
{}COMMIT
"""
OTHERS_RULE = '-A FLANNEL-POSTRTG -s 10.66.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE\n'


class TestRules:
    def test_a_chain_of_one_network_goes_as_a_whole(self) -> None:
        [found] = remnants(SAVED.format(""), [NETWORK])
        assert found.text == "nat: chain FLANNEL-POSTRTG with 3 rules and 1 in POSTROUTING"
        assert "-X FLANNEL-POSTRTG" in found.payload
        assert (found.others, found.is_alone) == (frozenset(), True)

    def test_of_a_chain_of_two_networks_only_ours_goes(self) -> None:
        """Two Go flannelds on one host add to one chain."""
        [found] = remnants(SAVED.format(OTHERS_RULE), [NETWORK])
        assert found.payload.splitlines() == [
            "*nat",
            '-D FLANNEL-POSTRTG -s 10.244.7.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
            '-D FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE',
            "COMMIT",
        ]
        assert found.others == {OTHER}

    @pytest.mark.parametrize(
        "more", ["-A PREROUTING -j ACCEPT\n", "-A POSTROUTING -s 192.0.2.0/24 -j RETURN\n", ":DOCKER - [0:0]\n"]
    )
    def test_a_table_with_anything_of_others_is_not_ours_to_remove(self, more: str) -> None:
        [found] = remnants(SAVED.format(more), [NETWORK])
        assert not found.is_alone

    def test_a_policy_is_somebodys(self) -> None:
        [found] = remnants(SAVED.format("").replace(":PREROUTING ACCEPT", ":PREROUTING DROP"), [NETWORK])
        assert not found.is_alone


class TestDaemons:
    @pytest.mark.parametrize(
        ("line", "environ", "serves"),
        [
            ("/opt/bin/flanneld --iface=eth0", (), True),
            ("/usr/bin/python3 /opt/flanneld/bin/flanneld", (), True),
            ("/usr/bin/python3 -m flanneld", (), True),
            ("flanneld -etcd-prefix /other --subnet-file=/run/other.env", (), False),
            ("flanneld -etcd-prefix /other", (), True),
            ("flanneld --subnet-file=/run/other.env", ("FLANNELD_ETCD_PREFIX=/other",), False),
            ("flanneld --kube-subnet-mgr --subnet-file=/run/other.env", (), False),
            ("flanneld --a-flag-of-tomorrow", (), True),
            ("vi flanneld.conf", (), False),
            ("", (), False),
        ],
    )
    def test_one_of_our_network_or_with_our_file_is_in_the_way(
        self, line: str, environ: tuple[str, ...], serves: bool
    ) -> None:
        assert _serves(line.split(), environ, Options()) is serves


class TestStateFiles:
    def test_the_last_network_takes_the_machines_files_along(self, tmp_path: Path) -> None:
        for name in ("identity", "identity.unusable", "a-1.json", "a-1.lock", "a-1.cache", "b-2.json", "machine-id"):
            (tmp_path / name).touch()
        assert self.names(tmp_path, "a-1") == ["a-1.cache", "a-1.json", "a-1.lock"]
        (tmp_path / "b-2.json").unlink()
        assert self.names(tmp_path, "a-1") == ["a-1.cache", "a-1.json", "a-1.lock", "identity", "identity.unusable"]
        (tmp_path / "machine-id").unlink()
        assert self.names(tmp_path, "a-1")[-1] == tmp_path.name, "and the directory, when nothing is left"

    @staticmethod
    def names(directory: Path, stem: str) -> list[str]:
        return [item.text.rpartition("/")[2] for item in state_files(directory, stem).items]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--handover", "--lease"], "--handover keeps lease and state"),
        (["--lease", "--kube-subnet-mgr"], "--lease is for etcd"),
        (["--network=10.244"], "use a block such as 10.244.0.0/16"),
        (["--vni=0"], "use a number from 1 to"),
    ],
)
def test_a_wrong_command_line_is_refused(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert flannelctl.main(["cleanup", *flags]) == 2
    assert sentence in capsys.readouterr().err
