"""``python -m tests.bench.kube_server``: the fake API server with many nodes, each as large as a real one.

They beat as kubelets do: a node says something new every five minutes, of which nothing concerns flanneld.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from flanneld.lab.kube import node_name
from flanneld.lab.kubeapi import Certificates, KubeApi
from tests.bench.hollow import Peer

PREFIX = "flannel.alpha.coreos.com/"
MANAGED_FIELDS_BYTES = 20 << 10
HEARTBEAT_S = 300.0


def main(argv: Sequence[str]) -> int:
    """Serve until killed."""
    host, port, directory, backend, size = argv
    asyncio.run(_serve(host, int(port), Path(directory), backend, int(size)))
    return 0


async def _serve(host: str, port: int, directory: Path, backend: str, size: int) -> None:
    tls = Certificates(directory / "server.crt", directory / "server.key", directory / "ca.crt")
    api = KubeApi(host=host, port=port, tls=tls, ring_size=100_000)
    for number in range(1, size + 2):
        _add(api, number, backend)
    async with api:
        for number in itertools.cycle(range(2, size + 2)):
            await asyncio.sleep(HEARTBEAT_S / size)
            api.repeat_event(node_name(number))


def _add(api: KubeApi, number: int, backend: str) -> None:
    """Node 1 is the measured host's, as the node IPAM controller leaves it; the others have a flanneld."""
    peer = Peer.number(number)
    annotations = {
        PREFIX + "kube-subnet-manager": "true",
        PREFIX + "backend-type": backend if backend not in ("udp", "alloc") else "",
        PREFIX + "backend-data": f'{{"VNI":1,"VtepMAC":"{peer.mac.hex(":")}"}}' if backend == "vxlan" else "null",
        PREFIX + "public-ip": socket.inet_ntoa(peer.public_ip),
    }
    subnet = f"{socket.inet_ntoa(peer.subnet)}/24"
    name = node_name(number)
    api.create_node(name, [subnet], annotations if number > 1 else {}, managed_fields_bytes=MANAGED_FIELDS_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
