"""The file in the state directory that holds the network as this host last saw it.

Convenience, as all of that directory: a file that is lost, cut short, damaged or another machine's costs a
line and a start that waits for the store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from flanneld.errors import KernelError
from flanneld.model import remembered
from flanneld.model.lease import Lease
from flanneld.model.remembered import Header, Remembered
from flanneld.report.atomic import write_atomic
from flanneld.report.state_file import set_aside

log = logging.getLogger(__name__)


class LeaseCache:
    """What one host remembers of one network.

    Args:
        path: the file.
        network_id: which network, ``Options.network_id``.
        identity: who we are.
    """

    def __init__(self, path: Path, network_id: str, identity: str) -> None:
        self._path, self.network_id, self.identity = path, network_id, identity
        self._told = ""

    def recall(self) -> Remembered | None:
        """The network as last seen; None = nothing known, or nothing that can be used."""
        try:
            found = remembered.decode(self._path.read_bytes())
            if found.header.network != self.network_id:
                raise ValueError(f"it belongs to the network {found.header.network!r}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as exc:
            set_aside(self._path, str(exc))
            return None
        if found.header.identity != self.identity:
            log.warning("the memory of leases is another machine's (copied or cloned), not used path=%s", self._path)
            return None
        return found

    def keep(self, header: Header, leases: Mapping[str, Lease]) -> None:
        """Keep the network as it is now. Waits for the disk: to be called in a thread.

        What the lease data says is for the daemon alone, so only its user may read it.
        """
        try:
            content = b"".join(remembered.encode(header, leases))
            write_atomic(self._path, content, "the memory of leases", new_mode=0o600)
        except KernelError as exc:
            if self._told != str(exc):
                log.warning("leases cannot be remembered for a start without the store: %s", exc)
            self._told = str(exc)
        else:
            self._told = ""
