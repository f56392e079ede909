"""The daemon in its pod: root file system, volumes, capabilities, account, variables and arguments of the manifests.

Nothing is added for the tests. Leases are on the nodes of a (fake) API server that grants what the manifests'
ClusterRole grants, or in an etcd with TLS. Containers are connected by the real CNI plugins, from the list that the
daemon wrote.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from flanneld.lab import Lab, http, probe
from flanneld.lab.kubeapi.server import KubeApi
from flanneld.lab.node import Host
from flanneld.model.addr import Family
from tests.conftest import MakeLab
from tests.support import cluster, manifests
from tests.support.admission import refusals
from tests.support.manifests import CLEANUP, KUBERNETES, Object
from tests.support.pod_sandbox import Cluster, PodSandbox
from tests.support.tell import Tell
from tests.support.wait import until

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.needs("kubectl", "kubernetes-validate", "cel", "vxlan", "iptables", "nft", "cni"),
]

CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_ADMIN": 21, "BPF": 39}
"""Source: include/uapi/linux/capability.h."""
EXPECTED = "/proc/sys is read-only: going on without"
"""Two settings of IPv6 devices that netlink cannot make; the README names them."""


class Bed:
    """Two lab hosts, what their pods get, and the pods."""

    def __init__(self, lab: Lab, directory: Path, stack: ExitStack) -> None:
        self.lab = lab
        self._directory, self._stack = directory, stack
        lab.up(daemons=False)
        for host in lab.hosts:
            machine_id = directory / host.name / "host/etc/machine-id"
            machine_id.parent.mkdir(parents=True)
            machine_id.write_text(secrets.token_hex(16) + "\n")

    def api(self, objects: Sequence[Object], families: int = 1) -> tuple[KubeApi, Cluster]:
        api = self._stack.enter_context(cluster.api_server(self.lab, self._directory, cluster.rights_of(objects)))
        for host in self.lab.hosts:
            ranges = [f"10.244.{host.number}.0/24", f"fd00:10:244:{host.number}::/64"]
            api.create_node(host.name, ranges[:families])
        data = {each["metadata"]["name"]: each["data"] for each in manifests.of_kind(objects, "ConfigMap")}
        variables = {"KUBERNETES_SERVICE_HOST": cluster.API_ADDRESS, "KUBERNETES_SERVICE_PORT": "6443"}
        return api, Cluster(data, cluster.service_account(api), variables)

    def etcd(self, settings: dict[str, str]) -> Cluster:
        secret = self._stack.enter_context(cluster.etcd_with_tls(self.lab, self._directory, settings))
        return Cluster({"flannel-etcd": secret}, names=dict.fromkeys(cluster.ETCD_NAMES, cluster.ETCD_ADDRESS))

    async def start(self, daemonset: Object, given: Cluster) -> list[PodSandbox]:
        """One pod on each host; waits as the kubelet does, by the readiness probe."""
        directories = [self._directory / host.name for host in self.lab.hosts]
        made = [
            PodSandbox(host.netns, daemonset, at, given) for host, at in zip(self.lab.hosts, directories, strict=True)
        ]
        for pod in made:
            self._stack.enter_context(pod)
        get = manifests.flanneld(daemonset)["readinessProbe"]["httpGet"]
        for host, pod in zip(self.lab.hosts, made, strict=True):
            await self._ready(host, get, pod)
        return made

    async def _ready(self, host: Host, get: Object, pod: PodSandbox) -> None:
        def answer() -> tuple[int, str]:
            return http.get(host.netns, get["host"], get["port"], get["path"])

        try:
            await until(lambda: answer()[0] == 200, what="ready")
        except AssertionError as error:
            raise AssertionError(f"{error}: {answer()}\n{pod.log()}") from None

    def connect(self, pods: Sequence[PodSandbox]) -> None:
        for host, pod in zip(self.lab.hosts, pods, strict=True):
            host.daemon.subnet_file = pod.host / "run/flannel/subnet.env"
            host.cni.conf_dir = pod.host / "etc/cni/net.d"
        self.lab.attach_pods()

    def check_traffic(self) -> None:
        first, second = self.lab.hosts
        for family in self.lab.spec.families:
            assert probe.ping(first.pod, second.pod_address(family), count=5).lost == 0
        assert probe.egress_source(self.lab, 1, Family.V4) == first.address(Family.V4)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def complaints(pod: PodSandbox) -> list[str]:
    return [line for line in pod.log().splitlines() if line[:1] in "WEF" and EXPECTED not in line]


def limits(pod: PodSandbox, daemonset: Object) -> str:
    """Checks that the process has what was granted and no more; a sentence about it."""
    granted = manifests.flanneld(daemonset)["securityContext"]["capabilities"]["add"]
    assert int(pod.status("CapEff"), 16) == sum(1 << CAPABILITIES[name] for name in granted)
    assert pod.status("NoNewPrivs") == "1"
    request = int(manifests.flanneld(daemonset)["resources"]["requests"]["memory"].removesuffix("Mi"))
    resident = int(pod.status("VmRSS").split()[0]) / 1024
    assert resident < request
    return f"{' '.join(granted)}, {resident:.0f} MiB"


@pytest.mark.parametrize(
    ("build", "further"),
    [
        ("base", {}),
        ("base", {"EnableNFTables": True}),
        ("overlays/host-gw", {}),
        ("overlays/dual-stack", {}),
        pytest.param("overlays/udp", {}, marks=pytest.mark.needs("udp_kernel")),
    ],
    ids=["vxlan", "vxlan, nftables", "host-gw", "dual-stack", "udp"],
)
async def test_pods_on_kubernetes_nodes_reach_each_other(
    build: str, further: Object, make_lab: MakeLab, stack: ExitStack, tmp_path: Path, tell: Tell
) -> None:
    objects = manifests.kustomized(build)
    data = manifests.one(objects, "ConfigMap")["data"]
    data["net-conf.json"] = json.dumps(json.loads(data["net-conf.json"]) | further)
    families = 1 + ("IPv6Network" in data["net-conf.json"])
    bed = Bed(make_lab(2, ipv6="on" if families == 2 else "off", cni=True), tmp_path, stack)
    api, given = bed.api(objects, families)
    before = api.node("h1")
    daemonset = manifests.one(objects, "DaemonSet")
    pods = await bed.start(daemonset, given)
    bed.connect(pods)
    bed.check_traffic()
    assert [complaints(pod) for pod in pods] == [[], []]
    used = {(seen.verb, str(seen.request.resource and seen.request.resource.resource)) for seen in api.requests}
    assert used == cluster.rights_of(objects), "granted and never used, or used and not granted"
    assert all(seen.code < 400 for seen in api.requests)
    assert refusals(before, api.node("h1"), "h1") == []
    assert refusals(before, api.node("h1"), "h2")
    tell(f"{build} {further or ''}: {limits(pods[0], daemonset)}; used each of {len(used)} permissions")
    if build == "overlays/udp":
        assert "udp data path kernel" in pods[0].log()


async def test_pods_with_leases_in_etcd_with_tls_reach_each_other(
    make_lab: MakeLab, stack: ExitStack, tmp_path: Path, tell: Tell
) -> None:
    bed = Bed(make_lab(2, cni=True), tmp_path, stack)
    conf = '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}'
    daemonset = manifests.one(manifests.kustomized("overlays/etcd"), "DaemonSet")
    pods = await bed.start(daemonset, bed.etcd({"/coreos.com/network/config": conf}))
    bed.connect(pods)
    bed.check_traffic()
    assert [complaints(pod) for pod in pods] == [[], []]
    tell(f"etcd, client certificates: {limits(pods[0], daemonset)}")


async def test_udp_without_bpf_goes_on_more_slowly(
    make_lab: MakeLab, stack: ExitStack, tmp_path: Path, tell: Tell
) -> None:
    objects = manifests.kustomized("overlays/udp")
    daemonset = manifests.one(objects, "DaemonSet")
    manifests.flanneld(daemonset)["securityContext"]["capabilities"]["add"].remove("BPF")
    bed = Bed(make_lab(2, cni=True), tmp_path, stack)
    pods = await bed.start(daemonset, bed.api(objects)[1])
    bed.connect(pods)
    bed.check_traffic()
    assert "udp data path gso (" in pods[0].log()
    tell(next(line.partition("] ")[2] for line in pods[0].log().splitlines() if "udp data path kernel is not" in line))


async def test_cleanup_leaves_nothing_on_a_node(
    make_lab: MakeLab, stack: ExitStack, tmp_path: Path, tell: Tell
) -> None:
    objects = manifests.kustomized("base")
    daemonset = manifests.one(objects, "DaemonSet")
    bed = Bed(make_lab(2, cni=True), tmp_path, stack)
    _, given = bed.api(objects)
    pods = await bed.start(daemonset, given)
    (cleanup,) = manifests.documents(CLEANUP.read_text())
    (container,) = manifests.pod_spec(cleanup)["initContainers"]
    host, directory = bed.lab.hosts[0], tmp_path / bed.lab.hosts[0].name
    pods[0].stop()
    with PodSandbox(host.netns, cleanup, directory, given, container) as sandbox:
        assert sandbox.wait(20) == 0, sandbox.log()
    assert "flannel" not in host.ip("link") + host.ip("route")
    assert "flannel" not in host.run("iptables-save").stdout.lower()
    left = [path.relative_to(sandbox.host) for path in sandbox.host.rglob("*") if path.is_file()]
    kept = [path for path in left if path.parts[:3] != ("var", "lib", "flanneld")]  # who the machine is
    assert {path.name for path in kept} == {"machine-id", "xtables.lock"}
    tell("; ".join(sandbox.log().splitlines()))


async def test_two_networks_on_one_node_leave_each_other_alone(
    make_lab: MakeLab, stack: ExitStack, tmp_path: Path, tell: Tell
) -> None:
    objects = manifests.kustomized("overlays/two-networks")
    by_name = {each["metadata"]["name"]: each for each in manifests.of_kind(objects, "DaemonSet")}
    bed = Bed(make_lab(2, cni=True), tmp_path, stack)
    first = await bed.start(by_name["kube-flannel-ds"], bed.api(objects)[1])
    conf = (KUBERNETES / "overlays/two-networks/second/net-conf.json").read_text()
    second = await bed.start(by_name["kube-flannel-ds-storage"], bed.etcd({"/flannel/storage/config": conf}))
    bed.connect(first)
    bed.check_traffic()
    there = json.loads((second[0].host / "etc/cni/multus/net.d/storage.conflist").read_text())
    assert (there["name"], there["plugins"][0]["bridge"]) == ("storage", "cni-storage")
    target = (
        bed.lab.hosts[1].run("ip", "-4", "-o", "addr", "show", "dev", "flannel.2").stdout.split()[3].partition("/")[0]
    )
    assert probe.ping(bed.lab.hosts[0], target, count=5).lost == 0
    for host in bed.lab.hosts:  # each network's rules, which one tool alone would write over one another
        assert "10.244.0.0/16" in host.run("iptables", "-t", "nat", "-S", "FLANNEL-POSTRTG").stdout
        assert "10.245.0.0/16" in host.run("nft", "list", "table", "ip", "flannel-ipv4").stdout
    made = [pod.log().count("made chain FLANNEL-POSTRTG") for pod in first]
    assert max(made) <= 2, "once at the start, and once because the other network's daemon cleaned up at its start"
    assert [complaints(pod) for pod in (*first, *second)] == [[]] * 4
    tell(f"vxlan 1 and 2, iptables and nftables; the first network's rules were made {made} times on the two nodes")
