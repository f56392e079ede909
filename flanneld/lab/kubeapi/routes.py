"""From a request to its answer: who may, what it is about, which of our parts does it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Literal

import msgspec

from flanneld.lab.kubeapi import status
from flanneld.lab.kubeapi.access import OPEN_PATHS, Access
from flanneld.lab.kubeapi.faults import STORE_TIMEOUT, Faults
from flanneld.lab.kubeapi.lists import answer_list, selector, version_of
from flanneld.lab.kubeapi.message import Answer, Request, Target
from flanneld.lab.kubeapi.objects import Store
from flanneld.lab.kubeapi.status import Cause, Refused
from flanneld.lab.kubeapi.watches import Timing, Watch
from flanneld.lab.kubeapi.writes import Writer

Dialect = Literal["1.36", "1.20"]

_PARTIAL = "as=PartialObjectMetadata"
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h)?")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class Routes:
    """The API.

    Args:
        store: its objects.
        access: its users.
        faults: what goes wrong on purpose.
        timing: how long things take.
        dialect: the release whose answers are given where releases differ.
    """

    def __init__(self, store: Store, access: Access, faults: Faults, timing: Timing, dialect: Dialect) -> None:
        self._store, self._access, self._faults, self._timing = store, access, faults, timing
        self._is_old = dialect == "1.20"
        self._dialect = dialect
        self._writer = Writer(store, self._is_old)

    async def answer(self, request: Request) -> Answer | Watch:
        """Do what is asked; a watch is returned to be streamed."""
        if (instead := self._faults.refusal(request.verb)) is not None:
            return instead
        try:
            user = self._access.user(request.headers, request.certificate_name)
            target = request.resource
            if target is None:
                return self._page(request, user)
            if not self._access.may(user, request.verb, target.resource):
                raise status.forbidden(user, request.verb, target.resource, target.name, target.namespace)
            return await self._serve(request, target)
        except Refused as refused:
            return Answer.of(refused.body, refused.code, refused.headers)

    async def _serve(self, request: Request, target: Target) -> Answer | Watch:
        _check_accept(request)
        if request.verb == "watch":
            return self._watch(request, target)
        if self._faults.store_stalled and request.query.get("resourceVersion") != "0":
            await asyncio.sleep(self._timing.lasts(_duration(request.query.get("timeout"), self._timing)))
            return STORE_TIMEOUT
        if request.verb == "list":
            return await self._list(request, target)
        writer = self._writer
        on_list: dict[str, Callable[[], Answer]] = {"create": lambda: writer.create(request, target)}
        on_object: dict[str, Callable[[], Answer]] = {
            "get": lambda: self._get(request, target),
            "update": lambda: writer.update(request, target),
            "patch": lambda: writer.patch(request, target),
        }
        if not target.subresource:
            on_object["delete"] = lambda: writer.delete(target)
        act = (on_object if target.name else on_list).get(request.verb)
        if act is None:
            raise status.wrong_method()
        return act()

    def _get(self, request: Request, target: Target) -> Answer:
        found = self._store.get(target.plural, target.namespace, target.name)
        if _PARTIAL in request.headers.get("accept", ""):
            metadata = found.as_value()["metadata"]
            return Answer.of({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
        return Answer.json([found.as_object(), b"\n"])

    async def _list(self, request: Request, target: Target) -> Answer:
        try:
            version = version_of(request.query.get("resourceVersion", ""))
        except ValueError as error:
            if self._is_old:
                raise status.internal(str(error)) from None
            raise status.bad_request(f"invalid resource version: {error}") from None
        if version > self._store.version:
            await asyncio.sleep(self._timing.lasts(self._timing.future_list_s))
        if version > self._store.version:
            raise status.too_large_version(version, self._store.version)
        return answer_list(self._store, request, target)

    def _watch(self, request: Request, target: Target) -> Watch:
        if request.asks("sendInitialEvents") and self._is_old:
            causes = [
                Cause(
                    "resourceVersionMatch", "FieldValueForbidden", f"Forbidden: resourceVersionMatch is forbidden {why}"
                )
                for why in ("for watch", "unless resourceVersion is provided")
            ]
            raise status.invalid("ListOptions", "", causes, "meta.k8s.io")
        selects = selector(request, target)
        return Watch(self._store, request, target, selects, self._faults, self._timing)

    def _page(self, request: Request, user: str) -> Answer:
        path = request.path
        if path not in OPEN_PATHS and not self._access.may(user, "get", path):
            known = self._access.rights.get(user)
            if not known or not path.startswith("/api"):  # discovery is open to whoever is known
                raise status.forbidden_path(user, request.verb, path)
        if request.method != "GET":
            raise status.no_such_path()
        match path:
            case "/healthz" | "/livez" | "/readyz":
                return Answer.text("ok")
            case "/version":
                return Answer.of(self._version())
            case "/api":
                return Answer.of({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
            case "/apis":
                return Answer.of({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
            case "/api/v1":
                return Answer.of(_RESOURCES)
        raise status.no_such_path()

    def _version(self) -> dict[str, str]:
        major, minor = self._dialect.split(".")
        return {
            "major": major, "minor": minor, "emulationMajor": major, "emulationMinor": minor,
            "minCompatibilityMajor": major, "minCompatibilityMinor": str(int(minor) - 1),
            "gitVersion": f"v{self._dialect}.2", "gitCommit": "", "gitTreeState": "",
            "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "", "platform": "linux/amd64",
        }  # fmt: skip


def _resource(name: str, kind: str, namespaced: bool, verbs: str, short: str = "") -> dict[str, object]:
    names: dict[str, object] = {"shortNames": [short]} if short else {}
    return {"name": name, "singularName": kind.lower() if short else "", "namespaced": namespaced, "kind": kind,
            "verbs": verbs.split(), **names}  # fmt: skip


_RESOURCES = {
    "kind": "APIResourceList",
    "groupVersion": "v1",
    "resources": [
        _resource("nodes", "Node", False, "create delete get list patch update watch", "no"),
        _resource("nodes/status", "Node", False, "get patch update"),
        _resource("pods", "Pod", True, "create delete get list patch update watch", "po"),
        _resource("pods/status", "Pod", True, "get patch update"),
    ],
}
"""What kubectl must know to turn ``nodes`` into a path."""


def _check_accept(request: Request) -> None:
    accepted = request.headers.get("accept", "*/*")
    ranges = [part.partition(";")[0].strip() for part in accepted.split(",")]
    if not {"application/json", "application/*", "*/*", ""} & set(ranges):
        raise status.not_acceptable()


def _duration(text: str | None, timing: Timing) -> float:
    found = _DURATION.fullmatch(text or "")
    return float(found["number"]) * _UNITS[found["unit"]] if found else timing.request_timeout_s


def encode_error(message: str) -> bytes:
    """A body for requests that are no HTTP."""
    return msgspec.json.encode(status.bad_request(message).body)
