"""Follows the external interface: its address, its MTU, whether it is up."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flanneld.contracts import DataPath
from flanneld.errors import ConfigError, KernelError
from flanneld.model.addr import format_ip
from flanneld.model.host import ExtIface, HostNet
from flanneld.plan.extiface import follow
from flanneld.problems import Problem
from flanneld.startup import Standing
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

LOOK_AGAIN_S = 5.0
"""While something is told that may end without a notification: routes of a device that goes down go silently."""


class UnderlayWatch:
    """Follows the external interface's address and MTU (contract 5.12 is what we do better).

    ``seen`` is shown each snapshot; it answers whether to look again soon without being told.
    """

    def __init__(
        self,
        read: Callable[[], HostNet],
        standing: Standing,
        path: DataPath,
        changed: Callable[[ExtIface], None],
        problem: Problem,
        seen: Callable[[HostNet], bool] = lambda _: False,
    ) -> None:
        self._read, self._standing, self._path = read, standing, path
        self._seen, self._again = seen, False
        self._changed = changed
        self._problem = problem
        self.wake = Wake()

    async def run(self, then: Wake) -> None:
        """Look whenever something about the underlay changed, then hand the reason on."""
        while True:
            reasons = await self.wake.wait(LOOK_AGAIN_S if self._again else None)
            self.look()
            for name in reasons.names:
                then(name)

    def look(self) -> None:
        """Take the interface as it is now."""
        standing = self._standing
        before = standing.ext
        try:
            net = self._read()
            self._again = self._seen(net)
            ext = follow(before, net, standing.wish, standing.conf.families())
        except (KernelError, ConfigError) as exc:
            self._problem(f"external interface {before.name}: {exc}")
            return
        if ext is None:
            self._problem(f"external interface {before.name} is away or has no address")
            return
        link = net.link(ext.name)
        self._problem(None if link and link.up else f"external interface {ext.name} is down or has no carrier")
        if ext == before:
            return
        try:
            standing.backend.mtu(ext)
            self._path.configure(ext)
        except ConfigError as exc:
            self._problem(f"external interface {ext.name}: {exc}")
            log.error("external interface changed and cannot be used: %s", exc)
            return
        log.info("external interface changed: %s; it was %s", _brief(ext), _brief(before))
        self._changed(ext)


def _brief(ext: ExtIface) -> str:
    addresses = ",".join(format_ip(ip) for ip in (ext.ip, ext.ip6) if ip)
    public = ",".join(format_ip(ip) for ip in (ext.public_ip, ext.public_ip6) if ip)
    return f"{ext.name} index={ext.ifindex} addresses={addresses} public={public} mtu={ext.mtu}"
