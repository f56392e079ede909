"""What is told and not repaired: it is the operator's to decide, another program's, or in the future.

Each watch is a class of its own in ``duties/`` with one remark; what is ours to repair is the reconcile loop's.
Whatever happens to a watch, a defect in it included, costs what it would have told, never the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
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

log = logging.getLogger("flanneld")

AGAIN_S = 60.0
"""Until a watch that failed is tried again: most of what can go wrong is a limit of the host, which passes."""


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
        self._problems, remarks = problems, problems.remarks_of
        self.room = RoomWatch(table, lambda: standing.conf if store.allocates else None)
        self.overlaps = OverlapWatch(
            standing, path, remarks("overlap"), allowed=options.allow_overlap, allocates=store.allocates
        )
        self._host_settings = HostSettings(
            partial(hurting, standing, path), remarks("host settings"), hurting(standing, None).bad
        )
        self._drops = DropWatch(partial(forwarded, standing, path), remarks("drops"))

    def duties(self, up: asyncio.Event) -> Iterator[Coroutine[Any, Any, None]]:
        """Everything that has to run; call from the event loop.

        Args:
            up: set when what is ours is right for the first time.
        """
        options, problems = self._options, self._problems
        yield harmless("free subnets", self.room.run)
        yield harmless("settings of the host", self._host_settings.run)
        yield harmless("firewall rules of other programs", partial(self._drops.run, up))
        yield harmless("routing rules", self._watch_detours)
        if isinstance(self._path, Tunnel):
            watch = ChecksumWatch(self._path, self._sources, self._wake, problems.remark("checksums"))
            yield harmless("checksums", watch.run)
        if not options.kube_subnet_mgr:
            expiry = ExpiryWatch(options.etcd_cafile, options.etcd_certfile, problems.remarks_of("certificates"))
            yield harmless("certificates", expiry.run)

    async def _watch_detours(self) -> None:
        with contextlib.closing(Ways()) as ways:
            watch = DetourWatch(self._path, ways.past, self._problems.remarks_of("detours"))
            with contextlib.closing(RuleListener(lambda: watch.wake("rules"))) as listener:
                listener.start()
                await watch.run()

    def _sources(self) -> list[IP]:
        """Addresses that tunnel packets are sent from."""
        ext, conf = self._standing.ext, self._standing.conf
        return [ip for family in conf.families() if (ip := ext.local(family)) is not None]


async def harmless(what: str, watch: Callable[[], Coroutine[Any, Any, None]], *, again_s: float = AGAIN_S) -> None:
    """Run a watch; one that fails is told and begun again, a second failure of the same kind is not told.

    Args:
        what: it watches, for the log.
        watch: makes its coroutine.
        again_s: see ``AGAIN_S``.
    """
    told = ""
    while True:
        try:
            return await watch()
        except Exception as exc:  # see the module's first lines
            if repr(exc) != told:
                told = repr(exc)
                log.exception("%s cannot be watched now, everything else goes on; trying again", what)
        await asyncio.sleep(again_s)
