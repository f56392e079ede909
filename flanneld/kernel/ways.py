"""Asks the kernel where packets would go: past our routes, if a routing rule of another program says so.

It knows no rules: the kernel applies them. So what it finds is certain, and what depends on more than the destination
(marks, sources, interfaces) it does not find.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from flanneld.kernel import route_codec
from flanneld.kernel.nlsocket import Socket
from flanneld.model.addr import Prefix

RT_TABLE_UNSPEC, RT_TABLE_LOCAL = 0, 255
USUAL = frozenset({RT_TABLE_UNSPEC, route_codec.RT_TABLE_MAIN, RT_TABLE_LOCAL})
"""Tables of routes that no rule of anybody has led to."""

BY_RULE = frozenset({errno.EACCES, errno.EINVAL})
"""What *prohibit* and *blackhole* answer. Other errors are those of a route that is not there at the moment, too."""


class Ways:
    """Looks up blocks, on a socket of its own.

    Raises:
        KernelError: the kernel refuses the socket.
    """

    def __init__(self) -> None:
        self._sock = Socket()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def past(self, blocks: Iterable[Prefix]) -> dict[Prefix, str]:
        """Those of some blocks whose packets do not reach the main table, and what becomes of them, in words.

        A block is looked up by its second address; the first may be nobody's.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        asked = list(blocks)
        requests = [route_codec.lookup_route(block.host(min(1, block.size - 1))) for block in asked]
        found = {}
        for block, answer in zip(asked, self._sock.answers(requests), strict=True):
            if isinstance(answer, int):
                if answer in BY_RULE:
                    found[block] = f"are refused ({os.strerror(answer)})"
                continue
            table, index = route_codec.way_of(answer)
            if table not in USUAL:
                found[block] = f"go to table {table}, through {_name(index)}"
        return found


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"
