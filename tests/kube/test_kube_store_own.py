"""Our own node: its subnet awaited, annotations and condition written and kept (contract 9.14 to 9.23, 11.21)."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from flanneld.errors import ConfigError, LeaseMoved, Unavailable
from flanneld.model.addr import parse_ip
from flanneld.sources.kube_watch import node_path
from tests.support.hosts import attrs_of, family_conf, net_conf
from tests.support.kube import ATTRS, DUAL, DUAL_ATTRS, PREFIX, KubeHost, MakeKubeHost, Site
from tests.support.wait import until, until_read

CIDR = "10.5.1.0/24"


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def eventually(site: Site, name: str, **expected: str) -> None:
    """Wait until a node has these annotations, by short name with ``_`` for ``-``."""
    wanted = {key.replace("_", "-"): text for key, text in expected.items()}
    await until_read(lambda: site.annotations(name), lambda found: wanted.items() <= found.items())


async def revision(site: Site, name: str = "a") -> str:
    return str((await site.get(name))["metadata"]["resourceVersion"])


# ---- acquire ------------------------------------------------------------------------------------------------------


async def test_the_lease_is_the_pod_cidr_and_is_announced_before_acquire_returns(
    site: Site, host: MakeKubeHost
) -> None:
    await site.create("a", CIDR)
    own = await host().acquire()
    assert (own.key, own.lease.name(), own.expires) == (site.node("a"), CIDR, None)
    assert own.lease.attrs == ATTRS
    assert await site.annotations("a") == {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}',
        "public-ip": "192.0.2.1",
    }


async def test_a_restart_writes_nothing(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    await host().acquire()
    before = await revision(site)
    await host().acquire()
    assert await revision(site) == before


async def test_a_node_that_is_not_there_yet_is_awaited(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = asyncio.create_task(host().acquire())
    await until(lambda: "there is no node" in caplog.text)
    await site.create("a", CIDR)
    assert (await waiting).lease.name() == CIDR


async def test_a_pod_cidr_that_comes_later_is_awaited_and_told_once(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a")
    waiting = asyncio.create_task(host().acquire())
    await until(lambda: "--allocate-node-cidrs" in caplog.text)
    await site.annotate("a", {"unrelated": "1"})
    await site.assign("a", CIDR)
    assert (await waiting).lease.name() == CIDR
    assert caplog.text.count("--allocate-node-cidrs") == 1


async def test_dual_stack_waits_for_both_families(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a", CIDR)
    waiting = asyncio.create_task(host(attrs=DUAL_ATTRS).acquire(DUAL))
    await until(lambda: "no IPv6 pod CIDR" in caplog.text)
    await site.delete("a")
    await site.create("a", CIDR, "fd00:5:0:1::/64")
    assert (await waiting).lease.name() == f"{CIDR}+fd00:5:0:1::/64"
    found = await site.annotations("a")
    assert (found["public-ipv6"], found["backend-v6-data"]) == ("2001:db8::1", found["backend-data"])


async def test_a_family_that_is_off_is_no_part_of_the_lease(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR, "fd00:5:0:1::/64")
    assert (await host().acquire()).lease.subnet6 is None
    assert "public-ipv6" not in await site.annotations("a")


async def test_a_subnet_outside_the_network_is_refused(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", "10.99.1.0/24")
    with pytest.raises(ConfigError, match=r"10\.99\.1\.0/24, which lies outside 10\.5\.0\.0/16"):
        await host().acquire()
    assert not await site.annotations("a")


async def test_a_subnet_equal_to_the_network_is_taken(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    assert (await host().acquire(net_conf(family_conf(CIDR, 26)))).lease.name() == CIDR


async def test_the_pod_tells_the_node_where_the_environment_does_not(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    await site.create_pod("p", "a")
    a = host(environ={"POD_NAME": site.node("p"), "POD_NAMESPACE": "default"})
    assert (await a.acquire()).key == site.node("a")


@pytest.mark.parametrize("environ", [{}, {"POD_NAME": "p"}, {"NODE_NAME": "", "POD_NAMESPACE": "x"}])
async def test_an_environment_that_names_no_node_is_an_error_with_the_remedy(
    environ: dict[str, str], host: MakeKubeHost
) -> None:
    with pytest.raises(ConfigError, match="set NODE_NAME"):
        host(environ=environ)


async def test_a_pod_that_is_not_there_is_waited_for(site: Site, host: MakeKubeHost) -> None:
    with pytest.raises(Unavailable, match="404"):
        await host(environ={"POD_NAME": "nobody", "POD_NAMESPACE": "default"}).store.operator_addresses()


# ---- keep ---------------------------------------------------------------------------------------------------------


async def test_annotations_that_somebody_changed_come_back(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    a = host()
    await a.run()
    await site.annotate("a", {PREFIX + "public-ip": "203.0.113.9", PREFIX + "backend-data": None})
    await eventually(site, "a", public_ip="192.0.2.1", backend_data='{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}')
    await site.annotate("a", {PREFIX + "kube-subnet-manager": "false"})
    await eventually(site, "a", kube_subnet_manager="true")
    await until(lambda: "own node" in a.changes)


async def test_another_writer_is_not_fought_for_ever(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a", CIDR)
    await host().run()
    for number in range(1, 4):
        await site.annotate("a", {PREFIX + "public-ip": f"203.0.113.{number}"})
        await eventually(site, "a", public_ip="192.0.2.1")
    await site.annotate("a", {PREFIX + "public-ip": "203.0.113.4"})
    await until(lambda: "again and again" in caplog.text)
    assert (await site.annotations("a"))["public-ip"] == "203.0.113.4"


async def test_what_was_left_to_another_writer_is_put_right_at_the_next_check(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a", CIDR)
    await host(check_s=1.0).run()
    for number in range(1, 9):
        if "again and again" in caplog.text:
            break
        await site.annotate("a", {PREFIX + "public-ip": f"203.0.113.{number}"})
        await asyncio.sleep(0.05)
    await eventually(site, "a", public_ip="192.0.2.1")


async def test_the_address_that_an_operator_sets_is_told_instead_of_ours(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR, annotations={PREFIX + "public-ip-overwrite": "203.0.113.1"})
    a = host()
    own = await a.run()
    assert own.lease.attrs.where() == "192.0.2.1"
    assert (await site.annotations("a"))["public-ip"] == "203.0.113.1"
    for number in range(2, 8):
        await site.annotate("a", {PREFIX + "public-ip-overwrite": f"203.0.113.{number}"})
        await eventually(site, "a", public_ip=f"203.0.113.{number}")
    await site.annotate("a", {PREFIX + "public-ip-overwrite": None})
    await eventually(site, "a", public_ip="192.0.2.1")


async def test_an_overwrite_that_is_no_address_is_told_and_not_followed(
    site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    await site.create("a", CIDR, annotations={PREFIX + "public-ip-overwrite": "nonsense"})
    await host().acquire()
    assert (await site.annotations("a"))["public-ip"] == "192.0.2.1"
    assert "'nonsense', which is not an IPv4 address" in caplog.text


async def test_a_node_made_anew_gets_annotations_and_condition_again(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    a = host()
    await a.run()
    await a.store.network_is_up()
    await site.delete("a")
    await until(lambda: not a.peers)
    await site.create("a", CIDR)
    await eventually(site, "a", public_ip="192.0.2.1")
    assert (await site.condition("a") or {})["status"] == "False"
    assert a.lost is None


async def test_a_node_made_anew_with_another_subnet_moves_the_lease(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    a = host()
    await a.run()
    await site.delete("a")
    await site.create("a", "10.5.7.0/24")
    await until(lambda: a.lost)
    assert isinstance(a.lost, LeaseMoved)
    assert f"our subnet is 10.5.7.0/24 now instead of {CIDR}" in str(a.lost)
    assert not await site.annotations("a")


async def test_what_we_publish_anew_is_one_change_to_peers(site: Site, host: MakeKubeHost) -> None:
    """Go peers act on each event at once (contract 13.13)."""
    await site.create("a", CIDR)
    a, b = host(), host("b")
    await a.run()
    b.follow()
    await until(lambda: b.peers)
    before = len(b.changes)
    await a.store.publish(attrs_of("192.0.2.77", backend_type="vxlan", data=b'{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}'))
    await until(lambda: b.peers["a"].attrs.where() == "192.0.2.77")
    assert b.peers["a"].attrs.data == b'{"VNI":1,"VtepMAC":"02:00:00:00:00:77"}'
    assert len(b.changes) == before + 1
    assert a.store.own is not None
    assert a.store.own.lease.attrs.where() == "192.0.2.77"


async def test_in_dual_stack_go_peers_hear_of_a_change_in_one_family(site: Site, host: MakeKubeHost) -> None:
    """They forward an update only if both families' texts changed (contract 9.8, 13.13)."""
    await site.create("a", CIDR, "fd00:5:0:1::/64")
    a = host(attrs=DUAL_ATTRS)
    await a.run(DUAL)
    for number in range(2, 5):
        before = await site.annotations("a")
        await a.store.publish(DUAL_ATTRS._replace(public_ip=parse_ip(f"192.0.2.{number}")))
        after = await site.annotations("a")
        assert after["public-ip"] == f"192.0.2.{number}"
        assert after["public-ipv6"] == before["public-ipv6"]
        assert after["backend-v6-data"] != before["backend-v6-data"]
        assert after["backend-v6-data"].strip() == before["backend-v6-data"].strip()
    settled = await revision(site)
    await site.annotate("a", {"unrelated": "1"})
    later = await revision(site)
    await until(lambda: a.table.revision >= int(later) > int(settled))
    await a.store.publish(DUAL_ATTRS._replace(public_ip=parse_ip("192.0.2.4")))
    assert await revision(site) == later


# ---- condition ----------------------------------------------------------------------------------------------------


async def test_the_condition_takes_the_taint_away_and_leaves_the_kubelets_alone(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": None}
    await site.patch("a", {"status": {"conditions": [ready]}}, "/status")
    a = host()
    await a.run()
    assert await site.condition("a") is None
    await a.store.network_is_up()
    found = await site.condition("a") or {}
    assert (found["status"], found["reason"]) == ("False", "FlannelIsUp")
    assert found["message"] == "Flannel is running on this node"
    assert found["lastTransitionTime"] == found["lastHeartbeatTime"]
    assert (await site.condition("a", "Ready") or {})["status"] == "True"


async def test_the_condition_comes_back(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    a = host()
    await a.run()
    await a.store.network_is_up()
    bad = {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": "a cloud provider"}
    await site.patch("a", {"status": {"conditions": [bad]}}, "/status")
    await until_read(lambda: site.condition("a"), lambda found: found and found["status"] == "False")


async def test_a_restart_does_not_write_the_condition_again(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    for _ in range(2):
        a = host()
        await a.acquire()
        await a.store.network_is_up()
        before = await revision(site)
    assert await revision(site) == before


async def test_a_host_that_works_from_memory_sets_the_condition_before_it_has_its_lease_again(
    site: Site, host: MakeKubeHost
) -> None:
    await site.create("a", CIDR)
    a = host()
    await a.store.network_is_up()
    assert (await site.condition("a") or {})["status"] == "False"
    assert not await site.annotations("a")
    await a.acquire()
    assert (await site.annotations("a"))["public-ip"] == "192.0.2.1"


async def test_the_condition_can_be_left_to_others(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR)
    a = host(sets_condition=False)
    await a.run()
    await a.store.network_is_up()
    assert await site.condition("a") is None


# ---- what operators set -------------------------------------------------------------------------------------------


async def test_addresses_that_an_operator_has_set_are_found(site: Site, host: MakeKubeHost) -> None:
    texts = {PREFIX + "node-public-ip": "203.0.113.1", PREFIX + "node-public-ipv6": "2001:db8::5"}
    await site.create("a", CIDR, annotations=texts)
    assert await host().store.operator_addresses() == (parse_ip("203.0.113.1"), parse_ip("2001:db8::5"))
    await site.create("b", "10.5.2.0/24")
    assert await host("b").store.operator_addresses() == (None, None)


async def test_an_address_that_is_none_is_waited_for_to_be_corrected(site: Site, host: MakeKubeHost) -> None:
    await site.create("a", CIDR, annotations={PREFIX + "node-public-ip": "fd00::1"})
    with pytest.raises(Unavailable, match="'fd00::1', which is not an IPv4 address: correct it with kubectl"):
        await host().store.operator_addresses()


# ---- configuration file -------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A file as the kubelet mounts a ConfigMap: a link into ``..data``, which is a link that gets swapped."""
    (tmp_path / "..first").mkdir()
    (tmp_path / "..first" / "net-conf.json").write_text('{"Network": "10.5.0.0/16"}')
    (tmp_path / "..data").symlink_to("..first")
    path = tmp_path / "net-conf.json"
    path.symlink_to("..data/net-conf.json")
    return path


def swap(path: Path, name: str, text: str) -> None:
    """What the kubelet does when the ConfigMap changed."""
    directory = path.parent / name
    directory.mkdir()
    (directory / "net-conf.json").write_text(text)
    (path.parent / "..new").symlink_to(name)
    (path.parent / "..new").rename(path.parent / "..data")


async def test_a_changed_config_map_is_told(mounted: Path, host: MakeKubeHost) -> None:
    a: KubeHost = host(config_path=str(mounted))
    assert await a.store.read_config() == b'{"Network": "10.5.0.0/16"}'
    told: list[bytes] = []
    a.start(a.store.follow_config(told.append))
    swap(mounted, "..second", '{"Network": "10.6.0.0/16"}')
    await until(lambda: told)
    assert told == [b'{"Network": "10.6.0.0/16"}']


async def test_an_unreadable_configuration_is_told_once_and_the_old_one_stays(
    mounted: Path, host: MakeKubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    a: KubeHost = host(config_path=str(mounted))
    await a.store.read_config()
    told: list[bytes] = []
    a.start(a.store.follow_config(told.append))
    (mounted.parent / "..first" / "net-conf.json").unlink()
    await until(lambda: "keeping the one we have" in caplog.text)
    swap(mounted, "..second", '{"Network": "10.7.0.0/16"}')
    await until(lambda: told)
    assert told == [b'{"Network": "10.7.0.0/16"}']
    assert caplog.text.count("keeping the one we have") == 1


async def test_a_missing_configuration_says_how_to_give_one(host: MakeKubeHost) -> None:
    with pytest.raises(ConfigError, match="mount the ConfigMap there, or name the file by --net-config-path"):
        await host(config_path="/nonexistent/net-conf.json").store.read_config()


def test_the_path_of_a_node_cannot_be_left() -> None:
    assert node_path("../pods/x?y") == "/api/v1/nodes/..%2Fpods%2Fx%3Fy"
