"""Credentials for the API server, always the present ones: tokens and certificates are replaced while we run.

A pod's token lives an hour and is rewritten before that; a CA bundle changes when the cluster's CA is rotated. Files
are looked at (not read) before each request and connection, which takes a microsecond. Never connects.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable

from flanneld.errors import ConfigError
from flanneld.sources.kube_config import Pem, Server, Settings, is_token

log = logging.getLogger("flanneld.kube")


class Access:
    """How to reach the API server and what to show it.

    Args:
        load: reads flags, kubeconfig and environment; called again when the kubeconfig changed.

    Raises:
        ConfigError: what is configured cannot be used.
    """

    def __init__(self, load: Callable[[], Settings]) -> None:
        self._load = load
        self._settings = load()
        self._context: ssl.SSLContext | None = None
        self._token = ""
        self._config_stamp = _stamp(self._settings.file)
        self._token_stamp = _stamp(self._settings.token_file)
        self._tls_stamps = self._stamps_of_tls()
        self._complained = ""
        self._build()
        if self._settings.insecure:
            log.warning("the API server's certificate is not checked, as %s says", self._settings.source)

    @property
    def server(self) -> Server:
        """Where the API server is."""
        return self._settings.server

    @property
    def server_name(self) -> str:
        """What its certificate has to be for."""
        return self._settings.server_name or self._settings.server.host

    @property
    def source(self) -> str:
        """What told us all this, for sentences."""
        return self._settings.source

    @property
    def has_credentials(self) -> bool:
        """Whether there is anything to show; not with ``--kube-api-url`` alone (contract 9.1)."""
        return bool(self._token or self._settings.cert)

    def context(self) -> ssl.SSLContext | None:
        """TLS for a new connection; None for plain http."""
        self._refresh()
        return self._context

    def authorization(self) -> str:
        """Value of the ``Authorization`` header for a request; empty = none."""
        self._refresh()
        return f"Bearer {self._token}" if self._token else ""

    def refused(self, authorization: str) -> bool:
        """The server does not take this header: read all files again; tells whether there is another one to try."""
        self.reload()
        return self.authorization() != authorization

    def reload(self) -> None:
        """Read everything again, even where size and time look unchanged (SIGHUP)."""
        self._config_stamp = self._token_stamp = None
        self._tls_stamps = []
        self._refresh()

    def _refresh(self) -> None:
        """Take changed files; while somebody is half-way through replacing them, the old content stays in use."""
        config, token, tls = _stamp(self._settings.file), _stamp(self._settings.token_file), self._stamps_of_tls()
        if (config, token, tls) == (self._config_stamp, self._token_stamp, self._tls_stamps):
            return
        before = self._settings
        try:
            if config != self._config_stamp:
                self._settings = self._load()
            self._build()
        except ConfigError as error:
            self._settings = before
            if str(error) != self._complained:
                log.error("credentials for Kubernetes cannot be read again, the old ones stay in use reason=%s", error)
                self._complained = str(error)
        else:
            log.debug("credentials for Kubernetes read again source=%s", self._settings.source)
            self._complained = ""
        self._config_stamp, self._token_stamp, self._tls_stamps = config, token, tls

    def _build(self) -> None:
        settings = self._settings
        context = _tls(settings) if settings.server.tls else None
        token = settings.token
        if settings.token_file:  # goes before, as in client-go
            token = _read_token(settings.token_file)
        self._context, self._token = context, token

    def _stamps_of_tls(self) -> list[object]:
        settings = self._settings
        return [_stamp(pem.path) for pem in (settings.ca, settings.cert, settings.key)]


def _stamp(path: str) -> object:
    """Changes when a file does; a mounted Secret is swapped by a symbolic link, which the inode tells."""
    if not path:
        return None
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _read_token(path: str) -> str:
    token = _read(path).strip().decode(errors="replace")
    if not token or not is_token(token):
        raise ConfigError(f"{path} does not hold a token, which is one line of ASCII without blanks")
    return token


def _tls(settings: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context() if not settings.ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if settings.ca:
        what = f"the CA of {settings.source}{_at(settings.ca)}"
        try:
            context.load_verify_locations(cadata=_content(settings.ca).decode())
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"{what} is not PEM with certificates: kubectl config view --raw shows it") from error
    if settings.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.cert:
        _load_pair(context, settings)
    return context


def _load_pair(context: ssl.SSLContext, settings: Settings) -> None:
    """OpenSSL takes a client's key from a file only: an anonymous one, so that no copy of it comes to lie anywhere."""
    fd = os.memfd_create("client-certificate")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(_content(settings.cert) + b"\n" + _content(settings.key))
        # an empty password makes an encrypted key fail; without it OpenSSL would ask on the terminal
        context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        raise ConfigError(
            f"the client certificate{_at(settings.cert)} and key{_at(settings.key)} of {settings.source} are not PEM "
            f"that belongs together, the key unencrypted: {reason}"
        ) from error
    finally:
        os.close(fd)


def _content(pem: Pem) -> bytes:
    return pem.data or _read(pem.path)


def _at(pem: Pem) -> str:
    return f" {pem.path}" if pem.path else ""
