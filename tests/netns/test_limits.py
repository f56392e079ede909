"""A host that runs out of something: the daemon says so, does not end, and puts right what it could not, later."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from flanneld.lab import Lab
from tests.support.live import assert_all_pods_connected, until

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]


@pytest.mark.parametrize("nftables", [False, pytest.param(True, marks=pytest.mark.needs("nft"))])
def test_a_daemon_without_a_descriptor_left_goes_on_and_repairs_when_there_are_some(
    make_lab: MakeLab, nftables: bool
) -> None:
    with make_lab(2, config={"EnableNFTables": nftables}) as lab:
        host = lab.host(1)
        pid = host.daemon.pid
        assert pid is not None
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))  # what is open stays open
        host.run("sh", "-c", "nft flush ruleset; iptables -w -t nat -F; iptables -w -F", check=False)
        host.run("sh", "-c", "ip link set flannel.1 down; ip rule add pref 99 to 192.0.2.0/24 table 1099")
        until(lambda: "firewall rules are not in place" in host.daemon.log(), "it is told")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        until(lambda: "firewall rules are in place again" in host.daemon.log(), "the rules are back")
        host.daemon.wait_ready()
        assert_all_pods_connected(lab)
        assert host.daemon.pid == pid
        assert "Traceback" not in host.daemon.log()
