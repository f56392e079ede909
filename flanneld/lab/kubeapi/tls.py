"""A certificate authority for the lab, in files. trustme makes the certificates; nothing else imports it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flanneld.errors import ConfigError
from flanneld.lab.spec import EXTRA

if TYPE_CHECKING:
    import trustme


class Certificates(NamedTuple):
    """Files a TLS server needs."""

    cert_file: Path
    """The server's certificate, or a chain, in PEM."""
    key_file: Path
    ca_file: Path
    """What signed it, and client certificates too."""

    def context(self) -> ssl.SSLContext:
        """For the server; a client may show a certificate of the same authority, and need not."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        context.load_verify_locations(self.ca_file)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


class Authority:
    """Signs certificates; its files go to a directory.

    Raises:
        ConfigError: trustme is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import trustme
        except ImportError as error:
            raise ConfigError(f"TLS of the lab needs trustme: {EXTRA}") from error
        self._authority: trustme.CA = trustme.CA(organization_name="flannel lab")
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file = directory / "ca.crt"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, *names: str, stem: str = "server") -> Certificates:
        """A server's certificate for these names and addresses; files ``STEM.crt`` and ``STEM.key``."""
        return self._write(self._authority.issue_cert(*names), stem)

    def issue_client(self, name: str) -> Certificates:
        """A client's certificate; the API takes its common name for the user."""
        return self._write(self._authority.issue_cert(f"{name}.client", common_name=name), name)

    def _write(self, leaf: trustme.LeafCert, stem: str) -> Certificates:
        cert_file, key_file = self._directory / f"{stem}.crt", self._directory / f"{stem}.key"
        key_file.touch(mode=0o600)
        leaf.private_key_pem.write_to_path(str(key_file))
        for number, pem in enumerate(leaf.cert_chain_pems):
            pem.write_to_path(str(cert_file), append=number > 0)
        return Certificates(cert_file, key_file, self.ca_file)
