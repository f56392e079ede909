"""Who asks, and what they may: bearer tokens, client certificates, and a table of rights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flanneld.lab.kubeapi import status

ADMIN_TOKEN, FLANNEL_TOKEN, NOBODY_TOKEN = "admin-token", "flannel-token", "nobody-token"  # a lab's
ANONYMOUS = "system:anonymous"
FLANNEL_USER = "system:serviceaccount:kube-flannel:flannel"
OPEN_PATHS = frozenset({"/version", "/healthz", "/livez", "/readyz"})
"""What a user without a token may ask for (01-version)."""

Right = tuple[str, str]
"""Verb and resource, such as ``("patch", "nodes/status")``; ``*`` stands for each."""

FLANNEL_RIGHTS: frozenset[Right] = frozenset({
    ("get", "pods"), ("get", "nodes"), ("list", "nodes"), ("watch", "nodes"), ("patch", "nodes/status"),
})  # fmt: skip
"""What the manifests grant (contract 9.2)."""


@dataclass
class Access:
    """Tokens and rights; both may be changed while the server runs."""

    tokens: dict[str, str] = field(
        default_factory=lambda: {ADMIN_TOKEN: "admin", FLANNEL_TOKEN: FLANNEL_USER, NOBODY_TOKEN: "nobody"}
    )
    """Bearer token → user."""
    rights: dict[str, frozenset[Right]] = field(
        default_factory=lambda: {"admin": frozenset({("*", "*")}), FLANNEL_USER: FLANNEL_RIGHTS}
    )

    def rotate(self, old: str, new: str) -> None:
        """Replace a token: the old one is refused from now on."""
        self.tokens[new] = self.tokens.pop(old)

    def user(self, headers: Mapping[str, str], certificate_name: str | None) -> str:
        """Who sends this request.

        Args:
            headers: of the request, names in lower case.
            certificate_name: common name of the client certificate that TLS has checked.

        Raises:
            Refused: the token is unknown (401).
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if token not in self.tokens:
                raise status.unauthorized()
            return self.tokens[token]
        return certificate_name or ANONYMOUS

    def may(self, user: str, verb: str, resource: str) -> bool:
        """Whether the table grants it."""
        rights = self.rights.get(user, frozenset())
        return bool(rights & {(verb, resource), ("*", resource), (verb, "*"), ("*", "*")})
