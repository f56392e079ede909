"""The addresses of the servers that keep leases, to see whether the cluster network would cut them off (failure F22).

Asks the resolver, never the servers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

from flanneld.model.addr import IP, parse_ip
from flanneld.model.options import Options

RESOLVE_S = 0.5
"""Longest wait for the addresses of all names. Whoever keeps leases has just been asked by the same names, so this is
for a start from memory without name servers, which it must not hold up."""


def store_hosts(options: Options, environ: Mapping[str, str]) -> dict[str, str]:
    """Names or addresses of the store's servers, and what each is, in words.

    A pod's way to the API server is left out: that address is a service's, which no route decides about.

    Raises:
        ConfigError: they cannot be known.
    """
    if not options.kube_subnet_mgr:
        from flanneld.sources.etcd_endpoint import parse_endpoints

        endpoints = parse_endpoints(options.etcd_endpoints)
        return {endpoint.host: f"the etcd server {endpoint}" for endpoint in endpoints}
    from flanneld.sources.kube_config import find_settings

    server = find_settings(options.kube_api_url, options.kubeconfig_file, environ).server
    if server.host == environ.get("KUBERNETES_SERVICE_HOST"):
        return {}
    return {server.host: f"the API server {server}"}


async def resolved(hosts: Mapping[str, str]) -> dict[IP, str]:
    """The addresses behind names, each with what stood beside its name; names that cannot be resolved are left out."""
    try:
        async with asyncio.timeout(RESOLVE_S):
            answers = await asyncio.gather(*map(_addresses, hosts))
    except TimeoutError:
        return {}
    found: dict[IP, str] = {}
    for what, addresses in zip(hosts.values(), answers, strict=True):
        for ip in addresses:
            found.setdefault(ip, what)
    return found


async def _addresses(name: str) -> list[IP]:
    """Of a name, or of the text of an address, for which nobody is asked."""
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [parse_ip(str(address[0]).partition("%")[0]) for *_, address in entries]
