"""How a kube-apiserver says no: ``Status`` bodies, word for word where clients may read the words.

Source: recordings of kube-apiserver 1.36.2 (``tests/kube/transcripts``); each function names its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Refused(Exception):
    """The request is answered with this status instead of a result."""

    def __init__(self, body: Mapping[str, Any], code: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body.get("message", ""))
        self.body = body
        self.code = code
        self.headers = dict(headers or {})


class Cause(NamedTuple):
    """One wrong field of an object."""

    field: str
    reason: str
    message: str
    """Without the field's name."""


def failure(
    code: int,
    reason: str,
    message: str,
    details: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Refused:
    """Any refusal; ``details`` of None leaves the key out, as the real server does for some."""
    body: dict[str, Any] = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        **({"reason": reason} if reason else {}),
        **({} if details is None else {"details": details}),
        "code": code,
    }  # fmt: skip
    return Refused(body, code, headers)


def unauthorized() -> Refused:
    """An unknown token (03-get-401)."""
    return failure(401, "Unauthorized", "Unauthorized")


def forbidden(user: str, verb: str, resource: str, name: str, namespace: str) -> Refused:
    """A known user without the right (03-get-403, 04-list-403, 05-patch-nodes-403)."""
    plural = resource.partition("/")[0]
    what = f'{plural} "{name}"' if name else plural
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    message = f'{what} is forbidden: User "{user}" cannot {verb} resource "{resource}" in API group "" {where}'
    return failure(403, "Forbidden", message, {**({"name": name} if name else {}), "kind": plural})


def forbidden_path(user: str, verb: str, path: str) -> Refused:
    """A path outside the resources that this user may not ask for."""
    return failure(403, "Forbidden", f'forbidden: User "{user}" cannot {verb} path "{path}"', {})


def no_such_path() -> Refused:
    """A path that nobody serves (07-notfound-path-404)."""
    return failure(404, "NotFound", "the server could not find the requested resource", {})


def wrong_method() -> Refused:
    """A verb that the resource does not have (07-method-405)."""
    return failure(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {})


def not_found(plural: str, name: str) -> Refused:
    """No object of that name (03-get-node-404)."""
    return failure(404, "NotFound", f'{plural} "{name}" not found', {"name": name, "kind": plural})


def already_exists(plural: str, name: str) -> Refused:
    """Created twice (02-create-node-exists-409)."""
    return failure(409, "AlreadyExists", f'{plural} "{name}" already exists', {"name": name, "kind": plural})


def conflict(plural: str, name: str) -> Refused:
    """The resourceVersion that was given is not the present one (05-patch-stale-rv-409)."""
    message = (
        f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return failure(409, "Conflict", message, {"name": name, "kind": plural})


def not_acceptable() -> Refused:
    """An ``Accept`` that we cannot serve (04-list-406)."""
    kinds = "application/json, application/yaml, application/vnd.kubernetes.protobuf"
    streams = "application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch"
    message = f"406: Not Acceptable\n\nAvailable representations: {kinds}, {streams}"
    return failure(406, "NotAcceptable", message, {})


def unsupported_media_type() -> Refused:
    """A patch of a type that is none (05-patch-415)."""
    return failure(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})


def bad_request(message: str) -> Refused:
    """Something cannot be read (04-list-badfieldselector-400, 05-patch-badjson-400)."""
    return failure(400, "BadRequest", message)


def internal(message: str) -> Refused:
    """An error that the real server does not classify either (11-watch-rv-garbage)."""
    return failure(500, "", message)


def invalid(kind: str, name: str, causes: Sequence[Cause], group: str = "") -> Refused:
    """An object that breaks rules (02-create-node-invalid-422, 05-patch-podcidr-change-422)."""
    texts = list(dict.fromkeys(f"{cause.field}: {cause.message}" for cause in causes))
    listed = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    full_kind = f"{kind}.{group}" if group else kind
    details = {
        **({"name": name} if name else {}),
        **({"group": group} if group else {}),
        **({"kind": kind} if kind else {}),
        "causes": [{"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes],
    }
    return failure(422, "Invalid", f'{full_kind} "{name}" is invalid: {listed}', details)


def rejected_patch() -> Refused:
    """A JSON patch that does not fit the object (05-patch-jsonpatch-test-fails-422)."""
    return failure(422, "Invalid", "the server rejected our request due to an error in our request", {})


def too_large_version(asked: int, current: int) -> Refused:
    """A list at a version that has not come yet (04-list-rv-too-large-504)."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return failure(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        {"causes": [cause], "retryAfterSeconds": 1},
        {"Retry-After": "1"},
    )


def expired_list() -> Refused:
    """A list at an exact version that is compacted away (13-list-exact-rv-410)."""
    return failure(410, "Expired", "The resourceVersion for the provided list is too old.")


def expired_continue(token: str) -> Refused:
    """A continue token whose version is compacted away; a fresh token comes with it (13-list-continue-410)."""
    refused = failure(
        410,
        "Expired",
        "The provided continue parameter is too old to display a consistent list result. You can start a new list "
        "without the continue parameter, or use the continue token in this response to retrieve the remainder of the "
        "results. Continuing with the provided token results in an inconsistent list - objects that were created, "
        "modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    )
    refused.body["metadata"]["continue"] = token
    return refused


def expired_watch(asked: int, oldest: int) -> Mapping[str, Any]:
    """What a watch says, inside a 200, when it cannot resume (13-watch-410-too-old)."""
    return failure(410, "Expired", f"too old resource version: {asked} ({oldest})").body
