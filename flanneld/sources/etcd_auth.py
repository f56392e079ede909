"""User and password for etcd, and the token they are exchanged for."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from grpclib.const import Status

from flanneld.errors import ConfigError
from flanneld.sources import etcd_pb2 as pb
from flanneld.sources.etcd_wire import Broken, Method, Refused, Wire

log = logging.getLogger(__name__)

_AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)


class Credentials(NamedTuple):
    """An etcd user; printing it never shows the password."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r})"


class Tokens:
    """The current token: fetched when first needed, and again after etcd stopped taking it.

    A token serves every member and every connection. etcd forgets it after some minutes without use, and all of
    them when its members restart; JWT tokens end at a fixed time. None of this is announced, so it is simply
    tried and replaced when refused.
    """

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._token: str | None = None if credentials else ""
        self._fetching = asyncio.Lock()

    @property
    def who(self) -> str:
        """Who we are to etcd, for sentences."""
        return f"user {self._credentials.username}" if self._credentials else "us (no --etcd-username is given)"

    async def metadata(self, wire: Wire, timeout_s: float) -> dict[str, str]:
        """What to send along with a call; asks the member for a token when there is none.

        Raises:
            ConfigError: etcd does not know this user and password.
            Broken: the member cannot say.
        """
        if self._token is None:
            try:
                # one password check, which costs etcd 100 ms, for all who wait
                async with asyncio.timeout(timeout_s), self._fetching:
                    if self._token is None:
                        self._token = await self._fetch(wire, timeout_s)
            except TimeoutError as exc:
                raise Broken(wire.endpoint, f"no token within {timeout_s:.1f} s") from exc
        return {"token": self._token} if self._token else {}

    def refused(self, metadata: dict[str, str]) -> None:
        """Note that etcd did not take what ``metadata`` gave.

        Raises:
            ConfigError: there is no user to try.
        """
        if self._credentials is None:
            raise ConfigError("etcd wants a user: give --etcd-username and --etcd-password")
        if self._token == metadata.get("token", ""):  # else somebody else has fetched a new one already
            self._token = None

    async def _fetch(self, wire: Wire, timeout_s: float) -> str:
        if self._credentials is None:
            return ""
        request = pb.AuthenticateRequest(name=self._credentials.username, password=self._credentials.password)
        try:
            reply = await wire.call(_AUTHENTICATE, request, timeout_s=timeout_s, metadata={})
        except Refused as exc:
            if exc.status is Status.FAILED_PRECONDITION:
                log.warning("etcd has authentication switched off, --etcd-username is not used")
                return ""
            if exc.status in (Status.INVALID_ARGUMENT, Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
                raise ConfigError(
                    f"etcd refused {self.who}: check --etcd-username and --etcd-password ({exc.message})"
                ) from exc
            raise
        if not (reply.token.isascii() and reply.token.isprintable()):
            raise Broken(wire.endpoint, "it gives a token that cannot be sent back to it: is it an etcd?")
        return reply.token
