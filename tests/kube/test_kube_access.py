"""Credentials for the API server as they come, go and are replaced; refusals say what to do (contract 9.1, 9.2)."""

from __future__ import annotations

import asyncio
import base64
import logging
from pathlib import Path

import pytest

from flanneld.errors import Unavailable
from flanneld.lab.kubeapi import FLANNEL_TOKEN, FLANNEL_USER, Authority, Certificates, KubeApi
from flanneld.sources.kube_access import Access
from flanneld.sources.kube_config import Settings, find_settings
from flanneld.sources.kube_http import KubeHttp
from flanneld.sources.kube_wire import TooLarge
from tests.support.kube import KubeHost, MakeKubeHost, Site, published, watching, write_kubeconfig
from tests.support.wait import until

VERSION = "/version"
NODES = "/api/v1/nodes?limit=1"


def http_of(kubeconfig: Path) -> KubeHttp:
    return KubeHttp(Access(lambda: find_settings("", str(kubeconfig), {})), request_s=2.0, connect_s=2.0)


def in_base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


async def asked(http: KubeHttp, target: str = NODES) -> str:
    """What one request comes to: ``ok``, or the sentence."""
    try:
        await http.call("GET", target)
    except Unavailable as error:
        return str(error)
    finally:
        http.close()
    return "ok"


@pytest.fixture
async def working(fake: KubeApi, site: Site, host: MakeKubeHost, caplog: pytest.LogCaptureFixture) -> KubeHost:
    """A host at work with one peer."""
    caplog.set_level(logging.INFO)
    await site.create("a", "10.5.1.0/24")
    await site.create("b", "10.5.2.0/24", annotations=published())
    a: KubeHost = host(request_s=1.0)
    await a.run()
    await watching(fake)
    await until(lambda: len(a.peers) == 2)
    return a


def add(fake: KubeApi, site: Site, name: str) -> None:
    fake.create_node(site.node(name), ["10.5.3.0/24"], {key: text for key, text in published().items() if text})


# ---- while running ------------------------------------------------------------------------------------------------


async def test_a_renewed_token_is_taken_from_its_file(fake: KubeApi, site: Site, working: KubeHost) -> None:
    assert site.token_file
    fake.access.rotate(FLANNEL_TOKEN, "second")
    site.token_file.write_text("second\n")
    await fake.drop_connections()
    add(fake, site, "c")
    await until(lambda: "c" in working.peers)
    await working.store.network_is_up()
    assert (await site.condition("a") or {})["status"] == "False"


async def test_a_token_that_is_renewed_late_is_waited_for(
    fake: KubeApi, site: Site, working: KubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.token_file
    fake.access.rotate(FLANNEL_TOKEN, "second")
    await fake.drop_connections()
    up = asyncio.create_task(working.store.network_is_up())
    await until(lambda: "does not take our credentials: renew those of kubeconfig" in caplog.text)
    site.token_file.write_text("second")
    await up
    add(fake, site, "c")
    await until(lambda: "c" in working.peers)


async def test_a_token_file_caught_half_written_does_no_harm(
    site: Site, working: KubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.token_file
    site.token_file.write_text("")
    assert await working.store.operator_addresses() == (None, None)
    assert "the old ones stay in use" in caplog.text
    assert FLANNEL_TOKEN not in caplog.text


async def test_a_renewed_server_certificate_is_taken(
    fake: KubeApi, site: Site, working: KubeHost, authority: Authority, certificates: Certificates
) -> None:
    fake.renew_certificate(authority.issue("127.0.0.1", stem="renewed"))
    await fake.drop_connections()
    add(fake, site, "c")
    await until(lambda: "c" in working.peers)
    fake.renew_certificate(certificates)


async def test_a_new_authority_is_taken_when_the_kubeconfig_names_it(
    fake: KubeApi, site: Site, working: KubeHost, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    fake.renew_certificate(other.issue("127.0.0.1"))
    await fake.drop_connections()
    up = asyncio.create_task(working.store.network_is_up())
    await until(lambda: "is not trusted" in caplog.text)
    assert f"check the CA and the server's name in kubeconfig {site.kubeconfig}" in caplog.text
    write_kubeconfig(site.kubeconfig, fake.url, other.ca_file, {"tokenFile": "token"})
    await up
    add(fake, site, "c")
    await until(lambda: "c" in working.peers)


async def test_rights_that_are_missing_are_named_and_waited_for(
    fake: KubeApi, site: Site, working: KubeHost, caplog: pytest.LogCaptureFixture
) -> None:
    rights = fake.access.rights.pop(FLANNEL_USER)
    up = asyncio.create_task(working.store.network_is_up())
    await until(lambda: "forbids it" in caplog.text)
    assert 'cannot get resource "nodes"' in caplog.text
    assert "the rights pods get; nodes get, list, watch; nodes/status patch" in caplog.text
    fake.access.rights[FLANNEL_USER] = rights
    await up


async def test_the_rights_of_the_manifests_are_enough(fake: KubeApi, working: KubeHost) -> None:
    await working.store.network_is_up()
    await working.store.operator_addresses()
    assert {seen.code for seen in fake.requests} <= {200, 201}


# ---- what a kubeconfig may hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [False, True])
async def test_a_client_certificate_works_as_file_and_as_data(
    inline: bool, fake: KubeApi, authority: Authority, tmp_path: Path
) -> None:
    fake.access.rights["node-agent"] = fake.access.rights[FLANNEL_USER]
    mine = authority.issue_client("node-agent")
    user = {"client-certificate": str(mine.cert_file), "client-key": str(mine.key_file)}
    if inline:
        user = {f"{key}-data": in_base64(path) for key, path in user.items()}
    path = write_kubeconfig(tmp_path / "config", fake.url, fake.ca_file, user)
    assert await asked(http_of(path)) == "ok"
    assert fake.requests[-1].code == 200


async def test_an_unverified_server_is_used_where_the_kubeconfig_says_so(
    fake: KubeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_kubeconfig(tmp_path / "config", fake.url, None, {"token": FLANNEL_TOKEN})
    assert "is not trusted" in await asked(http_of(path))
    path.write_text(path.read_text().replace('"server"', '"insecure-skip-tls-verify": true, "server"'))
    assert await asked(http_of(path)) == "ok"
    assert "is not checked" in caplog.text


async def test_the_name_in_the_certificate_may_differ_from_the_address(
    fake: KubeApi, authority: Authority, certificates: Certificates, tmp_path: Path
) -> None:
    fake.renew_certificate(authority.issue("api.example.com", stem="named"))
    path = write_kubeconfig(tmp_path / "config", fake.url, fake.ca_file, {"token": FLANNEL_TOKEN})
    assert "is not trusted" in await asked(http_of(path))
    path.write_text(path.read_text().replace('"server"', '"tls-server-name": "api.example.com", "server"'))
    assert await asked(http_of(path)) == "ok"
    fake.renew_certificate(certificates)


async def test_a_url_alone_has_no_credentials_and_says_so() -> None:
    async with KubeApi() as api:
        http = KubeHttp(Access(lambda: find_settings(api.url, "", {})))
        assert await asked(http, VERSION) == "ok"
        assert "cannot list resource" in await asked(http)
        api.access.rights["system:anonymous"] = api.access.rights[FLANNEL_USER]
        assert await asked(http) == "ok"


# ---- connections --------------------------------------------------------------------------------------------------


async def test_requests_share_a_connection_and_survive_its_loss(fake: KubeApi, site: Site) -> None:
    http = http_of(site.kubeconfig)
    for _ in range(3):
        await http.call("GET", NODES)
    assert fake.connections == 1
    await fake.drop_connections()
    await http.call("GET", NODES)
    http.close()
    await until(lambda: fake.connections == 0)


async def test_reload_leaves_kept_connections(fake: KubeApi, site: Site, working: KubeHost) -> None:
    await working.store.operator_addresses()
    kept = fake.connections
    working.store.reload()
    await until(lambda: fake.connections < kept)
    await working.store.operator_addresses()


async def test_an_answer_that_is_too_large_is_not_taken(fake: KubeApi, site: Site) -> None:
    fake.create_node("big", managed_fields_bytes=200_000)
    http = http_of(site.kubeconfig)
    with pytest.raises(TooLarge):
        await http.call("GET", NODES, limit=100_000)
    await until(lambda: fake.connections == 0)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("https://127.0.0.1:1", "cannot be reached"), ("http://no-such-host.invalid:1", "cannot be reached")],
)
async def test_a_server_that_is_not_there_is_one_sentence(url: str, sentence: str) -> None:
    text = await asked(KubeHttp(Access(lambda: find_settings(url, "", {})), connect_s=5.0))
    assert sentence in text
    assert url in text
    assert "\n" not in text


async def test_something_else_than_an_api_server_is_one_sentence() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example.com ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        assert "broke the connection instead of answering" in await asked(
            KubeHttp(Access(lambda: find_settings(url, "", {})))
        )


def test_secrets_are_never_shown() -> None:
    settings = find_settings("https://127.0.0.1:6443", "", {})._replace(token="s3cret")
    assert "s3cret" not in repr(settings)
    assert isinstance(settings, Settings)
