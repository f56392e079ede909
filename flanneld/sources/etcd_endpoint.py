"""Where etcd is and how its TLS is set up: the values behind ``--etcd-endpoints`` and the certificate flags.

Parses and loads; never connects. Mistakes an operator can make here are ``ConfigError`` with the flag's name.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from typing import NamedTuple

from flanneld.errors import ConfigError, UsageError
from flanneld.model.addr import parse_ip

log = logging.getLogger(__name__)

_FORM = re.compile(
    r"(?P<scheme>[a-z]+)://(?P<host>\[[^\[\]]*\]|[^/:\[\]?#@]+)(?::(?P<port>[0-9]{1,5}))?/?", re.IGNORECASE
)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_EXAMPLE = "write it like http://127.0.0.1:2379 or https://[fd00::1]:2379"


class Endpoint(NamedTuple):
    """One member's client address."""

    scheme: str
    """``http`` (plaintext, whatever certificates are given) or ``https`` (contract 3.4)."""
    host: str
    """Name or address; an IPv6 address without brackets."""
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """Parse the comma list of ``--etcd-endpoints``; an endpoint named twice counts once.

    Raises:
        UsageError: the sentence names the bad entry and shows the right form; a password in it is not repeated.
    """
    return tuple(dict.fromkeys(_parse_endpoint(entry) for entry in text.split(",")))


def _parse_endpoint(entry: str) -> Endpoint:
    if "@" in entry:
        raise UsageError("--etcd-endpoints holds a user name: give it by --etcd-username and --etcd-password")
    match = _FORM.fullmatch(entry)
    if match is None:
        raise _wrong(entry, "has no http:// or https:// in front" if "://" not in entry else "is not a URL")
    scheme, host = match["scheme"].lower(), match["host"]
    if scheme not in ("http", "https"):
        raise _wrong(entry, f"has the scheme {scheme[:20]}://, which is neither http:// nor https://")
    if not match["port"]:
        raise _wrong(entry, "has no port")
    if not 0 < int(match["port"]) < 65536:
        raise _wrong(entry, "has a port outside 1-65535")
    if not _is_host(host):
        raise _wrong(entry, f"has the impossible host {host[:80]!r}")
    return Endpoint(scheme, host.strip("[]"), int(match["port"]))


def _wrong(entry: str, what: str) -> UsageError:
    return UsageError(f"--etcd-endpoints: {entry[:200]!r} {what}: {_EXAMPLE}")


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split("."))
    try:
        return len(parse_ip(host[1:-1])) == 16
    except ValueError:
        return False


class TLSFiles(NamedTuple):
    """Paths of PEM files; empty = not given. The CA alone is enough (unlike Go flannel, contract 3.4)."""

    ca: str = ""
    cert: str = ""
    key: str = ""


class TLS:
    """The TLS context built from the operator's files, and built again when a file changed (failures F28)."""

    def __init__(self, files: TLSFiles) -> None:
        """Note the files; nothing is read before ``context`` is asked for.

        Raises:
            UsageError: a certificate without its key or the reverse.
        """
        if bool(files.cert) != bool(files.key):
            given, missing = ("--etcd-certfile", "--etcd-keyfile")[:: 1 if files.cert else -1]
            raise UsageError(f"{given} is given without {missing}: a client certificate needs both files")
        self.files = files
        self._context: ssl.SSLContext | None = None
        self._stamps: list[object] = []
        self._bad_stamps: list[object] = []

    def context(self) -> ssl.SSLContext:
        """The context for a new connection.

        Raises:
            ConfigError: the files cannot be used and never could; once they could, the old ones stay in use
                while somebody is half-way through replacing them.
        """
        stamps = [_stamp(path) for path in self.files if path]
        if self._context is not None and stamps in (self._stamps, self._bad_stamps):
            return self._context
        try:
            context = _build(self.files)
        except ConfigError as exc:
            if self._context is None:
                raise
            self._bad_stamps = stamps
            log.error("etcd certificates cannot be re-read, the old ones stay in use reason=%s", exc)
            return self._context
        if self._context is not None:
            log.info("etcd certificates re-read files=%s", ",".join(path for path in self.files if path))
        self._context, self._stamps, self._bad_stamps = context, stamps, []
        return context

    def reload(self) -> None:
        """Read the files at once (SIGHUP), even where size and time look unchanged."""
        if self._context is not None:
            self._stamps = self._bad_stamps = [None]
            self.context()


def _stamp(path: str) -> object:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _build(files: TLSFiles) -> ssl.SSLContext:
    # load_cert_chain and create_default_context name no file in their errors, so each is opened first
    for flag, path in zip(("--etcd-cafile", "--etcd-certfile", "--etcd-keyfile"), files, strict=True):
        if path:
            _check_readable(flag, path)
    try:
        # without a CA file: the system's roots
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=files.ca or None)
    except ssl.SSLError as exc:
        raise ConfigError(f"--etcd-cafile {files.ca} is not a PEM file with CA certificates: {_reason(exc)}") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if files.cert:
        _load_pair(context, files)
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as exc:
        raise ConfigError(f"{flag} {path} cannot be read: {exc.strerror}") from exc


def _load_pair(context: ssl.SSLContext, files: TLSFiles) -> None:
    try:
        # an empty password makes an encrypted key fail; without it OpenSSL would ask on the terminal
        context.load_cert_chain(files.cert, files.key, password="")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            message = f"--etcd-keyfile {files.key} is not the key of --etcd-certfile {files.cert}"
        else:
            message = (
                f"--etcd-certfile {files.cert} and --etcd-keyfile {files.key} are not a PEM certificate "
                f"with its unencrypted key: {_reason(exc)}"
            )
        raise ConfigError(message) from exc


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or "not PEM").replace("_", " ").lower()
