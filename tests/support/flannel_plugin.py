"""What flannel's CNI plugin makes of its configuration and of ``subnet.env``: our reading of contract 10.11 to 10.14.

Debian, PyPI and npm have no package of the plugin itself, so tests of the ``flannel`` form go by this.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def delegated(conf: Json, default_subnet_file: Path) -> Json:
    """A configuration list in which the flannel plugin is replaced by what it would run; everything else as it is.

    Args:
        conf: the list as flanneld wrote it.
        default_subnet_file: read where the list names none.
    """
    plugins = [
        _delegate(plugin, conf, _subnet_env(Path(plugin.get("subnetFile", default_subnet_file)).read_text()))
        if plugin["type"] == "flannel"
        else plugin
        for plugin in conf["plugins"]
    ]
    return {**conf, "plugins": plugins}


def _delegate(plugin: Json, conf: Json, env: Mapping[str, str]) -> Json:
    """Contract 10.13; ``name`` and ``cniVersion`` the runtime puts into every plugin's configuration anyway."""
    delegate = dict(plugin.get("delegate", {}))
    assert not {"name", "ipam"} & set(delegate)
    delegate.setdefault("type", "bridge")
    delegate.setdefault("ipMasq", env["FLANNEL_IPMASQ"] != "true")
    delegate.setdefault("mtu", int(env["FLANNEL_MTU"]))
    if delegate["type"] == "bridge":
        delegate.setdefault("isGateway", True)
    return {**delegate, "ipam": _ipam(dict(plugin.get("ipam", {})), env)}


def _ipam(ipam: Json, env: Mapping[str, str]) -> Json:
    """Contract 10.14."""
    subnets = [env[key] for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if key in env]
    networks = [env[key] for key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK") if key in env]
    ipam.setdefault("type", "host-local")
    ipam["ranges"] = [[{"subnet": str(ipaddress.ip_interface(subnet).network)}] for subnet in subnets]
    routes = [{"dst": network} for entry in networks for network in dict.fromkeys(entry.split(","))]
    ipam["routes"] = [*ipam.get("routes", []), *routes]
    return ipam


def _subnet_env(text: str) -> dict[str, str]:
    """Contract 10.12: split at the first ``=``, nothing trimmed; four keys must be there."""
    env = dict(line.split("=", 1) for line in text.splitlines() if line)
    for wanted in (("NETWORK", "IPV6_NETWORK"), ("SUBNET", "IPV6_SUBNET"), ("MTU",), ("IPMASQ",)):
        assert any(f"FLANNEL_{key}" in env for key in wanted), f"{text!r} lacks FLANNEL_{wanted[0]}"
    return env
