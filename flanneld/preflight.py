"""Looks, before anything of this host is touched, whether the cluster network can be had on it (failure F22).

Gathers what ``plan/overlap.py`` judges: routes, name servers, the servers that keep leases.
"""

from __future__ import annotations

import os

from flanneld.errors import ConfigError, Unavailable
from flanneld.kernel.host_net import read_host_net
from flanneld.kernel.resolvers import name_servers
from flanneld.model.addr import IP
from flanneld.model.netconf import NetConf
from flanneld.model.options import Options
from flanneld.plan.overlap import Mine, Needed, former_subnets, overlaps, refusal, sentences
from flanneld.sources.servers import resolved, store_hosts


async def look_for_overlaps(options: Options, conf: NetConf, mine: Mine) -> list[str]:
    """Compare the cluster network with what this host has.

    Returns:
        What overlaps and is no reason not to start, a sentence each.

    Raises:
        Unavailable: it must not start like this. The operator may change the configuration or the host, so that is
            waited for: ending would only be repeated by whoever starts us.
    """
    servers = {**await resolved(_store_hosts(options)), **_name_servers()}
    needed = [Needed(ip, what) for ip, what in servers.items() if any(net.covers(ip) for net in conf.networks())]
    host = read_host_net((), conf.networks(), [each.ip for each in needed])
    mine = mine._replace(subnets=(*mine.subnets, *former_subnets(conf, host, mine.devices)))
    found = overlaps(conf, host, mine, needed)
    if not options.allow_overlap and (sentence := refusal(found)):
        raise Unavailable(sentence)
    return sentences(found)


def _store_hosts(options: Options) -> dict[str, str]:
    try:
        return store_hosts(options, os.environ)
    except ConfigError:
        return {}  # the store says so itself, and this host may start from memory


def _name_servers() -> dict[IP, str]:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return {}  # a pod's may be services of the cluster, which no route decides about
    return {ip: f"a name server of {path}" for ip, path in name_servers().items()}
