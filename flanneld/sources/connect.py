"""From the etcd flags to a client; shared by the daemon and ``flannelctl``."""

from __future__ import annotations

from flanneld.model.options import EtcdOptions
from flanneld.sources.etcd_auth import Credentials
from flanneld.sources.etcd_client import EtcdClient
from flanneld.sources.etcd_endpoint import TLSFiles, parse_endpoints


def connect(options: EtcdOptions) -> EtcdClient:
    """A client for the cluster that the flags name; nothing is contacted yet.

    Raises:
        ConfigError: endpoints that cannot be parsed, or certificate files that cannot be used.
    """
    credentials = None
    if options.etcd_username and options.etcd_password:  # both or none, as flannel (contract 1.2)
        credentials = Credentials(options.etcd_username, options.etcd_password)
    tls = TLSFiles(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile)
    return EtcdClient(parse_endpoints(options.etcd_endpoints), tls, credentials)
