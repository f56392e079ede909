"""Requests about single objects: our node, and the pod we run in."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

from flanneld.errors import ConfigError, Unavailable
from flanneld.model.node_codec import Node, decode_node
from flanneld.model.node_lease import CONDITION, CONDITION_MESSAGE, CONDITION_REASON
from flanneld.sources.kube_http import KubeHttp, Refused
from flanneld.sources.kube_watch import node_path

_STRATEGIC = "application/strategic-merge-patch+json"
"""Merges conditions by their type; a JSON merge patch would wipe the kubelet's Ready."""


class OwnNode:
    """The node we run on.

    Args:
        http: the way to the API server.
        environ: ``NODE_NAME``, else ``POD_NAME`` and ``POD_NAMESPACE`` (contract section 1B).

    Raises:
        ConfigError: the environment does not tell who we are.
    """

    def __init__(self, http: KubeHttp, environ: Mapping[str, str]) -> None:
        self._http = http
        self._name = environ.get("NODE_NAME", "")
        self._pod = environ.get("POD_NAME", "")
        self._namespace = environ.get("POD_NAMESPACE", "")
        if not self._name and not (self._pod and self._namespace):
            raise ConfigError(
                "it is not known which node this is: set NODE_NAME (or POD_NAME and POD_NAMESPACE) from the pod's "
                "fieldRef spec.nodeName"
            )

    @property
    def known_name(self) -> str:
        """Its name; empty as long as the pod has not been asked."""
        return self._name

    async def name(self) -> str:
        """Its name.

        Raises:
            Unavailable: the pod that would tell cannot be read now.
        """
        if not self._name:
            path = f"/api/v1/namespaces/{quote(self._namespace, safe='')}/pods/{quote(self._pod, safe='')}"
            pod = _decoded(await self._http.call("GET", path))
            if not pod.spec.node_name:
                raise Unavailable(f"pod {self._namespace}/{self._pod} is on no node: check POD_NAME and POD_NAMESPACE")
            self._name = pod.spec.node_name
        return self._name

    async def get(self) -> Node:
        """It as it is now.

        Raises:
            Unavailable: it is not there, or cannot be read.
        """
        name = await self.name()
        try:
            return _decoded(await self._http.call("GET", node_path(name)))
        except Refused as error:
            raise _missing(name) if error.status == 404 else error from error

    async def patch(self, annotations: Mapping[str, str], *, condition: bool) -> Node:
        """Write all that differs at once, for peers act on each event (contract 9.18, 9.22, 13.13).

        Args:
            annotations: to be set; others stay.
            condition: also say that the network is there.

        Returns:
            The node with it.

        Raises:
            Unavailable: the answer got lost or was a refusal; writing it once more does no harm.
        """
        body: dict[str, object] = {}
        if annotations:
            body["metadata"] = {"annotations": annotations}
        if condition:
            body["status"] = {"conditions": [_condition(datetime.now(UTC))]}
        name = await self.name()
        try:
            raw = await self._http.call("PATCH", node_path(name) + "/status", msgspec.json.encode(body), _STRATEGIC)
        except Refused as error:
            raise _missing(name) if error.status == 404 else error from error
        return _decoded(raw)


def _condition(now: datetime) -> dict[str, str]:
    text = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": CONDITION,
        "status": "False",
        "reason": CONDITION_REASON,
        "message": CONDITION_MESSAGE,
        "lastHeartbeatTime": text,
        "lastTransitionTime": text,
    }


def _decoded(raw: bytearray) -> Node:
    try:
        return decode_node(bytes(raw))
    except ValueError as error:
        raise Unavailable(f"the API server answers in a form unknown to us: {error}") from error


def _missing(name: str) -> Unavailable:
    return Unavailable(f"there is no node {name}: it comes when the kubelet registers it, or NODE_NAME is wrong")
