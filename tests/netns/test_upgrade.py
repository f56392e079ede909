"""A cluster is upgraded and downgraded one host at a time across a change of the state directory's format.

Pods ping each other meanwhile; what the other version of the program would have left is written in its place
(design/adr-0012).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flanneld.lab import Lab
from flanneld.lab.node import Host
from flanneld.lab.probe import ping_matrix
from flanneld.lab.spec import SUBNETS_KEY
from flanneld.model.addr import Family
from tests.support.live import Stream

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.needs("vxlan", "iptables")]

MakeLab = Callable[..., Lab]


def state_files(host: Host) -> list[Path]:
    """The versioned files: of the machine, and of the network."""
    return sorted(
        path for path in host.daemon.state_dir.rglob("*") if path.name == "identity" or path.suffix == ".json"
    )


def as_version_1(text: str) -> str:
    """What the first version of the program would have written instead."""
    file = json.loads(text)
    return json.dumps({"kind": file["kind"], **file["content"], "version": 1}) + "\n"


def as_of_tomorrow(text: str) -> str:
    """What a program to come might write: nobody knows but for its head."""
    return json.dumps({"kind": json.loads(text)["kind"], "version": 99, "cbor": "o2FhAWFiAg=="})


def leases(lab: Lab) -> dict[str, str]:
    """Which subnet which machine holds, and under which address."""
    values = {key: json.loads(value) for key, value in lab.etcd.items(SUBNETS_KEY).items()}
    return {key: value["PublicIP"] + value["FlanneldID"] for key, value in values.items()}


def change_version(host: Host, left_behind: Callable[[str], str]) -> None:
    """Stop, let the other version have been here, start ours. A reboot has taken ``subnet.env``, so state counts."""
    host.daemon.stop()
    for path in state_files(host):
        path.write_text(left_behind(path.read_text()))
    host.daemon.subnet_file.unlink()
    host.daemon.start()
    host.daemon.wait_ready()


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_upgrade_and_downgrade_host_by_host_keep_subnets_and_lose_no_ping(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(3, backend={"Type": backend})
    lab.up()
    before, env = leases(lab), [host.subnet_env() for host in lab.hosts]
    streams = [Stream(lab, source=source, target=target) for source, target in ((1, 2), (2, 3), (3, 1))]
    for left_behind in (as_version_1, as_of_tomorrow, as_version_1):
        for host in lab.hosts:
            change_version(host, left_behind)
    assert [stream.lost() for stream in streams] == [0, 0, 0]
    assert leases(lab) == before
    assert [host.subnet_env() for host in lab.hosts] == env
    assert not any(outcome.lost for outcome in ping_matrix(lab, Family.V4).values())
    for host in lab.hosts:
        assert [json.loads(path.read_text())["version"] for path in state_files(host)] == [2, 2]
        kept = sorted(path.name.rpartition(".")[2] for path in host.daemon.state_dir.rglob("*.format-99"))
        assert kept == ["format-99", "format-99"], "nothing is lost"
        assert host.daemon.log().count("a newer flanneld wrote it") == 2
        assert "Traceback" not in host.daemon.log()


def test_a_lost_lease_comes_back_with_the_subnet_that_an_older_version_remembered(make_lab: MakeLab) -> None:
    """Nothing else knows it: the store was wiped, the machine booted."""
    lab = make_lab(2)
    lab.up()
    host = lab.host(1)
    env = host.subnet_env()
    host.daemon.stop()
    assert lab.etcd.delete(SUBNETS_KEY + env["FLANNEL_SUBNET"].replace(".1/", ".0-"))
    for path in state_files(host):
        path.write_text(as_version_1(path.read_text()))
    host.daemon.subnet_file.unlink()
    host.daemon.start()
    host.daemon.wait_ready()
    assert host.subnet_env() == env
