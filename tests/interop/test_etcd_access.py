"""Who may talk to etcd: TLS with real certificates, and users with real tokens (contract 3.4, 3.5)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flanneld.errors import ConfigError, Unavailable
from flanneld.sources.etcd_client import Credentials, EtcdClient, TLSFiles, parse_endpoints
from tests.support.etcd import Certificates, Cluster
from tests.support.wait import until
from tests.support.watching import Watching

pytestmark = pytest.mark.etcd

ROOT = "root-secret"
NO_FILES = TLSFiles()


@asynccontextmanager
async def client_of(
    cluster: Cluster, tls: TLSFiles = NO_FILES, credentials: Credentials | None = None, scheme: str = ""
) -> AsyncIterator[EtcdClient]:
    endpoints = cluster.endpoints.replace(cluster.scheme, scheme or cluster.scheme)
    client = EtcdClient(parse_endpoints(endpoints), tls, credentials, request_timeout_s=2.0)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture(scope="module")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(certificates=Certificates(tmp_path_factory.mktemp("tls"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def mutual_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(certificates=Certificates(tmp_path_factory.mktemp("mutual")), client_cert=True) as cluster:
        yield cluster


def files(cluster: Cluster, client: bool = True) -> TLSFiles:
    made = cluster.certificates
    assert made is not None
    return TLSFiles(made.ca, made.cert, made.key) if client else TLSFiles(made.ca)


async def refusal(client: EtcdClient) -> str:
    with pytest.raises(Unavailable) as caught:
        await client.get(b"a")
    return str(caught.value)


async def test_a_ca_alone_is_enough(tls_etcd: Cluster) -> None:
    """Better than contract 3.4, where a CA without client certificate is ignored."""
    async with client_of(tls_etcd, files(tls_etcd, client=False)) as client:
        assert await client.put(b"a", b"1")


async def test_a_client_certificate_is_shown(mutual_etcd: Cluster) -> None:
    async with client_of(mutual_etcd, files(mutual_etcd)) as client:
        assert await client.put(b"a", b"1")


async def test_without_files_the_system_decides_and_a_private_ca_is_not_trusted(tls_etcd: Cluster) -> None:
    async with client_of(tls_etcd) as client:
        assert "not signed by the system's CA certificates (no --etcd-cafile is given)" in await refusal(client)


async def test_a_server_of_another_ca_is_refused_naming_our_file(tls_etcd: Cluster, mutual_etcd: Cluster) -> None:
    other = files(mutual_etcd, client=False)
    async with client_of(tls_etcd, other) as client:
        assert f"its certificate is not signed by --etcd-cafile {other.ca}" in await refusal(client)


async def test_a_missing_client_certificate_is_said_by_flag(mutual_etcd: Cluster) -> None:
    async with client_of(mutual_etcd, files(mutual_etcd, client=False)) as client:
        sentence = await refusal(client)
    assert "refuses us without client certificate" in sentence
    assert "--etcd-certfile and --etcd-keyfile" in sentence


async def test_a_client_certificate_of_another_ca_is_said_by_file(mutual_etcd: Cluster, tls_etcd: Cluster) -> None:
    wrong = files(mutual_etcd)._replace(cert=files(tls_etcd).cert, key=files(tls_etcd).key)
    async with client_of(mutual_etcd, wrong) as client:
        assert f"it refuses our client certificate --etcd-certfile {wrong.cert}" in await refusal(client)


async def test_a_certificate_for_another_name_is_said(tls_etcd: Cluster) -> None:
    endpoints = tls_etcd.endpoints.replace(tls_etcd.members[0].address, "localhost")
    made = tls_etcd.certificates
    assert made is not None
    relay = await asyncio.start_server(lambda r, w: pipe(tls_etcd, r, w), "127.0.0.1", 0)
    port = relay.sockets[0].getsockname()[1]
    client = EtcdClient(parse_endpoints(endpoints.replace(":2379", f":{port}")), TLSFiles(made.ca))
    assert "its certificate is not made out to localhost" in await refusal(client)
    await client.close()
    relay.close()
    await relay.wait_closed()


async def pipe(cluster: Cluster, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward one TLS handshake."""
    there, back = await asyncio.open_connection(cluster.members[0].address, 2379)
    try:
        back.write(await reader.read(65536))
        writer.write(await there.read(65536))
        await reader.read(65536)
    finally:
        back.close()
        writer.close()


async def test_plaintext_to_tls_and_tls_to_plaintext_are_said(tls_etcd: Cluster, etcd: Cluster) -> None:
    async with client_of(tls_etcd, scheme="http") as client:
        assert "does it expect https://?" in await refusal(client)
    async with client_of(etcd, scheme="https") as client:
        assert "http://" in (await refusal(client)).split("127", 1)[1]


async def test_a_running_watch_survives_a_change_of_ca_and_certificates(tmp_path: Path) -> None:
    """Failures F28: certificates are read again for each connection."""
    with Cluster(certificates=Certificates(tmp_path), client_cert=True) as cluster:
        async with client_of(cluster, files(cluster)) as client, Watching(client, b"/", 1) as watching:
            await client.put(b"/a", b"1")
            await until(lambda: watching.keys() == [b"/a"])
            member = cluster.members[0]
            member.kill()
            assert cluster.certificates is not None
            cluster.certificates.issue(member.address)
            member.start()
            await until(member.is_healthy, 10)
            await client.put(b"/b", b"2")
            await until(lambda: watching.keys() == [b"/a", b"/b"], 10)


@pytest.fixture
def guarded() -> Iterator[Cluster]:
    """An etcd with users ``root`` and ``flannel``; the latter may use keys under ``/f/``; tokens last 2 s idle."""
    with Cluster(extra=["--auth-token-ttl=2"]) as cluster:
        cluster.enable_auth(ROOT, flannel="secret")
        cluster.allow("flannel", "/f/", ROOT)
        yield cluster


async def test_user_and_password_give_access_to_granted_keys_only(guarded: Cluster) -> None:
    async with client_of(guarded, credentials=Credentials("flannel", "secret")) as client:
        lease = await client.grant(60)
        assert (await client.put_if(b"/f/a", b"1", lease, mod_revision=0)).succeeded
        assert len((await client.list(b"/f/")).kvs) == 1
        with pytest.raises(ConfigError, match="etcd refuses user flannel access to /g/a: grant"):
            await client.put(b"/g/a", b"1")


async def test_a_wrong_password_is_said_without_repeating_it(guarded: Cluster) -> None:
    async with client_of(guarded, credentials=Credentials("flannel", "hunter2")) as client:
        with pytest.raises(ConfigError) as caught:
            await client.get(b"/f/a")
    assert "etcd refused user flannel: check --etcd-username and --etcd-password" in str(caught.value)
    assert "hunter2" not in repr(caught.value)


async def test_a_missing_user_is_said_by_flag(guarded: Cluster) -> None:
    async with client_of(guarded) as client:
        with pytest.raises(ConfigError, match="etcd wants a user: give --etcd-username and --etcd-password"):
            await client.get(b"/f/a")


async def test_credentials_that_nobody_asks_for_do_no_harm(etcd: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(etcd, credentials=Credentials("flannel", "secret")) as client:
        await client.get(b"a")
    assert caplog.messages == ["etcd has authentication switched off, --etcd-username is not used"]


async def test_an_expired_token_is_replaced_unnoticed_by_a_request_and_by_a_watch(guarded: Cluster) -> None:
    """Dependencies 2.3: a new watch with a dead token is created and cancelled, not refused."""
    user = Credentials("flannel", "secret")
    async with client_of(guarded, credentials=user) as reader, client_of(guarded, credentials=user) as watcher:
        await reader.put(b"/f/a", b"1")
        await watcher.get(b"/f/a")
        # Use renews the token, so its death cannot be observed beforehand: only time will do.
        await asyncio.sleep(3.5)
        async with asyncio.timeout(3):
            watch = watcher.watch(b"/f/", prefix=True, start_revision=1)
            assert [event.kv.key for event in (await anext(watch)).events] == [b"/f/a"]
            await watch.aclose()
            assert (await reader.get(b"/f/a")).kvs


async def test_tokens_that_died_with_the_server_are_replaced(guarded: Cluster) -> None:
    credentials = Credentials("flannel", "secret")
    async with client_of(guarded, credentials=credentials) as client, Watching(client, b"/f/", 1) as watching:
        await client.put(b"/f/a", b"1")
        await until(lambda: watching.keys() == [b"/f/a"])
        guarded.members[0].kill()
        guarded.members[0].start()
        await until(guarded.members[0].is_healthy, 10)
        await client.put(b"/f/b", b"2")
        await until(lambda: watching.keys() == [b"/f/a", b"/f/b"], 10)


async def test_a_watch_waits_for_its_password_to_become_right(
    guarded: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flanneld")
    async with client_of(guarded, credentials=Credentials("flannel", "hunter2")) as client:
        async with Watching(client, b"/f/", 1) as watching:
            await until(lambda: "check --etcd-username and --etcd-password" in caplog.text)
            assert "hunter2" not in caplog.text
            set_password(guarded, "flannel", "hunter2")
            await client.put(b"/f/a", b"1")
            await until(lambda: watching.keys() == [b"/f/a"], 10)
        assert not watching.task.done() or watching.task.cancelled()


def set_password(cluster: Cluster, user: str, password: str) -> None:
    cluster.ctl("user", "delete", user, user=f"root:{ROOT}")
    cluster.ctl("user", "add", f"{user}:{password}", user=f"root:{ROOT}")
    cluster.ctl("user", "grant-role", user, "root", user=f"root:{ROOT}")


async def test_a_watch_without_permission_waits_for_it(guarded: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    credentials = Credentials("flannel", "secret")
    async with client_of(guarded, credentials=credentials) as client, Watching(client, b"/g/", 1) as watching:
        await until(lambda: "refuses user flannel to watch /g/" in caplog.text)
        root = f"root:{ROOT}"
        guarded.ctl("role", "grant-permission", "role-flannel", "--prefix=true", "readwrite", "/g/", user=root)
        await client.put(b"/g/a", b"1")
        await until(lambda: watching.keys() == [b"/g/a"], 10)
