"""Kubernetes manifests of this repository as a cluster would get them, built by the tools that operators use."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flanneld.cli_flags import DAEMON_FLAGS
from flanneld.goflags import scan

KUBERNETES = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
CHART = KUBERNETES / "chart"
SINGLE_FILE = KUBERNETES / "kube-flannel.yml"
CLEANUP = KUBERNETES / "cleanup.yaml"
BUILDS = ("base", *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir()))
"""All that ``kubectl apply -k`` takes, below ``deploy/kubernetes``."""

Object = dict[str, Any]
"""Any, because that is what YAML is."""


class ToolFailed(Exception):
    """kubectl or Helm refused; the message is what it said."""


def documents(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    yaml = importlib.import_module("yaml")  # comes with kubernetes-validate
    return [each for each in yaml.safe_load_all(text) if each]


@functools.cache
def build(name: str) -> str:
    """What ``kubectl apply -k deploy/kubernetes/<name>`` would send, as YAML."""
    return _run([str(beside("kubectl")), "kustomize", str(KUBERNETES / name)])


def kustomized(name: str) -> list[Object]:
    """The objects of a build, anew each time, so that a test may change them."""
    return documents(build(name))


_HELM = """
import json, sys
import helm_python as helm
ask = json.load(sys.stdin)
try:
    if ask["do"] == "lint":
        release = {"kube_version": ask["kubernetes"], "namespace": "kube-flannel"}
        said = helm.lint(ask["chart"], ask["values"], strict=True, **release)
    elif ask["api"]:
        config = helm.Config(kube_apiserver=ask["api"], namespace="kube-flannel")
        with helm.Chart.load(ask["chart"]) as chart, config:
            said = config.render(chart, ask["values"], name="flannel", namespace="kube-flannel", is_upgrade=True)
    else:
        with helm.Chart.load(ask["chart"]) as chart:
            said = chart.render(ask["values"], name="flannel", namespace="kube-flannel")
except helm.HelmError as error:
    sys.exit(str(error))
json.dump(said, sys.stdout)
"""
"""In a process of its own: Helm is a Go program, whose threads and signal handlers pytest can do without."""


def helm_lint(values: Mapping[str, Any] | None = None, kubernetes: str = "v1.37.0") -> Any:
    """What ``helm lint --strict`` finds."""
    return _helm({"do": "lint", "chart": str(CHART), "values": values or {}, "kubernetes": kubernetes})


def helm_template(values: Mapping[str, Any] | None = None, api: str = "") -> dict[str, str]:
    """``helm template flannel deploy/kubernetes/chart --namespace kube-flannel``: text by template's file name.

    Args:
        values: of the release.
        api: URL of an API server to ask, as an upgrade does; none without.

    Raises:
        ToolFailed: Helm, the values' schema or the chart refuses the values.
    """
    rendered: dict[str, str] = _helm({"do": "render", "chart": str(CHART), "values": values or {}, "api": api})
    return {path.rpartition("/")[2]: text for path, text in rendered.items()}


def helm_objects(values: Mapping[str, Any] | None = None) -> list[Object]:
    """The same as objects, without the notes."""
    files = helm_template(values)
    return [each for name, text in files.items() if name.endswith(".yaml") for each in documents(text)]


def _helm(ask: Mapping[str, Any]) -> Any:
    return json.loads(_run([sys.executable, "-c", _HELM], stdin=json.dumps(ask)))


def beside(program: str) -> Path:
    """A program that a Python package put beside our interpreter."""
    return Path(sys.executable).with_name(program)


def _run(argv: Sequence[str], stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ToolFailed(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    """The objects of one kind."""
    return [each for each in objects if each["kind"] == kind]


def one(objects: Iterable[Object], kind: str) -> Object:
    """The only object of a kind."""
    (only,) = of_kind(objects, kind)
    return only


def pod_spec(daemonset: Object) -> Object:
    """What each pod of a DaemonSet is made from."""
    spec: Object = daemonset["spec"]["template"]["spec"]
    return spec


def flanneld(daemonset: Object) -> Object:
    """The container that the daemon runs in."""
    (only,) = [each for each in pod_spec(daemonset)["containers"] if each["name"] == "kube-flannel"]
    container: Object = only
    return container


def flags(container: Object) -> dict[str, object]:
    """The container's arguments as the daemon's own parser reads them, by field name.

    Raises:
        UsageError: a flag that the daemon does not have, or a value that it does not take.
    """
    return scan(container["args"], DAEMON_FLAGS).values


def host_path(daemonset: Object, mount_path: str) -> str:
    """The host's directory or file behind a path in the daemon's container."""
    (name,) = [each["name"] for each in flanneld(daemonset)["volumeMounts"] if each["mountPath"] == mount_path]
    (path,) = [each["hostPath"]["path"] for each in pod_spec(daemonset)["volumes"] if each["name"] == name]
    found: str = path
    return found
