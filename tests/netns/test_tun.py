"""TUN devices in a namespace: made, adopted, refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator

import pytest

from flanneld.errors import KernelError
from flanneld.kernel.tun import open_tun, set_persist
from tests.support.netns import Netns

pytestmark = pytest.mark.kernel


@pytest.fixture
def space() -> Iterator[Netns]:
    with Netns("udptun") as made:
        yield made


def exists(space: Netns) -> bool:
    return any(link.get("ifname") == "flannel0" for link in json.loads(space.run("ip", "-j", "link")))


def test_a_tun_goes_with_its_descriptor(space: Netns) -> None:
    fd = space.call(open_tun, "flannel0")
    assert exists(space)
    os.close(fd)
    assert not exists(space)


def test_a_persistent_tun_stays_and_is_adopted_by_the_next_owner(space: Netns) -> None:
    fd = space.call(open_tun, "flannel0")
    set_persist(fd, True)
    os.close(fd)
    before = space.run("cat", "/sys/class/net/flannel0/ifindex", check=False) if exists(space) else ""
    fd = space.call(open_tun, "flannel0")
    assert space.run("cat", "/sys/class/net/flannel0/ifindex", check=False) == before
    set_persist(fd, False)
    os.close(fd)
    assert not exists(space)


def test_reading_an_idle_tun_does_not_block(space: Netns) -> None:
    fd = space.call(open_tun, "flannel0")
    try:
        space.run("sysctl", "-qw", "net.ipv6.conf.flannel0.disable_ipv6=1")
        space.run("ip", "link", "set", "flannel0", "up")
        with pytest.raises(BlockingIOError):
            os.read(fd, 2000)
    finally:
        os.close(fd)


def test_a_tun_that_another_process_holds_is_refused_with_a_remedy(space: Netns) -> None:
    fd = space.call(open_tun, "flannel0")
    try:
        with pytest.raises(KernelError, match="second flanneld") as caught:
            space.call(open_tun, "flannel0")
        assert caught.value.code == errno.EBUSY
    finally:
        os.close(fd)


def test_a_device_of_another_kind_is_refused_with_a_remedy(space: Netns) -> None:
    space.run("ip", "link", "add", "flannel0", "type", "veth", "peer", "name", "other")
    with pytest.raises(KernelError, match="not a TUN"):
        space.call(open_tun, "flannel0")


@pytest.mark.parametrize("name", ["", "flannel%d", "a-name-of-sixteen"])
def test_a_name_the_kernel_would_change_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match="device name"):
        open_tun(name)
