"""From flags to a store of leases; the etcd half is shared with ``flannelctl``.

Only what is used is imported: gRPC for etcd alone, HTTP for Kubernetes alone (ADR 10 has the weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flanneld.contracts import Store
from flanneld.model.options import EtcdOptions, Options

if TYPE_CHECKING:
    from flanneld.sources.etcd_client import EtcdClient


def open_store(options: Options, environ: Mapping[str, str]) -> Store:
    """The store that the flags name; nothing is contacted yet.

    Args:
        options: the daemon's.
        environ: the environment, which says in a pod where Kubernetes is and which node this is.

    Raises:
        ConfigError: something about the way to it is wrong: an endpoint, a certificate file, a missing variable.
    """
    if options.kube_subnet_mgr:
        return kube_store(options, environ)
    from flanneld.sources.etcd import EtcdStore

    return EtcdStore(connect(options), options.etcd_prefix, renew_margin_s=options.renew_margin_s)


def kube_store(options: Options, environ: Mapping[str, str]) -> Store:
    """Leases on the nodes of a Kubernetes cluster; nothing is contacted yet.

    Args:
        options: the daemon's.
        environ: where a pod finds the API server (contract 9.1) and the name of its node (contract section 1B).

    Raises:
        ConfigError: no way to an API server is known, or which node this is, or a file cannot be used.
    """
    from flanneld.model.node_lease import Annotations
    from flanneld.sources.kube import KubeStore
    from flanneld.sources.kube_access import Access
    from flanneld.sources.kube_config import find_settings
    from flanneld.sources.kube_http import KubeHttp

    return KubeStore(
        KubeHttp(Access(lambda: find_settings(options.kube_api_url, options.kubeconfig_file, environ))),
        environ,
        Annotations.of_prefix(options.kube_annotation_prefix),
        options.net_config_path,
        sets_condition=options.set_node_network_unavailable,
    )


def connect(options: EtcdOptions) -> EtcdClient:
    """A client for the etcd cluster that the flags name; nothing is contacted yet.

    Raises:
        ConfigError: endpoints that cannot be parsed, or certificate files that cannot be used.
    """
    from flanneld.sources.etcd_auth import Credentials
    from flanneld.sources.etcd_client import EtcdClient
    from flanneld.sources.etcd_endpoint import TLSFiles, parse_endpoints

    credentials = None
    if options.etcd_username and options.etcd_password:  # both or none, as flannel (contract 1.2)
        credentials = Credentials(options.etcd_username, options.etcd_password)
    tls = TLSFiles(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile)
    return EtcdClient(parse_endpoints(options.etcd_endpoints), tls, credentials)
