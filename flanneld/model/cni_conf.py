"""The text of a CNI network configuration list: what a container runtime starts pods with. Pure.

``bridge`` asks the reference plugins directly for what flannel's CNI plugin would have asked of them (contract
10.13, 10.14), so no flannel binary is needed on the host; ``flannel`` is the list that kube-flannel installs
(contract 10.8), for hosts that have that plugin and want to keep it.

Both go by the network name ``cbr0``, and that is no accident: ``host-local`` keeps its addresses under that name,
in ``/var/lib/cni/networks/cbr0``. A host that changes the form goes on with the addresses of pods that run; under
another name it would give them out a second time.
"""

from __future__ import annotations

import json

from flanneld.model.subnet_env import SubnetEnv

NETWORK_NAME = "cbr0"
BRIDGE = "cni0"
"""What the bridge plugin calls its bridge when not told (Source: plugins, ``plugins/main/bridge``)."""
DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
"""Where flannel's CNI plugin looks when not told (contract 10.11)."""

FLANNEL_CNI_VERSION = "0.3.1"
"""Contract 10.8."""
BRIDGE_CNI_VERSION = "0.4.0"
"""The newest that every supported system takes. Ubuntu 22.04's plugins (0.9.1) refuse 1.0.0, which has nothing
we need, and Debian 12's (1.1.1) refuse 1.1.0; containerd, CRI-O and podman take all of them. Below 0.4.0 a plugin
is not told at DEL what it did at ADD."""

_PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
_OF_THIS_HOST = frozenset({"name", "bridge", "subnetFile", "ipMasq", "mtu", "ranges", "routes"})
"""Keys whose values may differ from host to host in what we write."""


def render(
    form: str, env: SubnetEnv, subnet_file: str = DEFAULT_SUBNET_FILE, name: str = NETWORK_NAME, bridge: str = BRIDGE
) -> bytes:
    """The configuration list, ready to be written to a ``.conflist`` file.

    Args:
        form: ``bridge`` or ``flannel``.
        env: our subnet and what goes with it, as in ``subnet.env``.
        subnet_file: where ``subnet.env`` is, absolute; only ``flannel`` reads it.
        name: of the network; a second network on the same host needs another one.
        bridge: name of the bridge; likewise.
    """
    if form == "bridge":
        # The specification's switch for plugins that are known to find fault with what is right: bridge (1.1.1) misses
        # its own routes, portmap the ports of dual-stack pods. CRI-O would take such pods for broken.
        version = {"cniVersion": BRIDGE_CNI_VERSION, "disableCheck": True}
        first = _bridge(env, bridge)
    else:
        version, first = {"cniVersion": FLANNEL_CNI_VERSION}, _flannel(subnet_file, bridge)
    return json.dumps({"name": name, **version, "plugins": [first, _PORTMAP]}, indent=2).encode() + b"\n"


def is_rendered(raw: bytes) -> bool:
    """Whether a file is one that ``render`` could have written, for any subnet: nobody's own work is lost with it."""
    try:
        found: object = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    anything = SubnetEnv(None, None, None, None, 0, False)
    shapes = [_shape(json.loads(render(form, anything))) for form in ("bridge", "flannel")]
    return _shape(found) in shapes


def _flannel(subnet_file: str, bridge: str) -> dict[str, object]:
    """Its plugin reads everything else from ``subnet.env`` at each pod; defaults are left out, as in contract 10.8."""
    conf: dict[str, object] = {"type": "flannel"}
    if subnet_file != DEFAULT_SUBNET_FILE:
        conf["subnetFile"] = subnet_file
    of_bridge = {"bridge": bridge} if bridge != BRIDGE else {}
    return {**conf, "delegate": {**of_bridge, "hairpinMode": True, "isDefaultGateway": True}}


def _bridge(env: SubnetEnv, bridge: str) -> dict[str, object]:
    """What flannel's plugin makes of its list and ``subnet.env`` (contract 10.13), with the bridge's name said."""
    parts = [(n, s) for n, s in ((env.network, env.subnet), (env.network6, env.subnet6)) if n and s]
    return {
        "type": "bridge",
        "bridge": bridge,
        "isGateway": True,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipMasq": not env.ip_masq,  # the other of the two masquerades: flanneld or the plugin
        "mtu": env.mtu,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": str(subnet.masked())}] for _, subnet in parts],
            "routes": [{"dst": str(network)} for network, _ in parts],
        },
    }


def _shape(value: object) -> object:
    """The value without what differs from host to host."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items() if key not in _OF_THIS_HOST}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return value
