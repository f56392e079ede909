"""What the admission policy of ``components/own-node-only`` says to a change of a node, by a real CEL evaluator.

Kubernetes has its own evaluator; the policy uses nothing that the two could understand differently.
"""

from __future__ import annotations

import importlib
from typing import Any

from tests.support import manifests
from tests.support.manifests import KUBERNETES, Object

POLICY = KUBERNETES / "components" / "own-node-only" / "policy.yaml"
FLANNEL = "system:serviceaccount:kube-flannel:flannel"


def refusals(before: Object, after: Object, pod_node: str | None, user: str = FLANNEL) -> list[str]:
    """Messages of all rules that a change breaks.

    Args:
        before, after: the Node.
        pod_node: node of the pod that the token was made for; None = an API server that does not say.
        user: whose request it is.
    """
    cel = importlib.import_module("cel")
    policy = manifests.one(manifests.documents(POLICY.read_text()), "ValidatingAdmissionPolicy")["spec"]
    extra = {} if pod_node is None else {"extra": {"authentication.kubernetes.io/node-name": [pod_node]}}
    request = {"name": before["metadata"]["name"], "userInfo": {"username": user, **extra}}
    known: dict[str, Any] = {"object": after, "oldObject": before, "request": request}
    if not all(cel.evaluate(each["expression"], known) for each in policy["matchConditions"]):
        return []
    known["variables"] = {each["name"]: cel.evaluate(each["expression"], known) for each in policy["variables"]}
    return [each["message"] for each in policy["validations"] if not cel.evaluate(each["expression"], known)]
