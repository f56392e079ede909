"""An API server for each test: the fake, or the one that ``KUBE_APISERVER_KUBECONFIG`` names.

Its value is the path of a kubeconfig with an administrator's rights, on a cluster that nobody needs: tests make and
delete nodes whose names begin with ``t`` and a random mark. Tests of faults need the fake and say so when skipped.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from flanneld.lab.kubeapi import Authority, Certificates, KubeApi, Timing
from flanneld.lab.kubeapi.routes import Dialect
from tests.support.kube import KubeHost, MakeKubeHost, Site

REAL = os.environ.get("KUBE_APISERVER_KUBECONFIG", "")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs the fake's certificates."""
    return Authority(tmp_path_factory.mktemp("kube-ca"))


@pytest.fixture(scope="session")
def certificates(authority: Authority) -> Certificates:
    """The fake's own."""
    return authority.issue("127.0.0.1")


@pytest.fixture
async def server(request: pytest.FixtureRequest, certificates: Certificates) -> AsyncIterator[KubeApi | None]:
    """The fake, with a bookmark a second; None when a real server is named. Its parameter is the fake's dialect."""
    if REAL:
        yield None
        return
    dialect: Dialect = getattr(request, "param", "1.36")
    async with KubeApi(tls=certificates, timing=Timing(bookmark_s=1.0), dialect=dialect) as api:
        yield api


@pytest.fixture
def fake(server: KubeApi | None) -> KubeApi:
    """The same for tests that switch its faults."""
    if server is None:
        pytest.skip("faults are switched on the fake API server only, and KUBE_APISERVER_KUBECONFIG names a real one")
    return server


@pytest.fixture
async def site(server: KubeApi | None, tmp_path: Path) -> AsyncIterator[Site]:
    """The way to it."""
    site = Site.of_fake(server, tmp_path) if server else Site(Path(REAL), Path(REAL), None)
    yield site
    await site.close()


@pytest.fixture
async def host(site: Site) -> AsyncIterator[MakeKubeHost]:
    """Makes hosts, by default on node a; they end with the test."""
    async with AsyncExitStack() as stack:

        def make(*args: Any, **settings: Any) -> KubeHost:
            made = KubeHost(site, *args, **settings)
            stack.push_async_exit(made)
            return made

        yield make
