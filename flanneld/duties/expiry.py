"""Watches for the end of the certificates that etcd is reached with (failures F28): the day they end is too late."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from flanneld.problems import Remarks
from flanneld.sources import cert_expiry

log = logging.getLogger("flanneld")

WARN_DAYS = 30
LOOK_S = 3600.0
"""Files may be replaced at any time; reading two costs less than a millisecond."""
TELL_EVERY_S = 86400.0


def _now() -> datetime:
    return datetime.now(UTC)


class ExpiryWatch:
    """Tells in time when the CA's or our client certificate ends: in status all the time, in the log once a day.

    Args:
        ca: file of ``--etcd-cafile``, or empty.
        cert: file of ``--etcd-certfile``, or empty.
        remark: where to tell.
    """

    def __init__(self, ca: str, cert: str, remark: Remarks, now: Callable[[], datetime] = _now) -> None:
        self._ca, self._cert, self._remark, self._now = ca, cert, remark, now
        self._told: datetime | None = None

    async def run(self) -> None:
        """Look for ever."""
        while self._ca or self._cert:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Look once."""
        said, now = list(self._ending()), self._now()
        self._remark(said)
        if not said:
            self._told = None
        elif self._told is None or (now - self._told).total_seconds() >= TELL_EVERY_S:
            log.warning("%s", "; ".join(said))
            self._told = now

    def _ending(self) -> Iterator[str]:
        if self._cert and (ends := cert_expiry.first_ends(Path(self._cert))):
            yield from self._sentence("our client certificate --etcd-certfile", self._cert, ends)
        if self._ca and (ends := cert_expiry.last_ends(Path(self._ca))):
            yield from self._sentence("the CA certificate --etcd-cafile", self._ca, ends)

    def _sentence(self, what: str, path: str, ends: datetime) -> Iterator[str]:
        days = (ends - self._now()).days
        if days < WARN_DAYS:
            when = "ended" if days < 0 else f"ends in {days} {'day' if days == 1 else 'days'},"
            yield f"{what} {path} {when} on {ends:%Y-%m-%d %H:%M} UTC: put its successor there, no restart is needed"
