"""The fake kube-apiserver as a process: ``python -m flanneld.lab.kubeapi --listen 127.0.0.1:6443 --state-dir DIR``.

Nodes are made and changed through the API itself, with the administrator's token. Signals inject what happens
to real servers: SIGKILL and a new start keep the objects and lose the events, SIGSTOP makes it hang, SIGTERM ends
its watches in good order, SIGHUP is a restart without leaving.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from flanneld.lab.kubeapi.journal import Journal
from flanneld.lab.kubeapi.objects import Store
from flanneld.lab.kubeapi.server import KubeApi
from flanneld.lab.kubeapi.tls import Certificates


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT."""
    options = _parser().parse_args(argv)
    host, _, port = options.listen.rpartition(":")
    files = (options.tls_cert_file, options.tls_private_key_file, options.client_ca_file)
    if any(files) and not all(files):
        sys.stderr.write("TLS needs --tls-cert-file, --tls-private-key-file and --client-ca-file\n")
        return 2
    options.state_dir.mkdir(parents=True, exist_ok=True)
    store = Store()
    journal = Journal(options.state_dir / "objects.jsonl", store)
    try:
        tls = Certificates(*files) if all(files) else None
        asyncio.run(_serve(KubeApi(host=host.strip("[]"), port=int(port), tls=tls, store=store)))
    finally:
        journal.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flanneld.lab.kubeapi", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--state-dir", required=True, type=Path, help="where objects are kept")
    parser.add_argument("--tls-cert-file", type=Path)
    parser.add_argument("--tls-private-key-file", type=Path)
    parser.add_argument("--client-ca-file", type=Path)
    return parser


async def _serve(api: KubeApi) -> None:
    loop = asyncio.get_running_loop()
    stopped, restarting = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, restarting.set)
    async with api, asyncio.TaskGroup() as group:
        sys.stderr.write(f"serving on {api.url}\n")
        restarts = group.create_task(_restart_when_told(api, restarting))
        await stopped.wait()
        restarts.cancel()
        await api.shut_down()


async def _restart_when_told(api: KubeApi, told: asyncio.Event) -> None:
    while True:
        await told.wait()
        told.clear()
        await api.restart()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
