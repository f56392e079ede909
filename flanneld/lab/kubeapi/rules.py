"""What a kube-apiserver makes of a Node that a client sends: known fields, defaults, and what is refused.

Only what recordings or Flannel's users can meet; a Pod is kept as it was sent.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from flanneld.lab.kubeapi import status
from flanneld.lab.kubeapi.status import Cause

Json = dict[str, Any]

MAX_ANNOTATION_BYTES = 262144
"""Of all keys and values together (05-patch-annotation-toolong-422)."""
NOT_READY_TAINT = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
"""Every new Node gets it at admission (02-create-node)."""

_METADATA = frozenset({
    "name", "generateName", "namespace", "selfLink", "uid", "resourceVersion", "generation", "creationTimestamp",
    "deletionTimestamp", "deletionGracePeriodSeconds", "labels", "annotations", "ownerReferences", "finalizers",
    "managedFields",
})  # fmt: skip
_SPEC = frozenset({"podCIDR", "podCIDRs", "providerID", "unschedulable", "taints", "configSource", "externalID"})
_STATUS = frozenset({
    "capacity", "allocatable", "phase", "conditions", "addresses", "daemonEndpoints", "nodeInfo", "images",
    "volumesInUse", "volumesAttached", "config", "runtimeHandlers", "features", "declaredFeatures",
})  # fmt: skip
_NODE_INFO = (
    "machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion", "kubeletVersion",
    "kubeProxyVersion", "operatingSystem", "architecture",
)  # fmt: skip
_LABEL = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_SUBDOMAIN = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*"
_QUALIFIED = re.compile(rf"(?:(?P<prefix>{_SUBDOMAIN})/)?{_LABEL}")

_KEY_RULE = (
    "a valid label key must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS subdomain prefix and '/' "
    "(e.g. 'example.com/MyName')"
)
_NAME_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start "
    "and end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_CIDR_RULE = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
_CIDR_FIXED = 'Forbidden: node updates may not change podCIDR except from "" to valid'


def unknown_fields(node: Mapping[str, Any]) -> list[str]:
    """Fields that a Node does not have; the server drops them (05-patch-unknown-field-warn)."""
    parts = {"metadata": _METADATA, "spec": _SPEC, "status": _STATUS}
    outer = [key for key in node if key not in parts and key not in ("kind", "apiVersion")]
    inner = [f"{part}.{key}" for part, known in parts.items() for key in node.get(part) or () if key not in known]
    return outer + inner


def is_wrongly_typed(node: Mapping[str, Any]) -> bool:
    """Whether a field that Flannel uses has a value of another JSON type than it must have."""
    metadata, spec, state = (node.get(part) or {} for part in ("metadata", "spec", "status"))
    if not all(isinstance(part, dict) for part in (metadata, spec, state)):
        return True
    maps = [metadata.get("annotations") or {}, metadata.get("labels") or {}]
    texts = [value for values in maps if isinstance(values, dict) for value in values.values()]
    texts += [spec.get("podCIDR") or "", *(spec.get("podCIDRs") or ())]
    conditions = state.get("conditions") or []
    return (
        any(not isinstance(values, dict) for values in maps)
        or any(not isinstance(text, str) for text in texts)
        or any(not isinstance(condition, dict) for condition in conditions)
    )


def normal_form(node: Mapping[str, Any]) -> Json:
    """A Node with its unknown and empty fields dropped and the defaults filled in."""
    metadata = _known(node.get("metadata"), _METADATA)
    for server_owned in ("managedFields", "selfLink"):
        metadata.pop(server_owned, None)
    spec = _known(node.get("spec"), _SPEC)
    if cidrs := spec.get("podCIDRs") or [spec["podCIDR"]] if "podCIDR" in spec or "podCIDRs" in spec else []:
        spec |= {"podCIDR": cidrs[0], "podCIDRs": cidrs}
    state = _known(node.get("status"), _STATUS)
    if "conditions" in state:
        nulls = {"lastHeartbeatTime": None, "lastTransitionTime": None}
        state["conditions"] = [{**nulls, **condition} for condition in state["conditions"]]
    state.setdefault("daemonEndpoints", {"kubeletEndpoint": {"Port": 0}})
    state["nodeInfo"] = {**dict.fromkeys(_NODE_INFO, ""), **(state.get("nodeInfo") or {})}
    return {"metadata": metadata, "spec": spec, "status": state}


def check_new(node: Json) -> None:
    """Refuse a new Node that breaks a rule."""
    causes = _name_causes(node["metadata"].get("name", "")) + _annotation_causes(node) + _cidr_causes(node)
    _refuse(node, causes)


def check_update(old: Json, new: Json) -> None:
    """Refuse a change that breaks a rule."""
    # the real server validates the metadata three times over and says so three times
    causes = _annotation_causes(new) * 3 + _cidr_causes(new)
    before = old["spec"].get("podCIDRs")
    if before and new["spec"].get("podCIDRs") != before:
        causes.append(Cause("spec.podCIDRs", "FieldValueForbidden", _CIDR_FIXED))
    _refuse(new, causes)


def _refuse(node: Json, causes: list[Cause]) -> None:
    if causes:
        raise status.invalid("Node", node["metadata"].get("name", ""), causes)


def _known(part: Mapping[str, Any] | None, known: frozenset[str]) -> Json:
    return {
        key: value for key, value in (part or {}).items() if key in known and value not in (None, "", {}, [], False)
    }


def _name_causes(name: str) -> list[Cause]:
    if re.fullmatch(_SUBDOMAIN, name) and len(name) <= 253:
        return []
    return [Cause("metadata.name", "FieldValueInvalid", f'Invalid value: "{name}": {_NAME_RULE}')]


def _annotation_causes(node: Json) -> list[Cause]:
    annotations: dict[str, str] = node["metadata"].get("annotations") or {}
    causes = [
        Cause("metadata.annotations", "FieldValueInvalid", f'Invalid value: "{key}": {_KEY_RULE}')
        for key in annotations
        if not _QUALIFIED.fullmatch(key.lower())  # annotation keys may be in upper case
    ]
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > MAX_ANNOTATION_BYTES:
        message = f"Too long: may not be more than {MAX_ANNOTATION_BYTES} bytes"
        causes.append(Cause("metadata.annotations", "FieldValueTooLong", message))
    return causes


def _cidr_causes(node: Json) -> list[Cause]:
    causes = []
    for index, cidr in enumerate(node["spec"].get("podCIDRs") or ()):
        try:
            ipaddress.ip_network(cidr, strict=False)
        except ValueError:
            causes.append(
                Cause(f"spec.podCIDRs[{index}]", "FieldValueInvalid", f'Invalid value: "{cidr}": {_CIDR_RULE}')
            )
    return causes
