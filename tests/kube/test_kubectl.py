"""The real kubectl against the fake: an independent client, which finds wrong shapes that our client would share.

``KUBE_APISERVER_KUBECONFIG`` names a kubeconfig with an administrator's rights: then it is a real API server that
is asked, and what is claimed here is checked for the fake's sake. Its Nodes are named ``flanneld-test-…``.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from flanneld.lab.kubeapi import ADMIN_TOKEN, FLANNEL_TOKEN, Authority, KubeApi
from tests.support.wait import until

pytestmark = pytest.mark.needs("kubectl")

REAL = os.environ.get("KUBE_APISERVER_KUBECONFIG")
Json = dict[str, Any]


class Kubectl:
    """kubectl with its own configuration and cache."""

    def __init__(self, kubeconfig: Path, cache: Path) -> None:
        self._argv = [str(Path(sys.executable).with_name("kubectl")), f"--cache-dir={cache}"]
        self._env = {**os.environ, "KUBECONFIG": str(kubeconfig)}

    async def start(self, *argv: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *self._argv, *argv, env=self._env, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )

    async def run(self, *argv: str, stdin: Json | None = None, status: int = 0) -> str:
        process = await self.start(*argv)
        said, _ = await process.communicate(json.dumps(stdin).encode() if stdin else b"")
        assert process.returncode == status, said.decode()
        return said.decode()

    async def get(self, node: str) -> Json:
        got: Json = json.loads(await self.run("get", "node", node, "-o", "json"))
        return got


@pytest_asyncio.fixture
async def kubectl(tmp_path: Path) -> AsyncIterator[Kubectl]:
    if REAL:
        yield Kubectl(Path(REAL), tmp_path / "cache")
        return
    async with KubeApi(tls=Authority(tmp_path).issue("127.0.0.1")) as api:
        yield Kubectl(_kubeconfig(tmp_path, api, ADMIN_TOKEN), tmp_path / "cache")


@pytest_asyncio.fixture
async def node(kubectl: Kubectl) -> AsyncIterator[str]:
    """A Node without pod CIDR."""
    name = f"flanneld-test-{secrets.token_hex(3)}"
    manifest = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"test": name}}}
    await kubectl.run("create", "--validate=false", "-f", "-", stdin=manifest)
    yield name
    await kubectl.run("delete", "node", name, "--ignore-not-found")


def _kubeconfig(folder: Path, api: KubeApi, token: str) -> Path:
    path = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": api.url, "certificate-authority": str(api.ca_file)}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


async def test_a_created_node_is_got_and_listed(kubectl: Kubectl, node: str) -> None:
    got = await kubectl.get(node)
    assert got["kind"] == "Node"
    assert {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"} in got["spec"]["taints"]
    listed = json.loads(await kubectl.run("get", "nodes", "-l", f"test={node}", "-o", "json"))
    assert [item["metadata"]["name"] for item in listed["items"]] == [node]


async def test_an_annotation_set_by_kubectl_is_there_and_goes_again(kubectl: Kubectl, node: str) -> None:
    key = "flannel.alpha.coreos.com/public-ip-overwrite"
    await kubectl.run("annotate", "node", node, f"{key}=192.0.2.7")
    assert (await kubectl.get(node))["metadata"]["annotations"][key] == "192.0.2.7"
    await kubectl.run("annotate", "node", node, f"{key}-")
    assert key not in (await kubectl.get(node))["metadata"].get("annotations", {})


async def test_a_condition_patched_through_status_keeps_the_others(kubectl: Kubectl, node: str) -> None:
    async def patch(kind: str, value: str) -> None:
        body = json.dumps({"status": {"conditions": [{"type": kind, "status": value}]}})
        await kubectl.run("patch", "node", node, "--subresource=status", "-p", body)

    await patch("Ready", "True")
    await patch("NetworkUnavailable", "False")
    conditions = (await kubectl.get(node))["status"]["conditions"]
    assert [(entry["type"], entry["status"]) for entry in conditions] == [
        ("NetworkUnavailable", "False"),
        ("Ready", "True"),
    ]


async def test_a_pod_cidr_is_given_once(kubectl: Kubectl, node: str) -> None:
    first, second = (
        json.dumps({"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}) for cidr in ("10.9.1.0/24", "10.9.2.0/24")
    )
    await kubectl.run("patch", "node", node, "--type=merge", "-p", first)
    said = await kubectl.run("patch", "node", node, "--type=merge", "-p", second, status=1)
    assert 'node updates may not change podCIDR except from "" to valid' in said


async def test_kubectl_watches_a_node_change_and_go(kubectl: Kubectl, node: str) -> None:
    watching = await kubectl.start("get", "node", node, "--watch", "--output-watch-events", "-o", "json")
    seen = bytearray()

    async def read() -> None:
        assert watching.stdout is not None
        while data := await watching.stdout.read(4096):
            seen.extend(data)

    reading = asyncio.create_task(read())
    try:
        await until(lambda: b"ADDED" in seen, what="kubectl shows the Node")
        await kubectl.run("annotate", "node", node, "a=b")
        await until(lambda: b"MODIFIED" in seen, what="kubectl shows the change")
        await kubectl.run("delete", "node", node)
        await until(lambda: b"DELETED" in seen, what="kubectl shows the deletion")
    finally:
        watching.kill()
        await watching.wait()
        await reading


async def test_refusals_reach_the_user_in_the_servers_words(kubectl: Kubectl) -> None:
    assert 'nodes "flanneld-test-absent" not found' in await kubectl.run(
        "get", "node", "flanneld-test-absent", status=1
    )


async def test_the_daemons_rights_do_not_reach_beyond_its_manifest(tmp_path: Path) -> None:
    async with KubeApi(tls=Authority(tmp_path).issue("127.0.0.1")) as api:
        api.create_node("n1")
        daemon = Kubectl(_kubeconfig(tmp_path, api, FLANNEL_TOKEN), tmp_path / "cache")
        assert await daemon.run("get", "nodes", "-o", "name") == "node/n1\n"
        said = await daemon.run("annotate", "node", "n1", "c=d", status=1)
        assert 'cannot patch resource "nodes" in API group "" at the cluster scope' in said
