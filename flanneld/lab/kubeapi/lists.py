"""Lists: which objects, at which version, how many at a time."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence

from flanneld.lab.kubeapi import status
from flanneld.lab.kubeapi.message import Answer, Request, Target
from flanneld.lab.kubeapi.objects import Key, Store, Stored

Selects = Callable[[Stored], bool]

_FIELDS: Mapping[str, Mapping[str, Callable[[Stored], str]]] = {
    "nodes": {"metadata.name": lambda stored: stored.key[2]},
    "pods": {
        "metadata.name": lambda stored: stored.key[2],
        "metadata.namespace": lambda stored: stored.key[1],
        "spec.nodeName": lambda stored: stored.value["spec"].get("nodeName", ""),
    },
}
_TERM = re.compile(r"(?P<key>!?[^=!]+)(?:(?P<operator>==?|!=)(?P<value>.*))?")


def selector(request: Request, target: Target) -> Selects:
    """What ``fieldSelector`` and ``labelSelector`` let through: equality and existence only.

    Raises:
        Refused: a field that cannot be selected by, or a form we do not know (400).
    """
    tests: list[Selects] = []
    if target.namespace:
        tests.append(lambda stored: stored.key[1] == target.namespace)
    for key, operator, value in _terms(request.query.get("fieldSelector", "")):
        read = _FIELDS[target.plural].get(key)
        if read is None:
            raise status.bad_request(f"field label not supported: {key}")
        tests.append(_comparison(read, operator, value))
    for key, operator, value in _terms(request.query.get("labelSelector", "")):
        tests.append(_label_test(key, operator, value))
    return lambda stored: all(test(stored) for test in tests)


def _terms(text: str) -> list[tuple[str, str, str]]:
    terms = []
    for part in filter(None, text.split(",")):
        found = _TERM.fullmatch(part)
        if found is None or " " in part.strip():
            raise status.bad_request(f"unable to parse requirement: {part}")
        terms.append((found["key"], found["operator"] or "", found["value"] or ""))
    return terms


def _comparison(read: Callable[[Stored], str], operator: str, value: str) -> Selects:
    return lambda stored: (read(stored) == value) is (operator != "!=")


def _label_test(key: str, operator: str, value: str) -> Selects:
    if not operator:
        return lambda stored: (key.lstrip("!") in stored.labels) is not key.startswith("!")
    return lambda stored: (stored.labels.get(key) == value) is (operator != "!=")


def version_of(text: str) -> int:
    """A resourceVersion as a number; 0 when none is given.

    Raises:
        ValueError: it is not one; the sentence is the server's own.
    """
    if text and not text.isdecimal():
        raise ValueError(
            f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        )
    return int(text or 0)


def answer_list(store: Store, request: Request, target: Target) -> Answer:
    """A list whose version has come (the caller waits for it).

    Raises:
        Refused: the version or the continue token is compacted away (410), or a parameter is wrong (400).
    """
    query = request.query
    selects = selector(request, target)
    limit = int(query.get("limit") or 0)
    version = version_of(query.get("resourceVersion", ""))
    after: Key | None = None
    if token := query.get("continue"):
        version, after = _read_token(token)
        try:
            objects = store.all_at(target.plural, version) if version else store.all(target.plural)
        except status.Refused:
            raise status.expired_continue(_token(0, after)) from None
    elif version and (query.get("resourceVersionMatch") == "Exact" or limit):
        objects = store.all_at(target.plural, version)
    else:
        # the cache, which answers version 0, does not know limits (04-list-limit-rv0)
        limit = 0 if query.get("resourceVersion") == "0" else limit
        version, objects = store.version, store.all(target.plural)
    found = [stored for stored in objects if (after is None or stored.key > after) and selects(stored)]
    page = found[:limit] if limit else found
    metadata: dict[str, object] = {"resourceVersion": str(version or store.version)}
    if len(page) < len(found):
        if version == store.version:
            store.keep_snapshot(target.plural)
        metadata["continue"] = _token(version, page[-1].key)
        if not {"fieldSelector", "labelSelector"} & set(query):
            metadata["remainingItemCount"] = len(found) - len(page)
    return Answer.json(_render(target, metadata, page))


def _render(target: Target, metadata: Mapping[str, object], page: Sequence[Stored]) -> list[bytes]:
    kind = "NodeList" if target.plural == "nodes" else "PodList"
    pieces = [f'{{"kind":"{kind}","apiVersion":"v1","metadata":{json.dumps(metadata)},"items":['.encode()]
    for number, stored in enumerate(page):
        pieces += [b"," if number else b"", *stored.pieces()]
    return [*pieces, b"]}\n"]


def _token(version: int, after: Key) -> str:
    """Version 0 in a token means: whatever is there now (the token that a 410 brings)."""
    return base64.urlsafe_b64encode(json.dumps([version, *after]).encode()).decode().rstrip("=")


def _read_token(token: str) -> tuple[int, Key]:
    try:
        version, *key = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        plural, namespace, name = map(str, key)
        return int(version), (plural, namespace, name)
    except (ValueError, TypeError):
        raise status.bad_request("continue key is not valid: a token of another server") from None
