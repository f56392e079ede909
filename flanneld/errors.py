"""Every error this project raises on purpose, sorted by whose fault it is and what follows.

::

    FlannelError
    ├── ConfigError      the operator's input is wrong: one sentence, no retry
    │   └── UsageError   … on the command line or in FLANNELD_*: exit status 2
    ├── PeerDataError    a peer published something unusable: skip that peer, note it once
    ├── Unavailable      a server did not answer or is not ready: retry with back-off
    ├── LeaseLost        somebody else owns what we thought was ours: re-claim or quarantine
    │   └── LeaseMoved   … and we were given another subnet: begin anew with that
    └── KernelError      the kernel refused one operation: carried in that op's result

Anything else that surfaces is a defect and ends the process. Errors are translated once, at the edge
(``kernel/``, ``sources/``), with ``raise … from``; above it nobody sees an errno or a gRPC status.
The text of each error is one sentence for the operator: it names the input and the remedy.
"""

from __future__ import annotations

import os


class FlannelError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(FlannelError):
    """Operator input (network config, file, flag combination) that can never work as given."""


class UsageError(ConfigError):
    """A wrong flag or environment variable; the process ends with status 2."""


class PeerDataError(FlannelError):
    """A key or value that a peer published and that cannot be used; harms that peer only."""


class Unavailable(FlannelError):
    """A server (etcd) cannot be reached or cannot answer now; the caller retries."""


class LeaseLost(FlannelError):
    """Our subnet's key belongs to another host now."""


class LeaseMoved(LeaseLost):
    """Whoever names subnets gave us another one; the daemon begins anew with it."""


class KernelError(FlannelError):
    """The kernel refused an operation.

    Args:
        what: the operation in words, e.g. ``add route 10.5.2.0/24``.
        code: the errno, positive; 0 when the cause is not an errno.
        detail: the kernel's own message (extended ACK) or a remedy; may be empty.
    """

    def __init__(self, what: str, code: int, detail: str = "") -> None:
        reason = os.strerror(code) if code else "failed"
        super().__init__(f"{what}: {reason}" + (f" ({detail})" if detail else ""))
        self.what = what
        self.code = code
        self.detail = detail
