"""Where the API server is and who we are, out of flags, a pod's environment and kubeconfig files (contract 9.1)."""

from __future__ import annotations

import base64
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from flanneld.errors import ConfigError
from flanneld.sources.kube_access import Access
from flanneld.sources.kube_config import Pem, Server, find_settings, read_kubeconfig

YAML = """\
apiVersion: v1
kind: Config
current-context: here   # a comment
clusters:
- name: there
  cluster:
    server: https://192.0.2.9:6443
- cluster:
    certificate-authority: pki/ca.crt
    server: https://192.0.2.1:6443/prefix/
  name: mine
contexts:
- context: {cluster: mine, user: node, namespace: x}
  name: here
users:
- name: node
  user:
    tokenFile: token
preferences: {}
"""


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A pod's account."""
    directory = tmp_path / "account"
    directory.mkdir()
    (directory / "token").write_text("t0ken")
    (directory / "ca.crt").write_text("")
    return directory


IN_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def written(tmp_path: Path, user: dict[str, Any] | None = None, **cluster: Any) -> Path:
    """A kubeconfig in JSON, which is YAML too."""
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://192.0.2.1:6443", **cluster}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    return path


# ---- where to look ------------------------------------------------------------------------------------------------


def test_a_pod_finds_its_server_and_account(pod: Path) -> None:
    settings = find_settings("", "", IN_POD, in_pod=pod)
    assert str(settings.server) == "https://10.96.0.1:443"
    assert (settings.ca.path, settings.token_file) == (str(pod / "ca.crt"), str(pod / "token"))


def test_a_pod_with_ipv6_needs_no_brackets(pod: Path) -> None:
    settings = find_settings("", "", {**IN_POD, "KUBERNETES_SERVICE_HOST": "fd00::1"}, in_pod=pod)
    assert (settings.server.host, str(settings.server)) == ("fd00::1", "https://[fd00::1]:443")


def test_flags_go_before_the_pod(pod: Path, tmp_path: Path) -> None:
    path = written(tmp_path, {"token": "x"})
    assert find_settings("", str(path), IN_POD, in_pod=pod).server.host == "192.0.2.1"
    assert find_settings("http://127.0.0.1:8080", "", IN_POD, in_pod=pod).server.host == "127.0.0.1"


def test_a_url_alone_carries_no_credentials(pod: Path) -> None:
    settings = find_settings("https://127.0.0.1:6443", "", IN_POD, in_pod=pod)
    assert (settings.token, settings.token_file, settings.cert) == ("", "", Pem())


def test_a_url_replaces_the_server_of_a_kubeconfig(tmp_path: Path) -> None:
    settings = find_settings("https://192.0.2.7", str(written(tmp_path, {"token": "x"})), {})
    assert (str(settings.server), settings.token) == ("https://192.0.2.7:443", "x")


def test_without_a_pod_the_usual_kubeconfig_is_used(tmp_path: Path) -> None:
    path = written(tmp_path, {"token": "x"})
    assert find_settings("", "", {"KUBECONFIG": str(path)}, in_pod=tmp_path).file == str(path)
    (tmp_path / ".kube").mkdir()
    path.rename(tmp_path / ".kube" / "config")
    assert find_settings("", "", {}, in_pod=tmp_path, home=tmp_path).token == "x"


def test_several_kubeconfigs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several files: name the one"):
        find_settings("", "", {"KUBECONFIG": "/a:/b"}, in_pod=tmp_path)


def test_nothing_at_all_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --kubeconfig-file or --kube-api-url"):
        find_settings("", "", {}, in_pod=tmp_path, home=tmp_path)


# ---- kubeconfig ---------------------------------------------------------------------------------------------------


def test_the_current_context_counts_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(YAML)
    settings = read_kubeconfig(path)
    assert str(settings.server) == "https://192.0.2.1:6443/prefix"
    assert settings.ca == Pem(str(tmp_path / "pki/ca.crt"))
    assert settings.token_file == str(tmp_path / "token")


def test_certificates_come_as_files_or_as_data(tmp_path: Path) -> None:
    text = base64.b64encode(b"PEM").decode()
    user = {"client-certificate-data": text, "client-key": "/etc/key.pem"}
    settings = read_kubeconfig(written(tmp_path, user, **{"certificate-authority-data": text}))
    assert (settings.ca.data, settings.cert.data, settings.key.path) == (b"PEM", b"PEM", "/etc/key.pem")


@pytest.mark.parametrize(
    ("user", "cluster", "sentence"),
    [
        ({"exec": {"command": "aws"}}, {}, "user u: exec runs a program.*use token, tokenFile or a client certificate"),
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider was removed"),
        ({"username": "me", "password": "s3cret"}, {}, "basic authentication"),
        ({"as": "root"}, {}, "impersonation"),
        ({}, {"proxy-url": "http://proxy"}, "cluster k: proxy-url is not supported"),
        ({}, {"server": ""}, "server is not set"),
        ({}, {"server": "192.0.2.1:6443"}, "write it like https://10.0.0.1:6443"),
        ({}, {"server": "https://u:s3cret@192.0.2.1:6443"}, "server is a URL with a user name"),
        ({}, {"server": "https://192.0.2.1:99999"}, "which is no API server"),
        ({}, {"server": "https://[192.0.2.1]:6443"}, "which is no API server"),
        ({"client-certificate": "/x"}, {}, "belong together"),
        ({"client-key-data": "/x", "client-certificate-data": "!!"}, {}, "client-certificate-data is not base64"),
        ({"token": 5}, {}, "token is not text"),
        ({"token": "s3cret\nmore"}, {}, "token is not one line of ASCII without blanks"),
        ({"token": "s3cr\u00e9t"}, {}, "token is not one line of ASCII without blanks"),
        ({}, {"server": "https://a b:6443"}, "which is no API server"),
        ({}, {"server": "https://a\nb:6443"}, "which is no API server"),
        ({}, {"server": "https://192.0.2.1:6443/a\u00e9"}, "which is no API server"),
        ({}, {"tls-server-name": ".example.com"}, "tls-server-name is no name of a server"),
        ({}, {"tls-server-name": "a\0b"}, "tls-server-name is no name of a server"),
        ({}, {"insecure-skip-tls-verify": "yes"}, "neither true nor false"),
    ],
)
def test_what_a_daemon_cannot_do_is_refused_with_the_remedy(
    user: dict[str, Any], cluster: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        read_kubeconfig(written(tmp_path, user, **cluster))
    assert "s3cret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_line_end_after_a_token_is_no_part_of_it(tmp_path: Path) -> None:
    """YAML's block form, ``token: |``, ends with one."""
    assert read_kubeconfig(written(tmp_path, {"token": "x\n"})).token == "x"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not YAML at line 2"),
        ("- a", "is not a mapping"),
        ("", "current-context is not set"),
        ("current-context: x", "has no context 'x'"),
        ("current-context: x\ncontexts: [{name: x, context: {cluster: k, user: u}}]", "has no cluster 'k'"),
        ("!!python/object/apply:os.system [id]", "is not YAML"),
    ],
)
def test_a_file_that_is_no_kubeconfig_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=sentence):
        read_kubeconfig(path)


def test_a_missing_file_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="kubeconfig /nonexistent cannot be read: No such file"):
        find_settings("", "/nonexistent", {})


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("https://h", "https://h:443"),
        ("http://h", "http://h:80"),
        ("HTTPS://api.example.com:6443/", "https://api.example.com:6443"),
        ("https://[fd00::1]:6443/k8s/clusters/c-1", "https://[fd00::1]:6443/k8s/clusters/c-1"),
    ],
)
def test_urls_are_read(url: str, whole: str) -> None:
    assert str(Server.parse(url, "test")) == whole


# ---- files that change --------------------------------------------------------------------------------------------


def access(path: Path) -> Access:
    return Access(lambda: find_settings("", str(path), {}))


def test_a_token_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    ours = access(written(tmp_path, {"tokenFile": "token"}))
    assert ours.authorization() == "Bearer first"
    (tmp_path / "new").write_text("second")
    (tmp_path / "new").rename(tmp_path / "token")
    assert ours.authorization() == "Bearer second"


def test_a_refused_token_is_worth_another_try_only_if_there_is_another_one(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    ours = access(written(tmp_path, {"tokenFile": "token"}))
    assert not ours.refused("Bearer first")
    before = token.stat()
    token.write_text("secnd")
    os.utime(token, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert ours.refused("Bearer first")
    assert ours.authorization() == "Bearer secnd"


def test_a_kubeconfig_is_read_again_when_it_changed(tmp_path: Path) -> None:
    ours = access(written(tmp_path, {"token": "first"}))
    written(tmp_path, {"token": "second"}, server="https://192.0.2.2:6443")
    assert ours.authorization() == "Bearer second"
    assert ours.server.host == "192.0.2.2"


def test_a_broken_kubeconfig_leaves_the_old_one_in_use_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, {"token": "first"})
    ours = access(path)
    path.write_text("{")
    for _ in range(3):
        assert ours.authorization() == "Bearer first"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    written(tmp_path, {"token": "second"})
    assert ours.authorization() == "Bearer second"


@pytest.mark.parametrize("content", ["", "two words", "sché\n", "a\x00b"])
def test_a_token_file_without_a_token_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/token does not hold a token"):
        access(written(tmp_path, {"tokenFile": "token"}))


def test_certificates_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("nonsense")
    with pytest.raises(ConfigError, match=f"the CA of kubeconfig {tmp_path}/config {tmp_path}/ca is not PEM"):
        access(written(tmp_path, {}, **{"certificate-authority": "ca"}))
    data = base64.b64encode(b"nonsense").decode()
    with pytest.raises(ConfigError, match=r"the client certificate and key of kubeconfig .* are not PEM"):
        access(written(tmp_path, {"client-certificate-data": data, "client-key-data": data}))
