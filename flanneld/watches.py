"""What is told and not repaired: it is the operator's to decide, another program's, or in the future.

Each watch is a class of its own in ``duties/`` with one remark; what is ours to repair is the reconcile loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any

from flanneld.contracts import DataPath, Store, Tunnel
from flanneld.duties.checksums import ChecksumWatch
from flanneld.duties.detours import DetourWatch
from flanneld.duties.expiry import ExpiryWatch
from flanneld.duties.foreign_drop import DropWatch, forwarded
from flanneld.duties.host_settings import HostSettings, hurting
from flanneld.duties.overlap import OverlapWatch
from flanneld.duties.room import RoomWatch
from flanneld.kernel.listen import RuleListener
from flanneld.kernel.ways import Ways
from flanneld.model.addr import IP
from flanneld.model.lease import LeaseTable
from flanneld.model.options import Options
from flanneld.problems import Problems
from flanneld.startup import Standing
from flanneld.wake import Wake


class Watches:
    """All watches of one daemon.

    Attributes:
        overlaps: to be shown each snapshot of the host, and each changed configuration.
        room: how many subnets are left; to be told of changed leases.
    """

    def __init__(
        self,
        options: Options,
        standing: Standing,
        store: Store,
        path: DataPath,
        table: LeaseTable,
        wake: Wake,
        problems: Problems,
    ) -> None:
        self._options, self._standing, self._path, self._wake = options, standing, path, wake
        self._remark = remark = problems.remark
        self.room = RoomWatch(table, lambda: standing.conf if store.allocates else None)
        self.overlaps = OverlapWatch(
            standing, path, remark("overlap"), allowed=options.allow_overlap, allocates=store.allocates
        )
        self._host_settings = HostSettings(
            partial(hurting, standing, path), remark("host settings"), hurting(standing, None).bad
        )
        self._detours = DetourWatch(path, Ways().past, remark("detours"))
        self._drops = DropWatch(partial(forwarded, standing, path), remark("drops"))

    def duties(self, up: asyncio.Event) -> Iterator[Coroutine[Any, Any, None]]:
        """Everything that has to run; call from the event loop.

        Args:
            up: set when what is ours is right for the first time.
        """
        options, remark = self._options, self._remark
        yield self.room.run()
        yield self._host_settings.run()
        yield self._drops.run(up)
        RuleListener(lambda: self._detours.wake("rules")).start()
        yield self._detours.run()
        if isinstance(self._path, Tunnel):
            yield ChecksumWatch(self._path, self._sources, self._wake, remark("checksums")).run()
        if not options.kube_subnet_mgr:
            yield ExpiryWatch(options.etcd_cafile, options.etcd_certfile, remark("certificates")).run()

    def _sources(self) -> list[IP]:
        """Addresses that tunnel packets are sent from."""
        ext, conf = self._standing.ext, self._standing.conf
        return [ip for family in conf.families() if (ip := ext.local(family)) is not None]
