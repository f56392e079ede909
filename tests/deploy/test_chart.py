"""The Helm chart, by Helm's own engine: lint, values of flannel's chart, and the same pods as the plain manifest."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import flanneld
from flanneld.model.netconf_parse import parse_netconf
from tests.support import manifests
from tests.support.manifests import CHART, Object, ToolFailed, helm_lint, helm_objects, helm_template
from tests.support.tell import Tell

pytestmark = [pytest.mark.needs("helm"), pytest.mark.needs("kubectl"), pytest.mark.needs("kubernetes-validate")]

ETCD = {
    "endpoints": ["https://etcd-1.example.com:2379", "https://etcd-2.example.com:2379"],
    "tlsSecret": "flannel-etcd",
}

FLANNEL_0_28: Object = {
    "global": {"imagePullSecrets": None},
    "podCidr": "10.42.0.0/16",
    "podCidrv6": "",
    "flannel": {
        "image": {"repository": "registry.example.com/flannel", "tag": "v1"},
        "flannel_cni": {"image": {"repository": "registry.example.com/flannel-cni-plugin", "tag": "v2"}},
        "cniBinDir": "/usr/libexec/cni",
        "cniConfDir": "/etc/cni/conf.d",
        "skipCNIConfigInstallation": False,
        "enableNFTables": True,
        "args": ["--ip-masq", "--kube-subnet-mgr", "--iface=eth1"],
        "backend": "vxlan",
        "backendPort": 4789,
        "mtu": 9000,
        "vni": 7,
        "GBP": True,
        "directRouting": True,
        "macPrefix": "0E-2A",
        "backendPortv6": 51821,
        "psk": 0,
        "tunnelMode": "separate",
        "keepaliveInterval": 0,
        "cniConf": '{\n  "name": "cbr0",\n  "cniVersion": "0.3.1",\n  "plugins": [{"type": "flannel"}]\n}\n',
        "resources": {"requests": {"cpu": "100m", "memory": "50Mi"}},
        "healthz": {
            "port": 8082,
            "livenessProbe": {"initialDelaySeconds": 10},
            "readinessProbe": {"periodSeconds": 10},
        },
        "tolerations": [{"effect": "NoSchedule", "operator": "Exists"}],
        "nodeSelector": {"example.com/pods": "yes"},
    },
    "netpol": {"enabled": True, "args": ["--v=2"], "image": {"repository": "registry.example.com/np", "tag": "v3"}},
}
"""Every value that flannel's chart has (contract 10.10)."""

VALUES: dict[str, Object] = {
    "defaults": {},
    "flannel 0.28": FLANNEL_0_28,
    "dual-stack": {"podCidrv6": "fd00:10:244::/56"},
    "IPv6 only": {"podCidr": "", "podCidrv6": "fd00:10:244::/56"},
    "host-gw": {"flannel": {"backend": "host-gw"}},
    "udp": {"flannel": {"backend": "udp", "backendPort": 8286, "backendConf": {"DataPath": "basic"}}},
    "etcd with TLS": {"etcd": ETCD},
    "etcd, own CNI list": {"etcd": ETCD, "flannel": {"cniConf": "{}"}},
    "no CNI list": {"flannel": {"skipCNIConfigInstallation": True}},
    "no health server": {"flannel": {"healthz": {"port": 0}}},
    "privileged": {"flannel": {"privileged": True, "maxUnavailable": "10%"}},
    "labels": {
        "createNamespace": True,
        "global": {
            "imagePullSecrets": [{"name": "mine"}],
            "commonLabels": {"team": "net"},
            "commonAnnotations": {"note": "yes"},
        },
        "flannel": {"podLabels": {"a": "b"}, "podAnnotations": {"c": "d"}, "daemonSet": {"labels": {"e": "f"}}},
    },
}


def conf_of(values: Object) -> Any:
    return parse_netconf(manifests.one(helm_objects(values), "ConfigMap")["data"]["net-conf.json"], allocates=False)


@pytest.mark.parametrize("kubernetes", ["v1.25.0", "v1.37.0"])
def test_helm_finds_nothing_to_complain_of(kubernetes: str, tell: Tell) -> None:
    for name, values in VALUES.items():
        found = helm_lint(values, kubernetes)
        complaints = [each for each in found["messages"] if each["severity"] > 1]
        assert not complaints, name
        assert not found["errors"], name
    tell(f"helm lint --strict --kube-version {kubernetes}: {len(VALUES)} sets of values")


@pytest.mark.parametrize("version", ["1.25", "1.31", "1.37"])
def test_kubernetes_takes_what_helm_renders(version: str, tell: Tell, tmp_path: Path) -> None:
    files = []
    for number, values in enumerate(VALUES.values()):
        text = "\n---\n".join(text for name, text in helm_template(values).items() if name.endswith(".yaml"))
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(text)
    validate = [str(manifests.beside("kubernetes-validate")), "--strict", "-k", version]
    done = subprocess.run([*validate, *map(str, files)], capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    tell(f"kubernetes-validate --strict -k {version}: {said.count('passed')} objects of {len(files)} sets of values")


def without_metadata(kind: str, objects: list[Object]) -> Object:
    return {key: value for key, value in manifests.one(objects, kind).items() if key not in ("metadata", "subjects")}


def test_defaults_make_the_same_pods_as_the_plain_manifest() -> None:
    chart, plain = helm_objects(), manifests.kustomized("base")
    ours, theirs = (manifests.one(objects, "DaemonSet") for objects in (chart, plain))
    for each in (ours, theirs):
        manifests.flanneld(each)["args"].sort()
    assert manifests.pod_spec(ours) == manifests.pod_spec(theirs)
    assert {**ours["spec"], "template": 0} == {**theirs["spec"], "template": 0}
    assert ours["metadata"]["name"] == theirs["metadata"]["name"]
    for kind in ("ClusterRole", "ClusterRoleBinding", "ServiceAccount"):
        assert without_metadata(kind, chart) == without_metadata(kind, plain)
    assert conf_of({}) == parse_netconf(manifests.one(plain, "ConfigMap")["data"]["net-conf.json"], allocates=False)


@pytest.mark.parametrize(("build", "name"), [("udp", "udp"), ("host-gw", "host-gw"), ("dual-stack", "dual-stack")])
def test_variants_get_the_same_rights_as_the_kustomize_ones(build: str, name: str) -> None:
    ours = manifests.one(helm_objects(VALUES[name]), "DaemonSet")
    theirs = manifests.one(manifests.kustomized(f"overlays/{build}"), "DaemonSet")
    assert manifests.flanneld(ours)["securityContext"] == manifests.flanneld(theirs)["securityContext"]
    assert names(ours, "volumes") == names(theirs, "volumes")


def names(daemonset: Object, what: str) -> set[str]:
    return {each["name"] for each in manifests.pod_spec(daemonset).get(what, ())}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_daemon_takes_the_arguments(values: Object) -> None:
    daemonset = manifests.one(helm_objects(values), "DaemonSet")
    given = manifests.flags(manifests.flanneld(daemonset))
    assert ("etcd_endpoints" in given) != ("kube_subnet_mgr" in given)
    mounted = {mount["name"] for mount in manifests.flanneld(daemonset)["volumeMounts"]}
    assert mounted <= names(daemonset, "volumes")


@pytest.mark.parametrize("values", [each for each in VALUES.values() if "etcd" not in each])
def test_network_configuration_parses(values: Object) -> None:
    assert conf_of(values).backend_type == values.get("flannel", {}).get("backend", "vxlan")


def test_values_of_flannels_chart_have_their_effect() -> None:
    """Contract 10.10. Its own chart ignores cniConf and cannot quote tunnelMode and macPrefix (contract 11.54)."""
    objects = helm_objects(FLANNEL_0_28)
    daemonset = manifests.one(objects, "DaemonSet")
    spec, container = manifests.pod_spec(daemonset), manifests.flanneld(daemonset)
    conf = conf_of(FLANNEL_0_28)
    assert (str(conf.v4.network), conf.v6, conf.nftables) == ("10.42.0.0/16", None, True)
    backend = json.loads(conf.backend)
    assert backend == {"Type": "vxlan", "Port": 4789, "MTU": 9000, "VNI": 7, "GBP": True, "DirectRouting": True}
    assert container["image"] == "registry.example.com/flannel:v1"
    assert [each["image"] for each in spec["initContainers"]] == [
        "registry.example.com/flannel-cni-plugin:v2",
        "registry.example.com/flannel:v1",
    ]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert (paths["cni-plugin"], paths["cni-conf"]) == ("/usr/libexec/cni", "/etc/cni/conf.d")
    own_list = manifests.one(objects, "ConfigMap")["data"]["cni-conf.json"]
    assert json.loads(own_list) == json.loads(FLANNEL_0_28["flannel"]["cniConf"])
    assert "cni_conf_dir" not in manifests.flags(container), "two would write the one list"
    assert container["livenessProbe"]["httpGet"]["port"] == 8082
    assert container["livenessProbe"]["initialDelaySeconds"] == 10
    assert container["resources"]["requests"] == {"cpu": "100m", "memory": "50Mi"}
    assert spec["tolerations"] == FLANNEL_0_28["flannel"]["tolerations"]
    assert spec["nodeSelector"] == {"example.com/pods": "yes"}
    assert [each["name"] for each in spec["containers"]] == ["kube-flannel", "kube-network-policies"]


def test_health_server_can_be_switched_off() -> None:
    container = manifests.flanneld(manifests.one(helm_objects(VALUES["no health server"]), "DaemonSet"))
    assert not [key for key in container if key.endswith("Probe")]
    assert "healthz_port" not in manifests.flags(container)


def test_etcd_needs_nothing_of_the_api_server() -> None:
    objects = helm_objects(VALUES["etcd with TLS"])
    assert {each["kind"] for each in objects} == {"ServiceAccount", "DaemonSet"}
    daemonset = manifests.one(objects, "DaemonSet")
    assert manifests.pod_spec(daemonset)["automountServiceAccountToken"] is False
    given = manifests.flags(manifests.flanneld(daemonset))
    assert given["etcd_endpoints"] == ",".join(ETCD["endpoints"])
    assert str(given["etcd_keyfile"]).startswith("/etc/flanneld/etcd/")


def test_a_new_chart_alone_restarts_no_pod() -> None:
    template = manifests.one(helm_objects(), "DaemonSet")["spec"]["template"]
    assert template["metadata"]["labels"] == {"app": "flannel", "k8s-app": "flannel", "tier": "node"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"flannel": {"bakend": "vxlan"}}, "bakend"),
        ({"podCidr": "10.244.0.0"}, "podCidr"),
        ({"flannel": {"vni": 16777216}}, "vni"),
        ({"flannel": {"cniForm": "calico"}}, "cniForm"),
        ({"etcd": {"endpoints": "https://one:2379"}}, "endpoints"),
        ({"flannel": {"backend": "wireguard"}}, "not in this version"),
        ({"podCidr": ""}, "both empty"),
        ({"flannel": {"backend": "udp"}, "podCidrv6": "fd00::/56"}, "IPv4 only"),
        ({"flannel": {"args": ["--ip-masq"]}}, "where leases are kept"),
    ],
)
def test_values_that_cannot_work_are_refused_with_a_sentence(values: Object, sentence: str) -> None:
    with pytest.raises(ToolFailed, match=sentence):
        helm_template(values)


def test_notes_say_what_is_left_to_do() -> None:
    notes = helm_template()["NOTES.txt"]
    assert "rollout status" in notes
    assert "still the placeholder" in notes
    assert "Not used" in helm_template(FLANNEL_0_28)["NOTES.txt"]


@pytest.fixture
def api_with_namespace() -> Iterator[Callable[[str], str]]:
    """An API server that has the namespace kube-flannel, made by a Helm release of the given name; its URL."""
    served: list[ThreadingHTTPServer] = []

    def serve(release: str) -> str:
        metadata = {"name": "kube-flannel", "annotations": {"meta.helm.sh/release-name": release}}
        kind = {"name": "namespaces", "namespaced": False, "kind": "Namespace", "verbs": ["get"]}
        pages = {
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [kind]},
            "/api/v1/namespaces/kube-flannel": {"kind": "Namespace", "apiVersion": "v1", "metadata": metadata},
        }

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(pages[self.path.partition("?")[0]]).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        served.append(ThreadingHTTPServer(("127.0.0.1", 0), Pages))
        Thread(target=served[-1].serve_forever).start()
        return f"http://127.0.0.1:{served[-1].server_port}"

    yield serve
    for server in served:
        server.shutdown()
        server.server_close()


def test_upgrade_of_flannels_release_does_not_delete_the_namespace(api_with_namespace: Callable[[str], str]) -> None:
    """Flannel's chart has it in the release, and Helm deletes what a release has no more: with everything in it."""
    (namespace,) = manifests.documents(helm_template(api=api_with_namespace("flannel"))["namespace.yaml"])
    assert namespace["metadata"]["name"] == "kube-flannel"
    assert namespace["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not manifests.documents(helm_template(api=api_with_namespace("another"))["namespace.yaml"])


def test_every_value_is_in_the_readme() -> None:
    text = (CHART / "README.md").read_text()
    defaults = manifests.documents((CHART / "values.yaml").read_text())[0]
    missing = [name for name in leaves(defaults) if f"`{name}`" not in text]
    assert not missing


def leaves(values: Object, above: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        name = f"{above}{key}"
        deeper = isinstance(value, dict) and value and key not in ("resources", "image") and not key.endswith("Probe")
        found += leaves(value, f"{name}.") if deeper else [name]
    return found


def test_chart_is_of_this_version() -> None:
    chart = manifests.documents((CHART / "Chart.yaml").read_text())[0]
    assert chart["appVersion"] == flanneld.__version__
