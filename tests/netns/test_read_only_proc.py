"""A container without a writable /proc/sys, as Kubernetes gives it: the daemon must work there all the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.netns import Netns, join

pytestmark = [pytest.mark.kernel, pytest.mark.needs("vxlan")]

CODE = """
import asyncio, socket
from flanneld.kernel.rtnl import Rtnl
from tests.scenario.world import Host, peer

async def main():
    host = Host(Rtnl(), socket.if_nametoindex("eth0"), page_ahead=0)
    host.lease([peer(2)])
    await host.settle()
    print("problem:", host.problem)
    assert await host.look() == 1

asyncio.run(main())
"""


@pytest.fixture
def ns() -> Iterator[Netns]:
    with Netns("fl-ro") as ns, Netns("fl-ro-peer") as other:
        join(ns, "eth0", other, "eth0")
        ns.run("ip", "addr", "add", "198.18.0.1/24", "dev", "eth0")
        yield ns


def test_settings_are_made_over_netlink(ns: Netns) -> None:
    script = 'mount -t proc proc /proc; mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$@"'
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", sys.executable, "-c", CODE]
    argv = ["ip", "netns", "exec", ns.name, *inside]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "problem: None" in done.stdout
    for setting, value in (("app_solicit", "3"), ("mcast_solicit", "0"), ("unres_qlen_bytes", "4194304")):
        assert ns.run("cat", f"/proc/sys/net/ipv4/neigh/flannel.1/{setting}").strip() == value
    assert ns.run("cat", "/proc/sys/net/ipv4/conf/flannel.1/arp_ignore").strip() == "8"
