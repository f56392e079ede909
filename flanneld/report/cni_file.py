"""The CNI configuration list on the file system, held in place where container runtimes look for it.

What it says is ``model/cni_conf.py``'s business. Other files of the directory belong to others: they are never
touched, and one that runtimes prefer to ours is named in a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flanneld.model.cni_conf import is_rendered
from flanneld.report.held_file import HeldFile, Repaired

log = logging.getLogger(__name__)

_READ_BY_RUNTIMES = (".conf", ".conflist", ".json")
"""Source: libcni ``ConfFiles`` as containerd and CRI-O call it; they take the first by name."""


class CniFile(HeldFile):
    """The configuration list of this daemon. A file of the same name that is no work of ours is kept as ``….old``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "CNI configuration", lambda found: not is_rendered(found), on_disk=True)
        self._rival = ""

    async def hold(self, content: Callable[[], bytes | None], repaired: Repaired) -> None:
        """As ``HeldFile.hold``; and say once who else's configuration comes before ours."""

        def at_each_look() -> bytes | None:
            self._watch_rival()
            return content()

        await super().hold(at_each_look, repaired)

    def _watch_rival(self) -> None:
        rival = first_conf(self.path.parent)
        if rival >= self.path.name:
            rival = ""
        if rival and rival != self._rival:
            log.warning(
                "containers get another network: runtimes take the first file of %s, %s comes before %s; remove it "
                "or choose another --cni-conf-name, unless it passes pods on to ours",
                self.path.parent,
                rival,
                self.path.name,
            )
        self._rival = rival


def first_conf(directory: Path) -> str:
    """Name of the file in a CNI configuration directory that runtimes use; empty when there is none."""
    try:
        names = os.listdir(directory)
    except OSError:
        return ""
    return min((name for name in names if name.endswith(_READ_BY_RUNTIMES)), default="")
