"""``flannelctl leases`` with Kubernetes: the same words, nodes instead of keys."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from flanneld.ctl.kube_leases import KubeLeases, kube_options
from flanneld.ctl.lease_view import View
from flanneld.ctl.leases import Changes, Ownership
from flanneld.ctl.main import main
from flanneld.lab.kubeapi import KubeApi
from tests.support.kube import Site, published
from tests.support.wait import until


@pytest.fixture
async def flags(fake: KubeApi, site: Site) -> list[str]:
    await site.create("a", "10.5.1.0/24", annotations=published("192.0.2.1"))
    await site.create("b", "10.5.2.0/24", annotations=published("192.0.2.2"))
    await site.create("bad", "10.5.3.0/24", annotations=published("nonsense"))
    await site.create("other", "10.5.4.0/24")
    return ["--kube-subnet-mgr", f"--kubeconfig-file={site.kubeconfig}"]


async def run(*argv: str) -> int:
    return await asyncio.to_thread(main, ["leases", *argv])


async def test_the_list_names_nodes_and_bad_ones(
    site: Site, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run("list", *flags) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["SUBNET", "PUBLIC", "IP", "BACKEND", "MAC", "NODE"]
    assert lines[1] == ["10.5.1.0/24", "192.0.2.1", "vxlan", "02:00:00:00:00:09", site.node("a")]
    assert lines[3][:3] == ["!", "10.5.3.0/24", "unusable"]
    assert len(lines) == 4
    assert f"node {site.node('bad')}: annotation flannel.alpha.coreos.com/public-ip is 'nonsense'" in err


async def test_programs_get_json(site: Site, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("list", *flags, "-o", "json") == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["node"], first["subnet"], first["reservation"]) == (site.node("a"), "10.5.1.0/24", False)
    assert first["backend_data"] == {"VNI": 1, "VtepMAC": "02:00:00:00:00:09"}


@pytest.mark.parametrize("what", ["10.5.2.0/24", "10.5.2.77", "192.0.2.2", "node"])
async def test_one_is_shown_by_subnet_pod_host_and_node(
    what: str, site: Site, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run("show", site.node("b") if what == "node" else what, *flags) == 0
    out = capsys.readouterr().out
    assert f"node:         {site.node('b')}" in out
    assert "etcd" not in out
    assert "reservation" not in out


async def test_what_nobody_holds_is_an_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await run("show", "no-such-node.invalid", *flags) != 0
    assert "no lease is for no-such-node.invalid" in capsys.readouterr().err


async def test_changes_are_told_and_heartbeats_are_not(fake: KubeApi, site: Site, flags: list[str]) -> None:
    source = KubeLeases(kube_options({"kubeconfig_file": str(site.kubeconfig)}, {}), {})
    told: list[tuple[str, str]] = []

    def show(what: str, view: View) -> None:
        told.append((what, view.node.removeprefix(site.node(""))))

    task = asyncio.create_task(source.follow(Changes(Ownership("", 3600.0), show)))
    await until(lambda: len(told) == 3)
    await site.patch("a", {"metadata": {"labels": {"beat": "1"}}})
    await site.annotate("a", published("192.0.2.11"))
    await site.annotate("b", published(kube_subnet_manager=None))
    await until(lambda: len(told) == 5)
    await fake.stop()
    fake.delete_node(site.node("a"))
    fake.store.forget_events()
    await fake.start()
    await until(lambda: len(told) == 6)
    assert told[3:] == [("changed", "a"), ("removed", "b"), ("removed", "a")]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await source.close()
