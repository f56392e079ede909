"""Leases on Kubernetes nodes, for ``flannelctl leases``: only reads, with the rights to list and watch nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from flanneld.cli_flags import DAEMON_FLAGS
from flanneld.ctl.lease_view import View
from flanneld.errors import PeerDataError
from flanneld.goflags import from_environment
from flanneld.model.addr import Prefix
from flanneld.model.lease import LeaseAttrs
from flanneld.model.node_codec import Node
from flanneld.model.node_lease import MANAGED, Annotations, lease_of
from flanneld.model.options import Options
from flanneld.plan.allocate import Room

if TYPE_CHECKING:
    from flanneld.ctl.leases import Changes

_FIELDS = frozenset(("kube_subnet_mgr", "kube_api_url", "kube_annotation_prefix", "kubeconfig_file"))
KUBE_FLAGS = tuple(flag for flag in DAEMON_FLAGS if flag.field in _FIELDS)
"""Those of the daemon that tell where the nodes are."""


def kube_options(given: Mapping[str, object], environ: Mapping[str, str]) -> Options:
    """Only the Kubernetes part of the daemon's options; other fields in ``given`` are left alone.

    Raises:
        UsageError: a variable's value is wrong.
    """
    mine = {name: value for name, value in given.items() if name in _FIELDS}
    values: dict[str, Any] = {**from_environment(environ, KUBE_FLAGS, mine), **mine}
    return Options(**values)


class KubeLeases:
    """A ``leases.Source``.

    Raises:
        ConfigError: no way to an API server is known, or a wrong prefix.
    """

    def __init__(self, options: Options, environ: Mapping[str, str]) -> None:
        # here, because etcd's users do not need them
        from flanneld.sources.kube_access import Access
        from flanneld.sources.kube_config import find_settings
        from flanneld.sources.kube_http import KubeHttp
        from flanneld.sources.kube_watch import NodeFeed

        self._names = Annotations.of_prefix(options.kube_annotation_prefix)
        self._http = KubeHttp(Access(lambda: find_settings(options.kube_api_url, options.kubeconfig_file, environ)))
        self._feed = NodeFeed(self._http)

    async def views(self, wanted: Callable[[View], bool]) -> list[View]:
        """See ``leases.Source``."""
        return [view for view in (await self._list())[0].values() if wanted(view)]

    async def follow(self, changes: Changes) -> None:
        """See ``leases.Source``; a node that takes no part is no lease."""
        from flanneld.sources.kube_watch import Expired

        while True:
            views, revision = await self._list()
            changes.keep_only(views)
            for name, view in views.items():
                changes.put(name, view)
            try:
                async with aclosing(self._feed.watch(revision)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            view_now = self._view(event.object) if event.type != "DELETED" else None
                            if view_now:
                                changes.put(view_now.node, view_now)
                            else:
                                changes.drop(event.object.metadata.name)
            except Expired:
                continue

    async def room(self, views: Sequence[View]) -> Room | None:
        """See ``leases.Source``: Kubernetes gives the subnets."""
        return None

    async def close(self) -> None:
        """See ``leases.Source``."""
        self._http.close()

    async def _list(self) -> tuple[dict[str, View], str]:
        views: dict[str, View] = {}
        revision = ""
        async with aclosing(self._feed.nodes()) as pages:
            async for page in pages:
                revision = page.revision
                for name in page.gone:
                    views.pop(name, None)
                for node in page.nodes:
                    if view := self._view(node):
                        views[view.node] = view
                    else:
                        views.pop(node.metadata.name, None)
        return views, revision

    def _view(self, node: Node) -> View | None:
        """A node as people see it; None for one that takes no part."""
        if node.annotations.get(self._names.managed) != MANAGED:
            return None
        name, text = node.metadata.name, node.metadata.resource_version
        revision = int(text) if text.isdecimal() else 0
        try:
            lease = lease_of(node, self._names, revision)
        except PeerDataError as error:
            return View(name, _subnets(node), LeaseAttrs(None), 0, revision, f"node {name}: {error}", node=name)
        if lease is None:
            return None
        return View(name, (lease.subnet, lease.subnet6), lease.attrs, 0, revision, "", node=name)


def _subnets(node: Node) -> tuple[Prefix | None, Prefix | None]:
    try:
        return node.pod_cidrs()
    except PeerDataError:
        return None, None
