from __future__ import annotations

import os
from pathlib import Path

import pytest
import trustme

from flanneld.errors import ConfigError
from flanneld.sources.etcd_client import Credentials, Endpoint, EtcdClient, TLSFiles, parse_endpoints
from flanneld.sources.etcd_endpoint import TLS


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        ("http://127.0.0.1:4001,http://127.0.0.1:2379", (("http", "127.0.0.1", 4001), ("http", "127.0.0.1", 2379))),
        ("http://a:2379,https://b.example.:2379", (("http", "a", 2379), ("https", "b.example.", 2379))),
        ("HTTPS://a_b-c:1/", (("https", "a_b-c", 1),)),
        ("https://[::1]:2379", (("https", "::1", 2379),)),
        ("http://a:1,http://a:1", (("http", "a", 1),)),
    ],
)
def test_endpoints_are_a_comma_list_of_urls(text: str, endpoints: tuple[tuple[str, str, int], ...]) -> None:
    assert parse_endpoints(text) == endpoints


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no http://"),
        ("a:2379", "'a:2379' has no http:// or https:// in front"),
        ("http://a:1,", "'' has no http://"),
        ("http://a:1, http://b:1", "' http://b:1' is not a URL"),
        ("http://a b:1", "impossible host"),
        ("http://a", "has no port"),
        ("http://a:", "is not a URL"),
        ("http://a:0", "outside 1-65535"),
        ("http://a:65536", "outside 1-65535"),
        ("http://a:1/v3", "is not a URL"),
        ("unix:///run/etcd.sock", "is not a URL"),
        ("unix://etcd:1", "scheme unix://"),
        ("http://[::1:2379", "is not a URL"),
        ("http://[127.0.0.1]:2379", "impossible host"),
        ("http://::1:2379", "is not a URL"),
        ("http://a..b:1", "impossible host"),
        ("http://a\n:1", "impossible host"),
    ],
)
def test_a_bad_endpoint_is_named_with_what_is_wrong_and_the_right_form(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_endpoints(text)
    assert str(caught.value).startswith("--etcd-endpoints: ")
    assert says in str(caught.value)
    assert "http://127.0.0.1:2379" in str(caught.value)


def test_a_password_inside_an_endpoint_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="--etcd-username") as caught:
        parse_endpoints("http://root:hunter2@a:2379")
    assert "hunter2" not in str(caught.value)


def test_an_endpoint_prints_as_it_is_written() -> None:
    assert [str(e) for e in parse_endpoints("https://[fd00::1]:2379,http://a:1")] == [
        "https://[fd00::1]:2379",
        "http://a:1",
    ]


def test_credentials_never_show_the_password() -> None:
    credentials = Credentials("flannel", "hunter2")
    assert "hunter2" not in f"{credentials} {credentials!r} {[credentials]}"
    assert credentials.password == "hunter2"


async def test_a_client_describes_itself_by_its_endpoints_alone() -> None:
    client = EtcdClient(parse_endpoints("http://a:1,http://b:2"), credentials=Credentials("flannel", "hunter2"))
    assert client.describe() == "http://a:1,http://b:2"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (TLSFiles(cert="c.pem"), "--etcd-certfile is given without --etcd-keyfile"),
        (TLSFiles(key="k.pem"), "--etcd-keyfile is given without --etcd-certfile"),
    ],
)
def test_half_a_client_certificate_is_refused_even_for_plaintext(files: TLSFiles, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EtcdClient([Endpoint("http", "a", 1)], files)


class Files:
    """PEM files of one CA, and some broken ones."""

    def __init__(self, directory: Path) -> None:
        self.ca, self.cert, self.key = (str(directory / name) for name in ("ca", "cert", "key"))
        self.other_key, self.garbage = str(directory / "other"), str(directory / "garbage")
        self.missing = str(directory / "missing")
        self.issue()
        Path(self.garbage).write_text("not PEM\n")
        trustme.CA().issue_cert("x").private_key_pem.write_to_path(self.other_key)

    def issue(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        client = authority.issue_cert("x")
        client.cert_chain_pems[0].write_to_path(self.cert)
        client.private_key_pem.write_to_path(self.key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_an_unusable_certificate_file_is_named_at_start(files: Files) -> None:
    cases = [
        (TLSFiles(ca=files.missing), f"--etcd-cafile {files.missing} cannot be read: No such file"),
        (TLSFiles(ca=files.garbage), f"--etcd-cafile {files.garbage} is not a PEM file"),
        (TLSFiles(files.ca, files.missing, files.key), f"--etcd-certfile {files.missing} cannot be read"),
        (TLSFiles(files.ca, files.cert, files.garbage), f"--etcd-keyfile {files.garbage} are not a PEM"),
        (TLSFiles(files.ca, files.cert, files.other_key), f"--etcd-keyfile {files.other_key} is not the key of"),
    ]
    for given, says in cases:
        with pytest.raises(ConfigError) as caught:
            EtcdClient([Endpoint("https", "a", 1)], given)
        assert says in str(caught.value)


def test_certificate_files_are_not_read_for_plaintext_endpoints(files: Files) -> None:
    """Contract 3.4: ``http://`` = plaintext even with certificates."""
    EtcdClient([Endpoint("http", "a", 1)], TLSFiles(ca=files.missing))


def test_replaced_files_are_used_for_the_next_connection(files: Files) -> None:
    tls = TLS(TLSFiles(files.ca, files.cert, files.key))
    before = tls.context()
    assert tls.context() is before
    files.issue()
    assert tls.context() is not before


def test_half_replaced_files_leave_the_old_ones_in_use_and_are_complained_of_once(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    tls = TLS(TLSFiles(files.ca, files.cert, files.key))
    before = tls.context()
    good_key = Path(files.key).read_bytes()
    Path(files.key).write_text("half")
    assert [tls.context(), tls.context()] == [before, before]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert files.key in caplog.text
    Path(files.key).write_bytes(good_key)
    assert tls.context() is not before


def test_reload_reads_files_that_look_unchanged(files: Files) -> None:
    tls = TLS(TLSFiles(ca=files.ca))
    before = tls.context()
    stat = os.stat(files.ca)
    os.utime(files.ca, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tls.reload()
    assert tls.context() is not before
