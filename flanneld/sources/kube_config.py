"""Where the API server is and what proves who we are: from flags, kubeconfig and a pod's environment to values.

Reads files, never connects. Whatever an operator can get wrong here is a ``ConfigError`` that names the file and
the key. What changes later (tokens, certificates) is read again by ``kube_access.py``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flanneld.errors import ConfigError
from flanneld.model.addr import parse_ip
from flanneld.model.plain import plain

IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its account. Source: kubernetes.io "Accessing the Kubernetes API from a Pod"."""

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^\[\]]*\]|[^/:\[\]?#@]+)(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!-~]*)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


class Server(NamedTuple):
    """The API server's address."""

    tls: bool
    host: str
    """Name or address; an IPv6 address without brackets."""
    port: int
    path: str = ""
    """What stands before ``/api``; empty, or begins with a slash and does not end in one."""

    @property
    def authority(self) -> str:
        """Host and port as in a ``Host`` header."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.path}"

    @staticmethod
    def parse(text: str, where: str) -> Server:
        """Parse a URL.

        Args:
            text: ``https://10.0.0.1:6443``; without a port it is 443 or 80.
            where: what the URL was given by, for the sentence.

        Raises:
            ConfigError: not such a URL.
        """
        match = _URL.fullmatch(text.strip())
        port = int(match["port"] or 0) if match else 0
        is_url = match is not None and _is_host(match["host"]) and not {"?", "#"} & set(match["path"] or "")
        if match is None or not is_url or port > 65535 or (match["port"] and port == 0):
            shown = "a URL with a user name" if "@" in text else repr(text[:200])  # a password is not repeated
            raise ConfigError(f"{where} is {shown}, which is no API server: write it like https://10.0.0.1:6443")
        tls = match["scheme"].lower() == "https"
        host, path = match["host"].strip("[]"), (match["path"] or "").rstrip("/")
        return Server(tls, host, port or (443 if tls else 80), path)


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return bool(_NAME.fullmatch(host))
    try:
        return len(parse_ip(host[1:-1])) == 16
    except ValueError:
        return False


def is_token(text: str) -> bool:
    """Whether a bearer token can be sent as it is: a header with anything else in it is shown by who refuses it."""
    return text.isascii() and text.isprintable() and " " not in text


class Pem(NamedTuple):
    """A certificate or key: either a file, or its content; printing it never shows the content."""

    path: str = ""
    data: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.path or self.data)

    def __repr__(self) -> str:
        return f"Pem({self.path or ('in kubeconfig' if self.data else 'none')})"


class Settings(NamedTuple):
    """How to reach and convince the API server; printing it never shows the token."""

    server: Server
    source: str
    """What said so, for sentences: ``kubeconfig /etc/…``."""
    ca: Pem = Pem()
    """Without it the system's roots are trusted."""
    insecure: bool = False
    server_name: str = ""
    """Name that the certificate must have, if not the host's."""
    token: str = ""
    token_file: str = ""
    cert: Pem = Pem()
    key: Pem = Pem()
    file: str = ""
    """The kubeconfig all this is from."""

    def __repr__(self) -> str:
        return f"Settings({self.server}, {self.source})"


def find_settings(
    api_url: str, kubeconfig: str, environ: Mapping[str, str], *, in_pod: Path = IN_POD, home: Path | None = None
) -> Settings:
    """Look for the API server where flannel does: flags, then the pod, then the usual kubeconfig (contract 9.1).

    Args:
        api_url: ``--kube-api-url``; alone it carries no credentials, with a kubeconfig it replaces the server.
        kubeconfig: ``--kubeconfig-file``.
        environ: the environment.
        in_pod: directory with the account of a pod.
        home: home directory; None = the user's.

    Raises:
        ConfigError: nothing is given, or what is given cannot be used.
    """
    if not kubeconfig:
        if api_url:
            return Settings(Server.parse(api_url, "--kube-api-url"), "--kube-api-url")
        if found := _of_pod(environ, in_pod):
            return found
        kubeconfig = _usual_file(environ, home)
    settings = read_kubeconfig(Path(kubeconfig))
    if api_url:
        settings = settings._replace(server=Server.parse(api_url, "--kube-api-url"))
    return settings


def _of_pod(environ: Mapping[str, str], in_pod: Path) -> Settings | None:
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        return None
    if not (in_pod / "token").is_file():
        return None
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    server = Server.parse(url, "KUBERNETES_SERVICE_HOST with KUBERNETES_SERVICE_PORT")
    return Settings(server, "the pod's service account", Pem(str(in_pod / "ca.crt")), token_file=str(in_pod / "token"))


def _usual_file(environ: Mapping[str, str], home: Path | None) -> str:
    listed = [path for path in environ.get("KUBECONFIG", "").split(":") if path]
    if len(listed) > 1:
        raise ConfigError("KUBECONFIG names several files: name the one to use by --kubeconfig-file")
    if listed:
        return listed[0]
    try:
        usual = (home or Path.home()) / ".kube" / "config"
    except RuntimeError:  # no home directory
        usual = Path("/nonexistent")
    if usual.is_file():
        return str(usual)
    raise ConfigError(
        "no Kubernetes API server is known: run flanneld in a pod with a service account, or give --kubeconfig-file "
        "or --kube-api-url"
    )


def read_kubeconfig(path: Path) -> Settings:
    """What the current context of a kubeconfig file says.

    Raises:
        ConfigError: it cannot be read, or wants something that a daemon cannot do.
    """
    config = _Section(_load(path), f"kubeconfig {path}")
    name = config.text("current-context")
    if not name:
        raise config.wrong("current-context", "is not set: kubectl config use-context sets it")
    context = config.named("contexts", name, "context")
    cluster = config.named("clusters", context.text("cluster"), "cluster")
    user = _Section({}, "") if not context.text("user") else config.named("users", context.text("user"), "user")
    _refuse(cluster, user)
    if not (url := cluster.text("server")):
        raise cluster.wrong("server", "is not set: write the URL of the API server")
    settings = Settings(
        Server.parse(url, f"{cluster.where}: server"),
        f"kubeconfig {path}",
        cluster.pem("certificate-authority", path.parent),
        cluster.flag("insecure-skip-tls-verify"),
        _server_name(cluster),
        _token(user),
        user.path("tokenFile", path.parent),
        user.pem("client-certificate", path.parent),
        user.pem("client-key", path.parent),
        str(path),
    )
    if bool(settings.cert) != bool(settings.key):
        raise user.wrong("client-certificate", "and client-key belong together: give both")
    return settings


def _token(user: _Section) -> str:
    token = user.text("token").strip()  # YAML's block form, ``token: |``, ends with a line end
    if not is_token(token):
        raise user.wrong("token", "is not one line of ASCII without blanks: write it anew")
    return token


def _server_name(cluster: _Section) -> str:
    name = cluster.text("tls-server-name")
    if name and not (_NAME.fullmatch(name) or _is_host(f"[{name}]")):
        raise cluster.wrong("tls-server-name", "is no name of a server: write the one in its certificate")
    return name


def _load(path: Path) -> object:
    import yaml  # 1.2 MB that a pod does without

    try:
        return yaml.load(path.read_bytes(), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)  # noqa: S506
    except OSError as error:
        raise ConfigError(f"kubeconfig {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"kubeconfig {path} is not YAML{place}: correct it") from error


def _refuse(cluster: _Section, user: _Section) -> None:
    """What Go flanneld does by other programs or machines, and we do not: better said than half done."""
    for key, why in {
        "exec": "runs a program for each token, which flanneld does not: use token, tokenFile or a client certificate",
        "auth-provider": "was removed from Kubernetes: use token, tokenFile or a client certificate",
        "username": "is basic authentication, which was removed from Kubernetes: use token or a client certificate",
        "as": "is impersonation, which flanneld does not do: give its own account the rights (README)",
    }.items():
        if user.has(key):
            raise user.wrong(key, why)
    if cluster.has("proxy-url"):
        raise cluster.wrong("proxy-url", "is not supported: pod networks come up before proxies, connect directly")


class _Section:
    """One mapping of a kubeconfig, with the place it stands at for sentences."""

    def __init__(self, value: object, where: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is not a mapping: see kubectl config view for the form")
        self._keys: dict[object, object] = value
        self.where = where

    def wrong(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} {what}")

    def has(self, key: str) -> bool:
        return self._keys.get(key) not in (None, "", {}, [])

    def text(self, key: str) -> str:
        value = self._keys.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(key, "is not text: put it in quotes")
        return value

    def flag(self, key: str) -> bool:
        value = self._keys.get(key)
        if value not in (None, True, False):
            raise self.wrong(key, "is neither true nor false")
        return bool(value)

    def path(self, key: str, base: Path) -> str:
        """A path, relative to the directory of the file."""
        return str(base / self.text(key)) if self.text(key) else ""

    def pem(self, key: str, base: Path) -> Pem:
        """A file or, which goes before, its content as base64 under ``key-data``."""
        text = self.text(f"{key}-data")
        if not text:
            return Pem(self.path(key, base))
        try:
            return Pem(data=base64.b64decode("".join(text.split()), validate=True))
        except (binascii.Error, ValueError):
            raise self.wrong(f"{key}-data", "is not base64") from None

    def named(self, group: str, name: str, key: str) -> _Section:
        """The entry of a name in a list such as ``clusters``."""
        entries = self._keys.get(group)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and entry.get("name") == name:
                return _Section(entry.get(key), f"{self.where}, {key} {plain(name[:80])}")
        raise ConfigError(f"{self.where} has no {key} {name[:80]!r} under {group}")
