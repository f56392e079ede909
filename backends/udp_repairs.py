"""When the udp backend looks into the maps of its programs, and how often it undoes what others do.

The kernel announces no change of a map. What tells is a packet that comes to the pump although its peer is in the
maps: its entry is gone, or was written by somebody else, which its seal shows to the program. What only admits packets
is found by looking now and then. A look costs a system call a map and a comparison of bytes, while nothing has changed
(5000 peers: 3 ms).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from flanneld.contracts import Surroundings
from flanneld.errors import KernelError
from flanneld.plan import fights
from flanneld.plan.fights import Fights
from flanneld.problems import Notices

log = logging.getLogger("flanneld.udp")

LOOK_S = 0.25
"""Between two looks at the maps without any reason."""
SHARE = 0.005
"""Longest share of one processor that looks may take: with thousands of peers they come less often."""
STRAY_SHARE = 0.05
"""The same for looks that packets ask for, as long as such looks find something."""
GAP_S = 0.005
"""The shortest time between two of them."""


class Repairs:
    """Tells of repairs, and holds back those that another program undoes again and again.

    Args:
        around: whom to tell.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._fights = Fights()
        self._fought: dict[str, str] = {}
        self._notices = Notices(log, around.remark)
        self._again: asyncio.TimerHandle | None = None

    def may(self, about: str) -> bool:
        """Whether to repair something now; counts it if so. If not, the reconcile loop looks when it is time."""
        now = self._loop.time()
        may = self._fights.may_repair(about, now)
        if self._fights.is_fight(about) and about not in self._fought:
            self._fought[about] = (
                f"another program changes the udp data path's {about} again and again, so they are put right only "
                f"every {fights.FIGHT_S:.0f} to {fights.GAP_S[1]:.0f} s: stop that program"
            )
            self._notices.say(self._fought.values())
        if not may and self._again is None:
            self._again = self._loop.call_later(self._fights.wait_s(about, now), self._look_again)
        return may

    def tell(self, text: str) -> None:
        """Something was repaired."""
        log.warning("%s", text)
        self._around.repaired(text)

    def settle(self) -> None:
        """Find out which fights are over; now and then."""
        for about in self._fights.settle(self._loop.time()):
            self._fought.pop(str(about), None)
        self._notices.say(self._fought.values())

    def close(self) -> None:
        """Nothing is told any more."""
        if self._again is not None:
            self._again.cancel()

    def _look_again(self) -> None:
        self._again = None
        self._around.look("udp data path")


class Maps(Protocol):
    """What is looked at; see ``FastPath``."""

    def is_filled(self) -> bool:
        """Whether all entries are as they should be."""
        ...

    def mend(self) -> int:
        """Put them right; how many were wrong."""
        ...


class MapWatch:
    """Looks into the maps: now and then, and when a packet came the slow way.

    Args:
        maps: what to look at.
        repairs: who decides and tells.
        armed: called after each look: the next such packet is to call ``stray``.
        failed: called when the kernel cannot be asked; ``look`` raises what it says.
    """

    def __init__(self, maps: Maps, repairs: Repairs, armed: Callable[[], None], failed: Callable[[], None]) -> None:
        self._maps, self._repairs, self._armed, self._failed = maps, repairs, armed, failed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._is_asked = False
        """Whether a packet has asked for the next look."""
        self._stray_due = 0.0
        self._stray_pause_s = GAP_S

    @property
    def is_waiting(self) -> bool:
        """Whether there will be a look; not at first, and not after one that failed."""
        return self._timer is not None

    def stray(self) -> None:
        """A packet came the slow way that need not have; call from the event loop's thread."""
        self._is_asked = True
        self._look_at(max(self._stray_due, self._loop.time()))

    def look(self) -> None:
        """Look now, and repair.

        Raises:
            KernelError: refused; look again at will.
        """
        began = self._loop.time()
        wrong = not self._maps.is_filled() and self._repairs.may("maps") and self._maps.mend()
        self._repairs.settle()
        now = self._loop.time()
        cost_s = now - began
        pause_s, longest_s = max(GAP_S, cost_s / STRAY_SHARE), max(LOOK_S, cost_s / SHARE)
        # some take the slow way for a reason of theirs, as a pod's own tunnel does: these wait longer and longer
        in_vain = self._is_asked and not wrong
        self._stray_pause_s = min(2 * max(pause_s, self._stray_pause_s), longest_s) if in_vain else pause_s
        self._is_asked, self._stray_due = False, now + self._stray_pause_s
        self._look_at(now + longest_s)
        self._armed()
        if wrong:
            self._repairs.tell(f"restored {wrong} entries of the udp data path's maps: somebody had changed them")

    def close(self) -> None:
        """Look no more; what a thread of the pump says may still come."""
        self._is_closed = True
        self._forget()

    def _look_at(self, when: float) -> None:
        self._forget()
        if not self._is_closed:
            self._timer = self._loop.call_at(when, self._due)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        try:
            self.look()
        except KernelError:
            self._failed()
