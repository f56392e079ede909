"""Watches the settings of our devices below /proc/sys."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from flanneld.contracts import DataPath
from flanneld.kernel.setting_files import SettingFiles
from flanneld.model.objects import Sysctl
from flanneld.plan.drift import Repair
from flanneld.wake import Wake, heard

LOOK_S = 1.0
"""Without any event we look all the same: a container's writes are not heard outside. A handful of files, 2 µs each."""
GAP_S = 0.02
"""Between two looks, however fast somebody writes."""


class SettingsWatch:
    """Has the loop put a setting right that somebody changed.

    What stays wrong, as in a container with a read-only /proc/sys, is a reason less and less often.

    Args:
        path: whose settings.
        damaged: called with a setting that was right and is not any more, and with what it is now.
        wake: called when one is wrong that was not right before.
    """

    def __init__(self, path: DataPath, damaged: Callable[[Sysctl, Sysctl], None], wake: Wake) -> None:
        self._path, self._damaged, self._wake = path, damaged, wake
        self._files = SettingFiles()
        self._changed = asyncio.Event()
        self._right: set[str] = set()
        self._wrong: dict[str, str] = {}
        self._times = 0
        """How many looks have found just this."""

    async def run(self) -> None:
        """Look for ever."""
        pause_s = GAP_S
        with contextlib.closing(self._files):
            while True:
                self._changed.clear()
                self._files.listen(self._changed.set)  # before the look: what is written after it is heard
                began = time.monotonic()
                # what is not there comes with its device, which is being made: nothing is heard of that
                pause_s = LOOK_S if self.look() else min(2 * pause_s, LOOK_S)
                if await heard(self._changed, pause_s):
                    await asyncio.sleep(max(0.0, began + GAP_S - time.monotonic()))

    def note(self, repair: Repair) -> None:
        """Take into account what was repaired, by this watch's doing or another's."""
        if repair.kind == "link":
            self._changed.set()  # a device that was made anew has other files
        elif repair.kind == "sysctl":
            self._right.add(str(repair.about[1]))  # wrong again at the next look, it was changed again

    def look(self) -> bool:
        """Compare once; tells whether there are all settings that we want."""
        wanted, right, wrong = self._path.desired.sysctls, set(), {}
        self._files.keep(wanted)
        for path, value in wanted.items():
            found = self._files.read(path)
            if found == value:
                right.add(path)
            elif found is not None:
                wrong[path] = found
        damaged = wrong.keys() & self._right
        for path in damaged:
            self._damaged(Sysctl(path, wanted[path]), Sysctl(path, wrong[path]))
        self._times = self._times + 1 if wrong == self._wrong else 1
        self._right, self._wrong = right, wrong
        if wrong.keys() - damaged and self._times.bit_count() == 1:  # after 1, 2, 4, … looks: it may never succeed
            self._wake("settings")
        return len(right) + len(wrong) == len(wanted)
