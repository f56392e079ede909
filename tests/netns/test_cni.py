"""Pods made by the real CNI plugins, from the configuration that flanneld writes (contract 10D, failure F35).

What the files say is tested in unit/test_cni_conf.py, how they are guarded in unit/test_cni_file.py. Here two lab
hosts run containerd's part, which ``flanneld.lab.cni`` plays: ADD and DEL by the CNI protocol.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from flanneld.errors import Unavailable
from flanneld.lab import Lab, netns
from flanneld.lab.cni import PortMapping
from flanneld.lab.netns import run_in
from flanneld.lab.node import Host, Node
from flanneld.lab.probe import egress_source, ping
from flanneld.lab.spec import IPv6Mode
from flanneld.model.addr import Family
from tests.support.flannel_plugin import delegated
from tests.support.live import assert_all_pods_connected, until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("vxlan", "iptables", "cni"),
]

MakeLab = Callable[..., Lab]


def another_pod(host: Host, letter: str = "b") -> Node:
    """One more pod's namespace on a host, not connected yet; goes with the lab."""
    pod = Node(host.spec, f"{host.pod.name}{letter}")
    netns.add([pod.netns])
    return pod


def conf_file(host: Host) -> Path:
    return host.daemon.cni_conf_dir / "10-flannel.conflist"


def conf_mtu(host: Host) -> object:
    return json.loads(conf_file(host).read_bytes())["plugins"][0]["mtu"]


def mtu(pod: Node) -> int:
    link: int = json.loads(pod.ip("-j", "link", "show", "eth0"))[0]["mtu"]
    return link


def addresses(pod: Node) -> list[str]:
    [link] = json.loads(pod.ip("-j", "addr", "show", "eth0", "scope", "global"))
    return [entry["local"] for entry in link["addr_info"] if entry.get("scope") == "global"]


def reaches(source: Node, pod: Node, address: str, port: int, family: Family, pod_port: int = 8080) -> bool:
    """Whether a TCP connection from ``source`` to an address ends in a pod."""

    def listen() -> socket.socket:
        server = socket.create_server(("", pod_port), family=family)
        server.settimeout(2)
        return server

    def connect() -> socket.socket:
        return socket.create_connection((address, port), timeout=2)

    with run_in(pod.netns, listen) as server:
        try:
            with run_in(source.netns, connect):
                server.accept()[0].close()
        except OSError:
            return False
    return True


@pytest.mark.parametrize("ipv6", ["off", "on", "only"])
def test_pods_of_two_hosts_reach_each_other_and_the_outside(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    lab = make_lab(2, ipv6=ipv6, cni=True)
    lab.up()
    assert_all_pods_connected(lab)
    for host in lab.hosts:
        assert mtu(host.pod) == int(host.subnet_env()["FLANNEL_MTU"])
        assert len(addresses(host.pod)) == len(lab.spec.families)


def test_pods_of_a_cluster_whose_leases_are_kubernetes_nodes_are_connected(make_lab: MakeLab) -> None:
    lab = make_lab(3, store="kube", cni=True)
    lab.up()
    assert_all_pods_connected(lab)


def test_pods_of_one_host_reach_each_other(make_lab: MakeLab) -> None:
    lab = make_lab(1, cni=True)
    lab.up()
    host = lab.host(1)
    other = another_pod(host)
    host.cni.add(other.netns)
    assert ping(host.pod, addresses(other)[0]).lost == 0


@pytest.mark.parametrize("family", Family)
def test_a_host_port_leads_into_the_pod_from_everywhere(make_lab: MakeLab, family: Family) -> None:
    lab = make_lab(2, ipv6="on", cni=True)
    lab.up()
    host, peer = lab.hosts
    pod = another_pod(host)
    host.cni.add(pod.netns, [PortMapping(8081, 8080)])
    address = host.address(family)
    for source in (lab.outside, peer, peer.pod, host, host.pod):
        assert reaches(source, pod, address, 8081, family), f"from {source.name}"
    assert reaches(pod, pod, address, 8081, family), "from the pod itself: hairpin"
    host.cni.delete(pod.netns)
    assert not reaches(lab.outside, pod, address, 8081, family)


def test_a_deleted_pod_leaves_no_link_and_its_address_is_used_again(make_lab: MakeLab) -> None:
    """A /29 has five addresses for pods, so the sixth pod gets one only if those before gave theirs back."""
    lab = make_lab(1, cni=True, config={"SubnetLen": 29})
    lab.up()
    host = lab.host(1)
    host.cni.delete(host.pod.netns)
    pod = another_pod(host)
    links = host.ip("link")
    given = set()
    for _ in range(6):
        host.cni.add(pod.netns)
        given.add(addresses(pod)[0])
        host.cni.delete(pod.netns)
        assert "eth0" not in pod.ip("link")
    assert host.ip("link").count("veth") == links.count("veth") == 0
    assert len(given) == 5


def test_pods_start_while_flanneld_is_dead_and_after_it_came_back(make_lab: MakeLab) -> None:
    """Contract 0.4: everything on the host stays as it is, so does the configuration."""
    lab = make_lab(2, cni=True)
    lab.up()
    host, peer = lab.hosts
    pods = []
    for letter, happen in (("b", host.daemon.kill), ("c", host.daemon.start), ("d", host.daemon.stop)):
        happen()
        if happen == host.daemon.start:
            host.daemon.wait_ready()
        pod = another_pod(host, letter)
        host.cni.add(pod.netns)
        pods.append(pod)
        assert ping(peer.pod, addresses(pod)[0]).lost == 0
    host.daemon.start()
    host.daemon.wait_ready()
    for pod in pods:
        assert ping(peer.pod, addresses(pod)[0]).lost == 0
        host.cni.delete(pod.netns)
    assert "CNI configuration" not in host.daemon.log()  # it was right all the time


def test_before_there_is_a_subnet_a_pod_is_refused_in_a_sentence_and_left_without_an_interface(
    make_lab: MakeLab,
) -> None:
    lab = make_lab(1, cni=True)
    lab.up(daemons=False)
    host = lab.host(1)
    with pytest.raises(Unavailable, match=r"no CNI configuration in .*: flanneld writes it once it has a subnet"):
        host.cni.add(host.pod.netns)
    assert "eth0" not in host.pod.ip("link")
    assert not host.cni.has(host.pod.netns)
    lab.start_daemons()
    host.attach_pod()
    assert mtu(host.pod) == 1450


def test_a_daemon_that_cannot_write_the_configuration_is_not_ready_and_says_why(make_lab: MakeLab) -> None:
    lab = make_lab(1, cni=True)
    lab.up(daemons=False)
    host = lab.host(1)
    conf_file(host).mkdir(parents=True)
    host.daemon.start()
    sentence = f"write the CNI configuration {conf_file(host)}: Is a directory (a directory is in its place"
    until(lambda: sentence in host.daemon.ask("/readyz")[1], "the sentence on /readyz")
    conf_file(host).rmdir()
    host.daemon.wait_ready()


def test_a_changed_mtu_reaches_the_next_pod(make_lab: MakeLab) -> None:
    lab = make_lab(1, cni=True)
    lab.up()
    host = lab.host(1)
    host.ip("link", "set", "eth0", "mtu", "1400")
    until(lambda: conf_mtu(host) == 1350, "the new MTU in the configuration")
    host.attach_pod()
    assert mtu(host.pod) == 1350


def test_pods_start_at_any_moment_while_somebody_damages_the_configuration(make_lab: MakeLab) -> None:
    """Failure F35: a runtime that reads at the wrong moment tries again, and succeeds."""
    lab = make_lab(1, cni=True)
    lab.up()
    host = lab.host(1)
    for damage in (Path.unlink, lambda path: os.truncate(path, 20), lambda path: path.write_text("{}")):
        damage(conf_file(host))
        until(partial(_attached, host), "a pod is attached again")
        assert mtu(host.pod) == 1450
    assert "10-flannel.conflist was deleted: written again" in host.daemon.log()


def _attached(host: Host) -> bool:
    try:
        host.attach_pod()
    except Unavailable:
        return False
    return True


@pytest.mark.parametrize("ipv6", ["off", "on", "only"])
def test_flannel_form_gives_flannels_plugin_what_it_needs(make_lab: MakeLab, ipv6: IPv6Mode) -> None:
    """The plugin itself is in no package: its part is done by our reading of contract 10.11 to 10.14."""
    lab = make_lab(2, ipv6=ipv6, cni=True, daemon_flags=("--cni-conf-form=flannel",))
    lab.up(daemons=False)
    lab.start_daemons()
    for host in lab.hosts:
        classic = json.loads(conf_file(host).read_bytes())
        assert [plugin["type"] for plugin in classic["plugins"]] == ["flannel", "portmap"]
        expanded = delegated(classic, Path("/nowhere/subnet.env"))
        host.cni.conf_dir = host.directory / "expanded"
        host.cni.conf_dir.mkdir()
        (host.cni.conf_dir / "10-flannel.conflist").write_text(json.dumps(expanded))
        host.attach_pod()
        assert mtu(host.pod) == int(host.subnet_env()["FLANNEL_MTU"])
    assert_all_pods_connected(lab)


def test_a_host_that_changes_the_form_keeps_the_addresses_of_running_pods_and_can_stop_them(make_lab: MakeLab) -> None:
    """host-local counts addresses by the network's name, which is the same in both forms."""
    lab = make_lab(1, cni=True, config={"SubnetLen": 29}, daemon_flags=("--cni-conf-form=flannel",))
    lab.up(daemons=False)
    lab.start_daemons()
    host = lab.host(1)
    of_daemon, of_plugin = host.cni.conf_dir, host.directory / "expanded"
    of_plugin.mkdir()
    expanded = delegated(json.loads(conf_file(host).read_bytes()), host.daemon.subnet_file)
    (of_plugin / "10-flannel.conflist").write_text(json.dumps(expanded))
    host.cni.conf_dir = of_plugin
    host.attach_pod()

    host.daemon.stop()
    host.daemon.start("--cni-conf-form=bridge")
    host.daemon.wait_ready()
    host.cni.conf_dir = of_daemon
    news = [another_pod(host, letter) for letter in "bcdef"]
    for new in news[:4]:
        host.cni.add(new.netns)
        assert ping(host.pod, addresses(new)[0]).lost == 0
    before = addresses(host.pod)
    with pytest.raises(Unavailable, match="no IP addresses available"):
        host.cni.add(news[4].netns)
    host.cni.delete(host.pod.netns)
    host.cni.add(news[4].netns)
    assert addresses(news[4]) == before


def test_without_ip_masq_the_plugin_masquerades(make_lab: MakeLab) -> None:
    """Contract 10.13."""
    lab = make_lab(1, cni=True, daemon_flags=("--ip-masq=false",))
    lab.up()
    assert egress_source(lab, 1, Family.V4) == lab.host(1).address()
