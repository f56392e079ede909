"""Stores of leases for pods on lab hosts, reached as pods reach them: an API server in the cluster, an etcd with TLS.

Both are real programs' protocols over the lab's wire; the API server is the fake one (``flanneld/lab/kubeapi``).
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from flanneld.lab import Lab
from flanneld.lab.etcd import binary
from flanneld.lab.kubeapi.access import FLANNEL_TOKEN, FLANNEL_USER, Access, Right
from flanneld.lab.kubeapi.server import KubeApi
from flanneld.lab.kubeapi.tls import Authority
from flanneld.lab.netns import run_in
from tests.support.manifests import Object, of_kind

API_ADDRESS, ETCD_ADDRESS = "198.18.0.8", "198.18.0.9"
"""Of the lab's first segment, which gives its hosts 198.18.0.11 and up."""
ETCD_NAMES = ("etcd-1.example.com", "etcd-2.example.com", "etcd-3.example.com")
"""As in the manifests; one server is all three here."""


def rights_of(objects: Sequence[Object]) -> frozenset[Right]:
    """What the manifests' ClusterRole grants, as pairs of verb and resource."""
    rules = [rule for role in of_kind(objects, "ClusterRole") for rule in role["rules"]]
    return frozenset((verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"])


@contextlib.contextmanager
def api_server(lab: Lab, directory: Path, rights: frozenset[Right]) -> Iterator[KubeApi]:
    """An API server that lets the manifests' account do just this."""
    _add_address(lab, API_ADDRESS)
    access = Access(rights={FLANNEL_USER: rights})
    tls = Authority(directory / "api").issue(API_ADDRESS)
    api = KubeApi(host=API_ADDRESS, port=6443, tls=tls, access=access)
    loop, serving, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with api:
            serving.set()
            await over.wait()

    def run() -> None:
        try:
            run_in(lab.spec.netns("switch"), lambda: loop.run_until_complete(serve()))
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="api server")
    thread.start()
    try:
        assert serving.wait(10), "the API server did not start"
        yield api
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


def service_account(api: KubeApi) -> dict[str, str]:
    """The files that a pod finds its account in."""
    assert api.ca_file
    return {"token": FLANNEL_TOKEN, "ca.crt": api.ca_file.read_text(), "namespace": "kube-flannel"}


@contextlib.contextmanager
def etcd_with_tls(lab: Lab, directory: Path, settings: dict[str, str]) -> Iterator[dict[str, str]]:
    """An etcd that asks for certificates, with some keys in it; yields the files of the manifests' Secret."""
    _add_address(lab, ETCD_ADDRESS)
    authority = Authority(directory / "etcd")
    server, client = authority.issue(ETCD_ADDRESS, *ETCD_NAMES), authority.issue_client("flanneld")
    url, switch = f"https://{ETCD_ADDRESS}:2379", ["ip", "netns", "exec", lab.spec.netns("switch")]
    certs = ["--client-cert-auth", f"--trusted-ca-file={server.ca_file}", f"--cert-file={server.cert_file}"]
    urls = [
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls=http://{ETCD_ADDRESS}:2380",
    ]
    cluster = [
        f"--initial-advertise-peer-urls=http://{ETCD_ADDRESS}:2380",
        f"--initial-cluster=default=http://{ETCD_ADDRESS}:2380",
    ]
    argv = [
        *switch,
        binary("etcd"),
        f"--data-dir={directory / 'data'}",
        *urls,
        *cluster,
        *certs,
        f"--key-file={server.key_file}",
    ]
    with (directory / "etcd.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            ctl = [*switch, binary("etcdctl"), f"--endpoints={url}", f"--cacert={client.ca_file}"]
            ctl += [
                f"--cert={client.cert_file}",
                f"--key={client.key_file}",
                "--dial-timeout=20s",
                "--command-timeout=20s",
            ]
            for key, value in settings.items():
                subprocess.run([*ctl, "put", key, value], check=True, capture_output=True, timeout=30)
            files = {"ca.crt": client.ca_file, "tls.crt": client.cert_file, "tls.key": client.key_file}
            yield {name: path.read_text() for name, path in files.items()}
        finally:
            process.kill()


def _add_address(lab: Lab, address: str) -> None:
    lab.node("switch").ip("addr", "add", f"{address}/24", "dev", "br0")
