"""Tells of settings of the host that hurt while the daemon runs: forwarding, source validation, br_netfilter.

They are the host's, as with Go flanneld: nothing is written here (failures, "owns only its own things"; F31).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

from flanneld.contracts import DataPath
from flanneld.kernel import procfs
from flanneld.kernel.listen import NetconfListener
from flanneld.problems import Notices, Remarks
from flanneld.startup import Standing
from flanneld.wake import heard

log = logging.getLogger("flanneld")

LOOK_S = 5.0
"""br_netfilter is not announced; half a dozen files."""
GAP_S = 0.05
"""Between two looks, however fast things change: each device that comes is announced as well."""


class Found(NamedTuple):
    """Sentences about the host's settings."""

    bad: list[str]
    """All that hurt, or may."""
    cut: list[str]
    """Those of them because of which containers are cut off."""


class HostSettings:
    """Says in the log when a setting becomes bad and when it is good again; in the status, what cuts containers off.

    Args:
        find: what is bad now.
        remark: what to say in the status.
        told: what the log has said already.
    """

    def __init__(self, find: Callable[[], Found], remark: Remarks, told: list[str]) -> None:
        self._find, self._notices = find, Notices(log, remark, told)

    async def run(self) -> None:
        """Look for ever."""
        changed = asyncio.Event()
        with contextlib.closing(NetconfListener(changed.set)) as listener:
            listener.start()
            while True:
                changed.clear()
                self.look()
                if await heard(changed, LOOK_S):
                    await asyncio.sleep(GAP_S)

    def look(self) -> None:
        """Compare with what was told."""
        found = self._find()
        self._notices.say(found.bad, remark=found.cut)


def hurting(standing: Standing, path: DataPath | None) -> Found:
    """What is bad now.

    Args:
        standing: families and external interface.
        path: whose devices containers' packets come in by; None before there is one.
    """
    families, ext = standing.conf.families(), standing.ext.name
    through = (sorted(path.own.devices) or [ext]) if path else []
    cut = procfs.forwarding_off(families, through)
    return Found([*cut, *procfs.may_hurt(families, ext, iptables=not standing.conf.nftables)], cut)
