"""The three kinds of patch, as functions from values to values.

- JSON merge patch, RFC 7396.
- JSON patch, RFC 6902.
- strategic merge patch: Kubernetes' own, which merges some lists by a key of their entries.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

Json = Any


class PatchError(Exception):
    """The patch does not fit the object, or a ``test`` in it failed."""


class _Merged(NamedTuple):
    key: str | None
    """Entries with the same value of this key are the same entry; None: entries are plain values of a set."""


MERGED_LISTS = {
    "metadata.finalizers": _Merged(None),
    "metadata.ownerReferences": _Merged("uid"),
    "spec.podCIDRs": _Merged(None),
    "status.addresses": _Merged("type"),
    "status.conditions": _Merged("type"),
}
"""Lists of a Node or Pod that a strategic merge does not replace.

Source: the patchStrategy and patchMergeKey of the fields, kubernetes/api core/v1 types.
"""


def merge_patch(target: Json, patch: Json) -> Json:
    """Apply a JSON merge patch (RFC 7396 section 2); null deletes, a list replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def strategic_merge(target: Json, patch: Json, path: str = "") -> Json:
    """Apply a strategic merge patch; ``path`` is where in the object we are.

    Directives known: ``$patch: replace`` and ``delete``, ``$deleteFromPrimitiveList/``; the order that
    ``$setElementOrder/`` asks for is ignored.
    """
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    directive = patch.get("$patch")
    if directive == "delete":
        return {}
    result = dict(target) if isinstance(target, dict) and directive != "replace" else {}
    for key, value in patch.items():
        inner = f"{path}.{key}" if path else key
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [entry for entry in result.get(name) or () if entry not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, list) and inner in MERGED_LISTS:
            result[key] = _merge_list(result.get(key) or [], value, MERGED_LISTS[inner].key)
        else:
            result[key] = strategic_merge(result.get(key), value, inner)
    return result


def _merge_list(present: list[Json], patch: list[Json], key: str | None) -> list[Json]:
    if key is None:
        return present + [entry for entry in patch if entry not in present]
    if any(not isinstance(entry, dict) or (key not in entry and "$patch" not in entry) for entry in patch):
        raise PatchError(f"an entry has no {key}")
    kept = {} if any(entry == {"$patch": "replace"} for entry in patch) else {entry[key]: entry for entry in present}
    order = {name: index for index, name in enumerate(kept)}
    patched: dict[Json, Json] = {}
    for entry in patch:
        if entry.get("$patch") == "delete":
            kept.pop(entry[key], None)
        elif key in entry:
            patched[entry[key]] = strategic_merge(kept.pop(entry[key], {}), entry)
    return _interleave(list(kept.items()), list(patched.items()), order)


def _interleave(kept: list[tuple[Json, Json]], patched: list[tuple[Json, Json]], order: dict[Json, int]) -> list[Json]:
    """Entries that were there keep their places to each other; a new one goes before those it is compared with.

    Source: recordings 06-conditions-smp-2 (a new entry comes first) and 06-conditions-badstatus.
    """
    result = []
    while kept and patched:
        before = order[kept[0][0]] < order.get(patched[0][0], -1)
        result.append((kept if before else patched).pop(0)[1])
    return result + [entry for _, entry in kept + patched]


def json_patch(target: Json, operations: Json) -> Json:
    """Apply a JSON patch; all or nothing.

    Raises:
        PatchError: an operation is malformed, its path does not exist, or its ``test`` failed.
    """
    result = copy.deepcopy(target)
    if not isinstance(operations, list):
        raise PatchError("a JSON patch is a list of operations")
    for operation in operations:
        try:
            result = _apply(result, operation)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PatchError(f"{operation!r} does not fit") from error
    return result


def _apply(document: Json, operation: Json) -> Json:
    name, path = operation["op"], _pointer(operation["path"])
    match name:
        case "test":
            if _get(document, path) != operation["value"]:
                raise PatchError("test failed")
            return document
        case "remove":
            return _remove(document, path)
        case "add":
            return _add(document, path, operation["value"])
        case "replace":
            _get(document, path)
            return _add(_remove(document, path), path, operation["value"]) if path else operation["value"]
        case "copy":
            return _add(document, path, copy.deepcopy(_get(document, _pointer(operation["from"]))))
        case "move":
            source = _pointer(operation["from"])
            value = _get(document, source)
            return _add(_remove(document, source), path, value)
    raise PatchError(f"there is no operation {name!r}")


def _pointer(text: str) -> list[str]:
    """RFC 6901."""
    if text and not text.startswith("/"):
        raise PatchError("a path begins with /")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _get(document: Json, path: list[str]) -> Json:
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _add(document: Json, path: list[str], value: Json) -> Json:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        index = len(parent) if last == "-" else int(last)
        if not 0 <= index <= len(parent):
            raise IndexError(index)
        parent.insert(index, value)
    else:
        parent[last] = value
    return document


def _remove(document: Json, path: list[str]) -> Json:
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        del parent[int(last)]
    else:
        del parent[last]
    return document
