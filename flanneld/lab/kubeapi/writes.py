"""Creating, changing and deleting objects: which half of an object a request may touch, and what it is checked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import msgspec

from flanneld.lab.kubeapi import patches, rules, status
from flanneld.lab.kubeapi.message import Answer, Request, Target
from flanneld.lab.kubeapi.objects import KINDS, Store, Stored
from flanneld.lab.kubeapi.status import Cause

Json = dict[str, Any]

_PATCH_TYPES = {
    "application/merge-patch+json": patches.merge_patch,
    "application/strategic-merge-patch+json": patches.strategic_merge,
    "application/json-patch+json": patches.json_patch,
    # server-side apply without the ownership of fields: enough to merge one writer's wishes
    "application/apply-patch+yaml": patches.strategic_merge,
}
_FIXED = ("name", "namespace", "uid", "creationTimestamp", "resourceVersion")
"""Metadata that no update changes."""


class Writer:
    """Carries out the writing verbs on a store.

    Args:
        store: where to.
        is_old: answer as 1.20 does where it differs (``v1.20-differs``).
    """

    def __init__(self, store: Store, is_old: bool = False) -> None:
        self._store = store
        self._is_old = is_old

    def create(self, request: Request, target: Target) -> Answer:
        """POST on a list."""
        value = _decode(request.body)
        if not isinstance(value, dict) or rules.is_wrongly_typed(value):
            raise status.bad_request(f'{KINDS[target.plural]} in version "v1" cannot be handled as a {target.plural}')
        warnings = self._unknown_fields(request, value) if target.plural == "nodes" else {}
        value = _canonical(target.plural, value)
        if target.namespace:
            value["metadata"].setdefault("namespace", target.namespace)
        if target.plural == "nodes":
            rules.check_new(value)
            value["spec"].setdefault("taints", []).append(dict(rules.NOT_READY_TAINT))
        value["metadata"].pop("resourceVersion", None)
        return Answer.json([self._store.create(target.plural, value).as_object()], 201, warnings)

    def update(self, request: Request, target: Target) -> Answer:
        """PUT on an object or its status."""
        old = self._store.get(target.plural, target.namespace, target.name)
        value = _decode(request.body)
        if not isinstance(value, dict) or rules.is_wrongly_typed(value):
            raise status.bad_request(f'{old.kind} in version "v1" cannot be handled as a {target.plural}')
        return self._replace(request, target, old, value)

    def patch(self, request: Request, target: Target) -> Answer:
        """PATCH on an object or its status."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if media_type not in _PATCH_TYPES:
            raise status.unsupported_media_type()
        if media_type.startswith("application/apply-patch") and not request.query.get("fieldManager"):
            cause = Cause("fieldManager", "FieldValueRequired", "Required value: is required for apply patch")
            raise status.invalid("PatchOptions", "", [cause], "meta.k8s.io")
        old = self._store.get(target.plural, target.namespace, target.name)
        patch = self._decode_patch(request.body)
        try:
            value = _PATCH_TYPES[media_type](old.as_value(), patch)
        except patches.PatchError:
            raise status.rejected_patch() from None
        if not isinstance(value, dict) or rules.is_wrongly_typed(value):
            raise _invalid_patch(value, "a field has the wrong type")
        return self._replace(request, target, old, value)

    def delete(self, target: Target) -> Answer:
        """DELETE on an object."""
        gone = self._store.delete(self._store.get(target.plural, target.namespace, target.name))
        details = {"name": target.name, "kind": target.plural, "uid": gone.value["metadata"]["uid"]}
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return Answer.of(body)

    def _replace(self, request: Request, target: Target, old: Stored, value: Json) -> Answer:
        warnings = self._unknown_fields(request, value) if target.plural == "nodes" else {}
        version = (value.get("metadata") or {}).get("resourceVersion")
        if version and version != old.value["metadata"]["resourceVersion"]:
            raise status.conflict(target.plural, target.name)
        new = _allowed(old, _canonical(target.plural, value), target.subresource)
        if target.plural == "nodes":
            rules.check_update(old.value, new)
        return Answer.json([self._store.replace(old, new).as_object()], 200, warnings)

    def _unknown_fields(self, request: Request, value: Mapping[str, Any]) -> Mapping[str, str]:
        """Headers that warn of fields the server drops; with ``fieldValidation=Strict`` they are refused."""
        unknown = rules.unknown_fields(value)
        wanted = "Ignore" if self._is_old else request.query.get("fieldValidation", "Ignore")
        if unknown and wanted == "Strict":
            raise _invalid_patch(value, f'strict decoding error: unknown field "{unknown[0]}"')
        return {"Warning": f'299 - "unknown field \\"{unknown[0]}\\""'} if unknown and wanted == "Warn" else {}

    def _decode_patch(self, body: bytes) -> Any:
        try:
            return _decode(body)
        except status.Refused as refused:
            if self._is_old:
                raise status.internal("Invalid JSON Patch") from None
            raise status.bad_request(f"error decoding patch: {refused.body['message']}") from None


def _allowed(old: Stored, value: Json, subresource: str) -> Json:
    """The new object with the half dropped that the path does not reach (05-patch-status-ignores-spec)."""
    merged = copy.deepcopy(old.value)
    for part in ("metadata", "status") if subresource == "status" else ("metadata", "spec"):
        merged[part] = value.get(part, {})
    merged["metadata"] |= {key: old.value["metadata"][key] for key in _FIXED if key in old.value["metadata"]}
    return merged


def _canonical(plural: str, value: Json) -> Json:
    if plural == "nodes":
        return rules.normal_form(value)
    kept = {part: dict(value.get(part) or {}) for part in ("metadata", "spec", "status")}
    kept["metadata"].pop("managedFields", None)
    return kept


def _invalid_patch(value: Any, why: str) -> status.Refused:
    """The real server quotes the whole object too (05-patch-annotation-nonstring)."""
    quoted = msgspec.json.encode(value).decode()
    return status.invalid("", "", [Cause("patch", "FieldValueInvalid", f"Invalid value: {quoted!r}: {why}")])


def _decode(body: bytes) -> Any:
    if not body.strip():
        raise status.bad_request("unexpected end of JSON input")
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise status.bad_request(str(error)) from None
