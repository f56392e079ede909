"""``subnet.env`` on the file system: what an earlier run left there, and ours in its place (contract section 4).

Without the file no container starts on this host (failure F35), so it is held (``held_file.py``). What it says is
``model/subnet_env.py``'s business.
"""

from __future__ import annotations

from pathlib import Path

from flanneld.model.subnet_env import PreviousEnv, parse
from flanneld.report.held_file import MAX_FOREIGN_FILE, HeldFile
from flanneld.report.own_file import read_file


class SubnetFile(HeldFile):
    """The subnet file of this daemon."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "subnet file")

    def previous(self) -> PreviousEnv:
        """What an earlier run left there (contract 3.41); nothing when there is no readable file."""
        try:
            return parse(read_file(self.path, MAX_FOREIGN_FILE))
        except OSError:
            return PreviousEnv()
