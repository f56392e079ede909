"""A cluster network that overlaps networks of the host: refused before anything is touched, waited for, told (F22)."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.spec import CONFIG_KEY
from tests.netns.test_end_to_end import Stream, assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables", "nft")]

MakeLab = Callable[..., Lab]
OVER_UNDERLAY = {"Network": "198.18.0.0/16"}
"""The lab's underlay is 198.18.0.0/24 with a default route; etcd is in it."""


def host_state(host: Host) -> str:
    """Devices, addresses, routes and rules of a host."""
    looks = ("ip -o link", "ip -o addr", "ip route", "ip -6 route", "iptables-save -t nat", "nft list ruleset")
    shown = [host.run(*look.split()).stdout for look in looks]
    return "\n".join(line for text in shown for line in text.splitlines() if not line.startswith(("#", ":")))


def add_interface(host: Host, name: str, address: str) -> None:
    host.ip("link", "add", name, "type", "dummy")
    host.ip("addr", "add", address, "dev", name)
    host.ip("link", "set", name, "up")


@pytest.mark.parametrize("network", ["198.18.0.0/16", "198.18.0.0/24"], ids=["around", "equal"])
def test_an_underlay_in_the_network_is_refused_before_anything_is_touched(make_lab: MakeLab, network: str) -> None:
    lab = make_lab(1, config={"Network": network})
    lab.up(daemons=False)
    host = lab.host(1)
    before = host_state(host)
    host.daemon.start()
    until(lambda: "--allow-overlap" in host.daemon.ask("/readyz")[1], "the refusal is shown")
    said = host.daemon.ask("/readyz")[1]
    assert f"Network {network}" in said
    assert "interface eth0" in said
    assert host.daemon.is_running(), "another configuration may come"
    assert host_state(host) == before
    assert not host.daemon.subnet_file.exists()
    assert lab.etcd.items("/coreos.com/network/subnets/") == {}
