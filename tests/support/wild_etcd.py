"""Writes to a lab's etcd what no flanneld would: any bytes as key and value, thousands at once.

Through etcd's JSON gateway, because ``etcdctl`` takes its words from a command line, which has no NUL.
"""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from flanneld.lab import Lab
from flanneld.lab.etcd import Etcd
from flanneld.lab.netns import run_in
from flanneld.lab.spec import SUBNETS_KEY

_BATCH = 100
"""Writes in one transaction; etcd takes 128."""


class WildEtcd:
    """A writer that has etcd's client rights and no manners. Keys are below the subnets' directory."""

    def __init__(self, lab: Lab) -> None:
        assert isinstance(lab.etcd, Etcd)
        url = urlsplit(lab.etcd.endpoints.partition(",")[0])
        assert url.hostname is not None
        self._http = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
        # a socket stays in the namespace that it was made in
        run_in(lab.spec.netns("switch"), self._http.connect)

    def __enter__(self) -> WildEtcd:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()

    def put(self, key: bytes, value: bytes) -> None:
        """Write one key."""
        self._call("/v3/kv/put", {"key": _whole(key), "value": _text(value)})

    def put_all(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Write many keys, a hundred with one revision."""
        writes = [{"requestPut": {"key": _whole(key), "value": _text(value)}} for key, value in pairs]
        for at in range(0, len(writes), _BATCH):
            self._call("/v3/kv/txn", {"success": writes[at : at + _BATCH]})

    def delete(self, key: bytes) -> None:
        """Delete one key."""
        self._call("/v3/kv/deleterange", {"key": _whole(key)})

    def _call(self, path: str, body: Mapping[str, object]) -> Any:
        self._http.request("POST", path, json.dumps(body))
        answer = self._http.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)


def _whole(key: bytes) -> str:
    return _text(SUBNETS_KEY.encode() + key)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
