"""Watches the settings of our devices below /proc/sys: the kernel announces their change to nobody."""

from __future__ import annotations

import asyncio

from flanneld.contracts import DataPath
from flanneld.errors import KernelError
from flanneld.kernel import procfs
from flanneld.wake import Wake

LOOK_S = 1.0
"""A handful of files, 10 µs each."""


class SettingsWatch:
    """Has the loop look when a setting is not as we want it.

    What stays wrong, as in a container with a read-only /proc/sys, is a reason less and less often.
    """

    def __init__(self, path: DataPath, wake: Wake) -> None:
        self._path, self._wake = path, wake
        self._wrong: dict[str, str] = {}
        self._times = 0
        """How many looks have found just this."""

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Compare once."""
        wrong = {}
        for path, wanted in self._path.desired.sysctls.items():
            try:
                found = procfs.read(procfs.PROC_SYS / path)
            except KernelError:
                continue  # a full look tells
            if found not in (None, wanted):
                wrong[path] = found or ""
        self._times = self._times + 1 if wrong == self._wrong else 1
        self._wrong = wrong
        if wrong and self._times.bit_count() == 1:  # after 1, 2, 4, … looks: somebody may break it again and again
            self._wake("settings")
