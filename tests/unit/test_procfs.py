"""Kernel settings by path; warnings, never an exit (contract 0.1 step 11, failure F37)."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from flanneld.errors import KernelError
from flanneld.kernel import procfs
from flanneld.model.addr import Family

V4, V6 = Family.V4, Family.V6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A /proc/sys on which there is nothing to warn of."""
    for name, value in {
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "1",
        "net/bridge/bridge-nf-call-iptables": "1",
        "net/bridge/bridge-nf-call-ip6tables": "1",
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/eth0.100/rp_filter": "0",
    }.items():
        put(tmp_path, name, value)
    return tmp_path


def put(root: Path, name: str, value: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(value + "\n")


def test_device_name_with_a_dot_is_one_path_component() -> None:
    assert str(procfs.conf(V6, "flannel.1", "accept_ra")) == "/proc/sys/net/ipv6/conf/flannel.1/accept_ra"


def test_real_setting_is_read() -> None:
    assert procfs.read(procfs.PROC_SYS / "kernel" / "ostype") == "Linux"


def test_setting_the_kernel_does_not_have_reads_as_none() -> None:
    assert procfs.read(procfs.conf(V4, "nosuchdevice", "rp_filter")) is None


def test_writing_what_the_kernel_does_not_have_is_refused_with_remedy() -> None:
    with pytest.raises(KernelError, match=r"No such file or directory \(this kernel has no such setting"):
        procfs.write(procfs.conf(V4, "nosuchdevice", "rp_filter"), 1)


def test_value_that_stands_already_needs_no_right_to_write() -> None:
    procfs.write(procfs.PROC_SYS / "kernel" / "ostype", "Linux")


def test_refused_write_is_a_kernel_error_with_its_errno() -> None:
    # not writable by anybody
    with pytest.raises(KernelError) as caught:
        procfs.write(procfs.PROC_SYS / "kernel" / "ostype", "Plan9")
    assert caught.value.code in (errno.EACCES, errno.EPERM, errno.EROFS)
    assert str(caught.value).startswith("write Plan9 to /proc/sys/kernel/ostype: ")


def test_written_value_is_read_back(root: Path) -> None:
    path = root / "net/ipv4/ip_forward"
    procfs.write(path, 0)
    assert procfs.read(path) == "0"


def test_well_set_host_gives_no_warning(root: Path) -> None:
    assert procfs.warnings((V4, V6), "eth0.100", iptables=True, root=root) == []


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("net/ipv4/ip_forward", "0", "IPv4 forwarding is off"),
        ("net/ipv6/conf/all/forwarding", "0", "IPv6 forwarding is off"),
        ("net/bridge/bridge-nf-call-iptables", None, "IPv4 packets between containers of one bridge .*modprobe"),
        ("net/bridge/bridge-nf-call-ip6tables", "0", "IPv6 packets between containers of one bridge .*write 1 to"),
        ("net/ipv4/conf/all/rp_filter", "1", "rp_filter is strict on eth0.100"),
        ("net/ipv4/conf/eth0.100/rp_filter", "1", "rp_filter is strict on eth0.100"),
    ],
)
def test_bad_setting_gives_one_warning(root: Path, name: str, value: str | None, warning: str) -> None:
    (root / name).unlink() if value is None else put(root, name, value)
    found = procfs.warnings((V4, V6), "eth0.100", iptables=True, root=root)
    assert len(found) == 1
    assert re.match(warning, found[0])


@pytest.mark.parametrize(
    ("everywhere", "device", "to_write"),
    [
        ("1", "0", "net/ipv4/conf/flannel.1/forwarding"),
        ("0", "0", "net/ipv4/ip_forward"),
        ("0", None, "net/ipv4/ip_forward"),
        ("0", "1", ""),
        ("1", None, ""),
    ],
    ids=["off for our device", "off", "off, no device yet", "on for some devices", "on, no device yet"],
)
def test_forwarding_is_what_the_device_by_which_packets_come_has(
    root: Path, everywhere: str, device: str | None, to_write: str
) -> None:
    put(root, "net/ipv4/ip_forward", everywhere)
    if device:
        put(root, "net/ipv4/conf/flannel.1/forwarding", device)
    found = procfs.forwarding_off((V4, V6), ["flannel.1"], root)
    assert len(found) == bool(to_write)
    assert all(text.endswith(f"write 1 to {root / to_write}") for text in found)


def test_loose_source_validation_wins_over_strict(root: Path) -> None:
    put(root, "net/ipv4/conf/all/rp_filter", "2")
    put(root, "net/ipv4/conf/eth0.100/rp_filter", "1")
    assert procfs.reverse_path_strict("eth0.100", root) == []


def test_families_and_tools_not_in_use_are_not_warned_about(root: Path) -> None:
    put(root, "net/ipv6/conf/all/forwarding", "0")
    put(root, "net/bridge/bridge-nf-call-iptables", "0")
    assert procfs.warnings((V4,), "eth0.100", iptables=False, root=root) == []
