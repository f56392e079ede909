"""Hosts on a Kubernetes API server, each as far as its lease goes, and an administrator who makes nodes.

Everything goes over HTTP with credentials from a kubeconfig, so the same tests run against the fake API server and,
where ``KUBE_APISERVER_KUBECONFIG`` names an administrator's kubeconfig, against a real one.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flanneld.lab.kubeapi import ADMIN_TOKEN, FLANNEL_TOKEN, KubeApi
from flanneld.model.lease import Lease, LeaseAttrs, OwnLease
from flanneld.model.netconf import NetConf
from flanneld.model.node_lease import Annotations
from flanneld.sources.kube import KubeStore
from flanneld.sources.kube_access import Access
from flanneld.sources.kube_config import find_settings
from flanneld.sources.kube_http import KubeHttp, Refused
from flanneld.sources.kube_watch import Pace
from tests.support.hosts import StoreHost, attrs_of, family_conf, net_conf
from tests.support.wait import until

PREFIX = "flannel.alpha.coreos.com/"
NAMES = Annotations.of_prefix("flannel.alpha.coreos.com")
CONF = net_conf(family_conf("10.5.0.0/16", 24))
DUAL = net_conf(family_conf("10.5.0.0/16", 24), family_conf("fd00:5::/48", 64))
DATA = b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'
ATTRS = attrs_of("192.0.2.1", backend_type="vxlan", data=DATA)
DUAL_ATTRS = attrs_of("192.0.2.1", ip6="2001:db8::1", backend_type="vxlan", data=DATA, data6=DATA)
BRISK = Pace(page_nodes=2, silence_s=3.0, watch_s=(20, 30))


def published(ip: str = "192.0.2.9", **more: str | None) -> dict[str, str | None]:
    """Annotations of a peer, as a Go flanneld writes them; more by short name, with ``_`` for ``-``."""
    texts: dict[str, str | None] = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}',
        "public-ip": ip,
        **{name.replace("_", "-"): text for name, text in more.items()},
    }
    return {PREFIX + name: text for name, text in texts.items()}


def write_kubeconfig(path: Path, url: str, ca_file: Path | None, user: Mapping[str, str]) -> Path:
    """A kubeconfig with one context."""
    cluster = {"server": url, **({"certificate-authority": str(ca_file)} if ca_file else {})}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": dict(user)}],
    }
    path.write_text(json.dumps(config))
    return path


class Site:
    """An API server, and how to come to it. The token of flannel's kubeconfig lies in ``token_file``.

    Args:
        kubeconfig: flannel's.
        admin: the administrator's.
        token_file: where the former has its token; None with a real server.
    """

    def __init__(self, kubeconfig: Path, admin: Path, token_file: Path | None) -> None:
        self.kubeconfig = kubeconfig
        self.token_file = token_file
        self.mark = secrets.token_hex(3)
        """In the names of all nodes of this test."""
        self._http = KubeHttp(Access(lambda: find_settings("", str(admin), {})))
        self._made: set[str] = set()

    @staticmethod
    def of_fake(api: KubeApi, directory: Path) -> Site:
        """A fake server and kubeconfigs for it."""
        token_file = directory / "token"
        token_file.write_text(FLANNEL_TOKEN)
        ours = write_kubeconfig(directory / "flannel", api.url, api.ca_file, {"tokenFile": "token"})
        admin = write_kubeconfig(directory / "admin", api.url, api.ca_file, {"token": ADMIN_TOKEN})
        return Site(ours, admin, token_file)

    def node(self, name: str) -> str:
        """Full name of a node of this test."""
        return f"t{self.mark}-{name}"

    async def create(self, name: str, *pod_cidrs: str, annotations: Mapping[str, str | None] | None = None) -> None:
        """Make a node, as a kubelet and the node IPAM controller do."""
        spec = {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {}
        metadata = {"name": self.node(name), "annotations": annotations or {}}
        body = {"kind": "Node", "apiVersion": "v1", "metadata": metadata, "spec": spec}
        await self._call("POST", "/api/v1/nodes", body)
        self._made.add(f"/api/v1/nodes/{self.node(name)}")

    async def create_pod(self, name: str, node: str) -> None:
        """A pod of namespace default on a node."""
        metadata = {"name": self.node(name), "namespace": "default"}
        spec = {"nodeName": self.node(node), "containers": [{"name": "c", "image": "localhost/none"}]}
        body = {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec}
        await self._call("POST", "/api/v1/namespaces/default/pods", body)
        self._made.add(f"/api/v1/namespaces/default/pods/{self.node(name)}")

    async def assign(self, name: str, *pod_cidrs: str) -> None:
        """Give a node that has none its pod CIDRs."""
        await self.patch(name, {"spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)}})

    async def annotate(self, name: str, annotations: Mapping[str, str | None]) -> None:
        """Change annotations; None removes one."""
        await self.patch(name, {"metadata": {"annotations": annotations}})

    async def patch(self, name: str, patch: Mapping[str, object], part: str = "") -> None:
        """Merge into a node, or with ``/status`` into its status."""
        await self._call("PATCH", f"/api/v1/nodes/{self.node(name)}{part}", patch, "application/merge-patch+json")

    async def delete(self, name: str) -> None:
        """Remove a node."""
        await self._call("DELETE", f"/api/v1/nodes/{self.node(name)}")
        self._made.discard(f"/api/v1/nodes/{self.node(name)}")

    async def get(self, name: str) -> dict[str, Any]:
        """A node as the server has it."""
        node: dict[str, Any] = await self._call("GET", f"/api/v1/nodes/{self.node(name)}")
        return node

    async def annotations(self, name: str) -> dict[str, str]:
        """Flannel's annotations of a node, without the prefix."""
        found = (await self.get(name))["metadata"].get("annotations", {})
        return {key.removeprefix(PREFIX): text for key, text in found.items() if key.startswith(PREFIX)}

    async def condition(self, name: str, kind: str = "NetworkUnavailable") -> dict[str, str] | None:
        """A condition of a node."""
        conditions = (await self.get(name))["status"].get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == kind), None)

    async def close(self) -> None:
        """Remove what is left of this test's objects; the fake takes them with it."""
        if self.token_file is None:
            for path in sorted(self._made):
                with contextlib.suppress(Refused):
                    await self._call("DELETE", path)
        self._http.close()

    async def _call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, kind: str = "application/json"
    ) -> Any:
        raw = json.dumps(body).encode() if body is not None else b""
        return json.loads(await self._http.call(method, path, raw, kind if raw else ""))


class KubeHost(StoreHost):
    """A host over Kubernetes.

    Args:
        site: where the API server is.
        name: of its node, without the test's mark.
        attrs: what it publishes.
        request_s: longest wait for an answer.
        settings: for ``KubeStore``.
    """

    def __init__(
        self,
        site: Site,
        name: str = "a",
        attrs: LeaseAttrs = ATTRS,
        *,
        request_s: float = 5.0,
        environ: Mapping[str, str] | None = None,
        config_path: str = "/nonexistent",
        pace: Pace | None = None,
        **settings: Any,
    ) -> None:
        access = Access(lambda: find_settings("", str(site.kubeconfig), {}))
        self.http = KubeHttp(access, request_s=request_s, connect_s=request_s)
        environ = {"NODE_NAME": site.node(name)} if environ is None else environ
        # a real server sends a bookmark a minute: shorter silences are not to be taken for its death
        pace = pace or (BRISK if site.token_file else Pace(page_nodes=2))
        self.store = KubeStore(self.http, environ, NAMES, config_path, pace=pace, **settings)
        super().__init__(self.store, attrs)
        self.site = site

    async def acquire(
        self, conf: NetConf = CONF, previous: str | None = None, previous6: str | None = None
    ) -> OwnLease:
        """Acquire only; of the network ``CONF`` unless told."""
        return await super().acquire(conf, previous, previous6)

    async def run(self, conf: NetConf = CONF, previous: str | None = None) -> OwnLease:
        """Acquire, then keep and follow in the background."""
        return await super().run(conf, previous)

    @property
    def peers(self) -> dict[str, Lease]:
        """The table, of this test's nodes only, by short name."""
        mark = self.site.node("")
        return {name.removeprefix(mark): lease for name, lease in self.table.items() if name.startswith(mark)}

    def subnets(self) -> dict[str, str]:
        """The same, as text."""
        return {name: lease.name() for name, lease in self.peers.items()}


MakeKubeHost = Callable[..., KubeHost]
"""Takes name, attributes and settings, each optional."""


async def watching(api: KubeApi) -> None:
    """Wait for a watch; a list is a stream too, and comes before it."""
    await until(lambda: api.watches and any("resourceVersion" in seen.request.query for seen in api.requests))
