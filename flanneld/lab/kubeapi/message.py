"""A request and an answer as values, and what a path means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from flanneld.lab.kubeapi.objects import KINDS

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_RESOURCE = re.compile(
    rf"/api/v1/(?:namespaces/(?P<namespace>[^/]+)/)?(?P<plural>{'|'.join(KINDS)})"
    r"(?:/(?P<name>[^/]+)(?:/(?P<subresource>status))?)?"
)
TRUE = ("1", "t", "T", "true", "TRUE", "True")


class Target(NamedTuple):
    """The object or the list that a path names."""

    plural: str
    namespace: str
    name: str
    """Empty for a list."""
    subresource: str

    @property
    def resource(self) -> str:
        """As rights name it, such as ``nodes/status``."""
        return f"{self.plural}/{self.subresource}" if self.subresource else self.plural


@dataclass(frozen=True)
class Request:
    """One request, read to its end."""

    method: str
    target: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = b""
    certificate_name: str | None = None
    path: str = field(init=False)
    query: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        object.__setattr__(self, "path", unquote(parts.path))
        object.__setattr__(self, "query", dict(parse_qsl(parts.query, keep_blank_values=True)))

    @property
    def resource(self) -> Target | None:
        """What it is about; None for paths such as ``/version``."""
        found = _RESOURCE.fullmatch(self.path)
        return (
            Target(*(found[part] or "" for part in ("plural", "namespace", "name", "subresource"))) if found else None
        )

    @property
    def verb(self) -> str:
        """As rights name it: get, list, watch, create, update, patch or delete."""
        verb = _VERBS.get(self.method, self.method.lower())
        if verb == "get" and (target := self.resource) and not target.name:
            return "watch" if self.asks("watch") else "list"
        return verb

    def asks(self, parameter: str) -> bool:
        """Whether a boolean parameter is set."""
        return self.query.get(parameter, "") in TRUE


@dataclass(frozen=True)
class Answer:
    """One answer with a body of known length."""

    code: int
    body: Sequence[bytes]
    """In pieces, so that a long list need not be copied together."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: object, code: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """A JSON answer."""
        return Answer.json([msgspec.json.encode(value)], code, headers)

    @staticmethod
    def json(body: Sequence[bytes], code: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """An answer whose JSON is there already."""
        return Answer(code, body, {"Content-Type": "application/json", **(headers or {})})

    @staticmethod
    def text(body: str, code: int = 200) -> Answer:
        """A plain answer."""
        return Answer(code, [body.encode()], {"Content-Type": "text/plain; charset=utf-8"})
