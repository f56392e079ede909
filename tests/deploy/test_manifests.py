"""The manifests: valid, least, not at odds with the daemon's own flags, and without collisions on one node."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import flanneld
from flanneld.model.netconf_parse import parse_netconf
from tests.support import manifests
from tests.support.admission import POLICY
from tests.support.manifests import BUILDS, CLEANUP, KUBERNETES, SINGLE_FILE, Object
from tests.support.tell import Tell

pytestmark = [pytest.mark.needs("kubectl"), pytest.mark.needs("kubernetes-validate")]

VERSIONS = ("1.25", "1.28", "1.31", "1.34", "1.37")
"""Of Kubernetes; the API of a DaemonSet hardly changes, so not each one."""

MAY_WRITE = {"/run/flannel", "/var/lib/flanneld", "/etc/cni/net.d", "/etc/cni/multus/net.d", "/run/xtables.lock"}
"""Host paths that the daemon has to write; /dev/net/tun is a device and comes with udp only."""


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def daemonsets(build: str) -> list[Object]:
    return manifests.of_kind(manifests.kustomized(build), "DaemonSet")


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_build(version: str, tell: Tell, tmp_path: Path) -> None:
    files = [SINGLE_FILE, CLEANUP]
    if version >= "1.32":
        files.append(POLICY)
    for name in BUILDS:
        files.append(tmp_path / f"{name.replace('/', '-')}.yaml")
        files[-1].write_text(manifests.build(name))
    validate = [str(manifests.beside("kubernetes-validate")), "--strict", "-k", version]
    done = subprocess.run([*validate, *map(str, files)], capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    tell(f"kubernetes-validate --strict -k {version}: {said.count('passed')} objects of {len(files)} files")


def test_a_misspelt_field_does_not_pass(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(SINGLE_FILE.read_text().replace("readOnlyRootFilesystem", "readonlyRootFilesystem"))
    validate = [str(manifests.beside("kubernetes-validate")), "--strict", str(wrong)]
    done = subprocess.run(validate, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0


def test_single_file_is_what_base_says(tell: Tell) -> None:
    done = subprocess.run([KUBERNETES / "render", "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    single = manifests.documents(SINGLE_FILE.read_text())
    assert by_name(single) == by_name(manifests.kustomized("base"))
    tell(f"kube-flannel.yml and `kubectl kustomize base` are the same {len(single)} objects")


def test_objects_have_the_names_that_flannel_gives_them() -> None:
    """Contract 10.7: so the file replaces flannel's own in place, and the other way round."""
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests.documents(SINGLE_FILE.read_text())}
    assert names == {
        ("Namespace", "kube-flannel"),
        ("ServiceAccount", "flannel"),
        ("ClusterRole", "flannel"),
        ("ClusterRoleBinding", "flannel"),
        ("ConfigMap", "kube-flannel-cfg"),
        ("DaemonSet", "kube-flannel-ds"),
    }
    daemonset = manifests.one(manifests.kustomized("base"), "DaemonSet")
    assert daemonset["spec"]["selector"]["matchLabels"] == {"app": "flannel", "k8s-app": "flannel"}


def test_image_is_one_line_and_of_this_version() -> None:
    for file in (SINGLE_FILE, CLEANUP):
        (line,) = [line for line in file.read_text().splitlines() if "/flanneld:" in line]
        assert f"/flanneld:{flanneld.__version__} " in line


@pytest.mark.parametrize("build", BUILDS)
def test_daemon_takes_its_arguments(build: str) -> None:
    for daemonset in daemonsets(build):
        container = manifests.flanneld(daemonset)
        assert container["command"] == ["/opt/bin/flanneld"]
        given = manifests.flags(container)
        assert ("etcd_endpoints" in given) != ("kube_subnet_mgr" in given), "one store, not two"
        for variable in container.get("env") or ():
            assert variable["name"] == "NODE_NAME"


@pytest.mark.parametrize("build", BUILDS)
def test_network_configuration_parses(build: str, tell: Tell) -> None:
    for each in manifests.of_kind(manifests.kustomized(build), "ConfigMap"):
        conf = parse_netconf(each["data"]["net-conf.json"], allocates=False)
        tell(f"{build}: {conf.backend_type} {', '.join(str(part.network) for part in (conf.v4, conf.v6) if part)}")


@pytest.mark.parametrize("build", BUILDS)
def test_kubelet_probes_where_the_daemon_listens(build: str) -> None:
    for daemonset in daemonsets(build):
        container = manifests.flanneld(daemonset)
        given = manifests.flags(container)
        assert given["healthz_ip"] == "127.0.0.1", "reachable from the network, for no reason"
        paths = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
        for probe, path in paths.items():
            at = {"host": "127.0.0.1", "port": given["healthz_port"], "path": path}
            assert container[probe]["httpGet"] == at


@pytest.mark.parametrize("build", BUILDS)
def test_account_may_do_what_the_daemon_does_and_nothing_else(build: str, tell: Tell) -> None:
    """Contract 9.2, without pods: NODE_NAME says which node is ours."""
    objects = manifests.kustomized(build)
    granted = {
        (group, resource, verb)
        for role in manifests.of_kind(objects, "ClusterRole") + manifests.of_kind(objects, "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    in_kubernetes = any("kube_subnet_mgr" in manifests.flags(manifests.flanneld(each)) for each in daemonsets(build))
    wanted = {("", "nodes", "get"), ("", "nodes", "list"), ("", "nodes", "watch"), ("", "nodes/status", "patch")}
    assert granted == (wanted if in_kubernetes else set())
    for daemonset in daemonsets(build):
        needs_token = "kube_subnet_mgr" in manifests.flags(manifests.flanneld(daemonset))
        assert manifests.pod_spec(daemonset)["automountServiceAccountToken"] is needs_token
    tell(f"{build}: {len(granted)} permissions")


@pytest.mark.parametrize("build", BUILDS)
def test_container_is_not_privileged(build: str) -> None:
    for daemonset in daemonsets(build):
        spec, context = manifests.pod_spec(daemonset), manifests.flanneld(daemonset)["securityContext"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.get("hostPID")
        assert not spec.get("hostIPC")
        assert context["privileged"] is False
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
        udp = {"BPF"} if build == "overlays/udp" else set()
        assert set(context["capabilities"]["add"]) == {"NET_ADMIN", "NET_RAW"} | udp


@pytest.mark.parametrize("build", BUILDS)
def test_host_paths_are_few_and_written_only_where_needed(build: str) -> None:
    for daemonset in daemonsets(build):
        spec, mounts = manifests.pod_spec(daemonset), manifests.flanneld(daemonset)["volumeMounts"]
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in spec["volumes"]}
        devices = {"/dev/net/tun"} if build == "overlays/udp" else set()
        for volume in spec["volumes"]:
            for mount in (mount for mount in mounts if mount["name"] == volume["name"]):
                path = volume.get("hostPath", {}).get("path")
                assert mount.get("readOnly") or path in MAY_WRITE | devices
                assert path is None or volume["hostPath"]["type"], "an unchecked path becomes a directory if missing"


@pytest.mark.parametrize("build", BUILDS)
def test_every_node_gets_it_first_and_one_at_a_time(build: str) -> None:
    for daemonset in daemonsets(build):
        spec = manifests.pod_spec(daemonset)
        assert spec["hostNetwork"] is True
        assert spec["dnsPolicy"] == "Default", "the cluster's own resolver needs the network that this makes"
        assert spec["priorityClassName"] == "system-node-critical"
        assert {(each["operator"], each["effect"]) for each in spec["tolerations"]} == {
            ("Exists", "NoSchedule"),
            ("Exists", "NoExecute"),
        }
        assert daemonset["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1}
        assert spec["terminationGracePeriodSeconds"] > 5, "the daemon promises to stop within 5 s"


def test_resources_leave_room_above_the_measured_figures() -> None:
    """Below 80 MiB with 5000 nodes; a limit near that would kill the daemon where it is needed most (failures F39)."""
    resources = manifests.flanneld(manifests.one(manifests.kustomized("base"), "DaemonSet"))["resources"]
    assert int(resources["requests"]["memory"].removesuffix("Mi")) >= 45
    assert int(resources["limits"]["memory"].removesuffix("Mi")) >= 2 * 80
    assert "cpu" not in resources["limits"]


def test_two_networks_share_nothing_on_a_node(tell: Tell) -> None:
    first, second = sorted(daemonsets("overlays/two-networks"), key=lambda each: len(each["metadata"]["name"]))
    assert first["spec"]["selector"] != second["spec"]["selector"]
    given = manifests.flags(manifests.flanneld(second))
    plain = manifests.flags(manifests.flanneld(first))
    defaults = {"subnet_file": "/run/flannel/subnet.env", "cni_network_name": "cbr0", "cni_bridge": "cni0"}
    for field in ("healthz_port", *defaults):
        assert given[field] != plain.get(field, defaults.get(field)), field
    paths = [
        manifests.host_path(each, str(manifests.flags(manifests.flanneld(each))["cni_conf_dir"]))
        for each in (first, second)
    ]
    assert paths[0] != paths[1]
    conf = parse_netconf((KUBERNETES / "overlays/two-networks/second/net-conf.json").read_bytes())
    base = parse_netconf(manifests.one(manifests.kustomized("base"), "ConfigMap")["data"]["net-conf.json"])
    assert conf.v4
    assert base.v4
    assert not conf.v4.network.overlaps(base.v4.network)
    assert json.loads(conf.backend)["VNI"] != 1, "the first network's"
    tell(f"{base.v4.network} with {sorted(plain)}; {conf.v4.network} with {sorted(given)}")


@pytest.mark.needs("yamllint")
def test_yaml_is_tidy(tell: Tell) -> None:
    files = sorted(path for path in KUBERNETES.rglob("*.y*ml") if "templates" not in path.parts)
    rules = (
        "{extends: default, rules: {line-length: {max: 130}, document-start: disable, braces: {max-spaces-inside: 1}}}"
    )
    lint = [str(manifests.beside("yamllint")), "--strict", "-d", rules, *map(str, files)]
    done = subprocess.run(lint, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    tell(f"yamllint --strict: {len(files)} files")
