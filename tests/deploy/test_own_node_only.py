"""The admission policy: the daemon's account may touch only the node that its pod runs on, and only what is ours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.support import manifests
from tests.support.admission import POLICY, refusals
from tests.support.manifests import Object
from tests.support.tell import Tell

pytestmark = [pytest.mark.needs("cel", "kubernetes-validate")]

NODE: Object = {
    "metadata": {"name": "n1", "labels": {"pool": "web"}, "annotations": {"theirs": "1"}},
    "status": {
        "addresses": [{"type": "InternalIP", "address": "192.0.2.11"}],
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}


def annotated(node: Object) -> None:
    node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = "192.0.2.11"
    node["status"]["conditions"].insert(0, {"type": "NetworkUnavailable", "status": "False"})


def changed(change: Callable[[Object], object]) -> Object:
    after = copy.deepcopy(NODE)
    change(after)
    return after


def test_what_the_daemon_writes_passes() -> None:
    assert refusals(NODE, changed(annotated), "n1") == []
    assert refusals(changed(annotated), NODE, "n1") == []


def test_a_node_without_annotations_and_conditions_passes() -> None:
    bare: Object = {"metadata": {"name": "n1"}, "status": {}}
    after: Object = {"metadata": {"name": "n1", "annotations": {}}, "status": {"conditions": []}}
    annotated(after)
    assert refusals(bare, after, "n1") == []


@pytest.mark.parametrize("pod_node", ["n2", "", None])
def test_another_node_is_refused(pod_node: str | None) -> None:
    assert refusals(NODE, changed(annotated), pod_node) == ["flannel may change only the node that it runs on"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda node: node["metadata"]["labels"].update(pool="db"), "labels"),
        (lambda node: node["metadata"].pop("labels"), "labels"),
        (lambda node: node["metadata"]["annotations"].update(other="2"), "annotations"),
        (lambda node: node["metadata"]["annotations"].update(theirs="2"), "annotations"),
        (lambda node: node["metadata"]["annotations"].pop("theirs"), "annotations"),
        (lambda node: node["status"]["conditions"][0].update(status="False"), "condition"),
        (lambda node: node["status"]["conditions"].append({"type": "MemoryPressure"}), "condition"),
        (lambda node: node["status"]["addresses"][0].update(address="192.0.2.99"), "addresses"),
    ],
)
def test_what_is_not_ours_is_refused(change: Callable[[Object], object], word: str) -> None:
    (message,) = refusals(NODE, changed(change), "n1")
    assert word in message


def test_others_are_not_asked() -> None:
    moved = changed(lambda node: node["metadata"]["labels"].update(pool="db"))
    assert refusals(NODE, moved, None, user="system:node:n1") == []


@pytest.mark.needs("kubectl")
def test_policy_is_for_the_account_of_the_manifests(tell: Tell) -> None:
    account = manifests.one(manifests.kustomized("base"), "ServiceAccount")["metadata"]
    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert user in POLICY.read_text()
    tell(f"{POLICY.parent.name} restricts {user}")
