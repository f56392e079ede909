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
from flanneld.report.own_file import NotOurs, read_own
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
            found = remembered.decode(read_own(self._path, trusted=True))
            if found.header.network != self.network_id:
                raise ValueError(f"it belongs to the network {found.header.network!r}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NotOurs as exc:  # not set aside: where it is so by the file system's nature, each start would leave one
            log.warning(
                "the memory of leases is not used, for whoever writes it says where packets go: chown root and "
                "chmod 600 make it good again path=%s reason=%s",
                self._path,
                exc,
            )
            return None
        except remembered.Newer as exc:
            set_aside(self._path, str(exc), f"format-{exc.version}")
            return None
        except (OSError, ValueError) as exc:
            set_aside(self._path, str(exc))
            return None
        if found.header.identity != self.identity:
            log.warning("the memory of leases is another machine's (copied or cloned), not used path=%s", self._path)
            return None
        return found

    def keep(self, header: Header, leases: Mapping[str, Lease]) -> bool:
        """Keep the network as it is now; tells whether that succeeded. Waits for the disk: to be called in a thread.

        What the lease data says is for the daemon alone, so only its user may read it.
        """
        try:
            content = b"".join(remembered.encode(header, leases))
            write_atomic(self._path, content, "the memory of leases", mode=0o600)
        except KernelError as exc:
            if self._told != str(exc):
                log.warning("leases cannot be remembered for a start without the store: %s", exc)
            self._told = str(exc)
            return False
        if self._told:
            log.info("leases are remembered again path=%s", self._path)
        self._told = ""
        return True
