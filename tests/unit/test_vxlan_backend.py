"""What the vxlan backend makes of devices that are there already."""

from __future__ import annotations

import pytest

from backends.vxlan_backend import VxlanBackend
from flanneld.contracts import Surroundings
from flanneld.errors import ConfigError
from flanneld.model.addr import Family, Prefix, format_mac, parse_ip, parse_mac
from flanneld.model.host import ExtIface
from flanneld.model.identity import mac_for
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.objects import Link, Vxlan

CONF = parse_netconf(b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
IP = parse_ip("198.18.0.1")
EXT = ExtIface("eth0", 2, 1500, IP, None, IP, None)
AROUND = Surroundings(EXT, {Family.V4: Prefix.parse("10.5.1.0/24")}, "flanneld /coreos.com/network", (), False)
MAC = parse_mac("02:aa:aa:aa:aa:aa")


def device(alias: str = "", vni: int = 1) -> dict[str, Link]:
    return {"flannel.1": Link("flannel.1", MAC, 1450, True, alias, Vxlan(vni, 2, IP, 8472))}


def published_mac(backend: VxlanBackend) -> str:
    data = backend.lease_attrs(EXT, "").data
    return data.split(b'"')[-2].decode()


def test_a_surviving_device_keeps_the_mac_that_peers_know() -> None:
    assert published_mac(VxlanBackend(CONF, device(), "0" * 32)) == format_mac(MAC)


def test_without_a_device_the_mac_comes_from_the_identity_and_the_name() -> None:
    identity = "0" * 32
    assert published_mac(VxlanBackend(CONF, {}, identity)) == format_mac(mac_for(identity, "flannel.1"))
    assert published_mac(VxlanBackend(CONF, device(vni=9), identity)) == format_mac(mac_for(identity, "flannel.1"))


@pytest.mark.parametrize("alias", ["", "flanneld /coreos.com/network", "put there by hand"])
def test_a_device_of_ours_or_of_go_flanneld_is_taken(alias: str) -> None:
    assert VxlanBackend(CONF, device(alias), "").data_path(AROUND).desired.links["flannel.1"].mac == MAC


@pytest.mark.parametrize(
    ("alias", "remedy"),
    [
        ("flanneld /other", "flannelctl cleanup --etcd-prefix=/other"),
        ("flanneld /a; reboot", "flannelctl cleanup --etcd-prefix='/a; reboot'"),
        (
            "flanneld kubernetes flannel.example.com",
            "flannelctl cleanup --kube-subnet-mgr --kube-annotation-prefix=flannel.example.com",
        ),
    ],
)
def test_a_device_of_another_network_is_refused_with_the_remedy(alias: str, remedy: str) -> None:
    """Not only the device: routes, rules and files of that network are in the way as well (failures F21)."""
    with pytest.raises(ConfigError) as refusal:
        VxlanBackend(CONF, device(alias), "").data_path(AROUND)
    assert f'flannel.1 belongs to "{alias}"' in str(refusal.value)
    assert "Backend.VNI" in str(refusal.value)
    assert f"if that network is gone: {remedy}, with its --subnet-file" in str(refusal.value)


@pytest.mark.parametrize(("key", "value"), [("VNI", "2"), ("Port", "4789"), ("GBP", "true")])
def test_what_peers_must_share_cannot_change_live(key: str, value: str) -> None:
    backend = VxlanBackend(CONF, {}, "")
    path = backend.data_path(AROUND)
    changed = parse_netconf(f'{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan","{key}":{value}}}}}')
    with pytest.raises(ConfigError, match=f"Backend.{key} changed from .* needs a restart"):
        backend.reconfigure(changed, path)


def test_what_only_this_host_decides_changes_live() -> None:
    backend = VxlanBackend(CONF, {}, "")
    path = backend.data_path(AROUND)
    raw = '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":1400,"Learning":true,"PageAhead":5}}'
    backend.reconfigure(parse_netconf(raw), path)
    link = path.desired.links["flannel.1"]
    assert link.mtu == 1350
    assert link.vxlan is not None
    assert link.vxlan.learning
