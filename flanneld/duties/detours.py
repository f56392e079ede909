"""Tells of routing rules of others that lead packets for peers past our routes.

Such a rule is somebody's decision and not ours to undo; whoever looks for the lost packets has to know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

from flanneld.contracts import DataPath
from flanneld.errors import KernelError
from flanneld.model.addr import Prefix
from flanneld.model.objects import Route, RouteKind
from flanneld.problems import Notices, Remarks
from flanneld.wake import Wake

log = logging.getLogger("flanneld")

LOOK_S = 60.0
"""Without any announcement of a changed rule: what a rule leads to may have changed."""
AGAIN_S = 0.5
"""What is found must be found twice: tables change while they are looked at. And while something is told."""
BLOCKS = 64
"""Looked up at a time, 5 µs each; the next look takes the next ones."""


class DetourWatch:
    """See above.

    Args:
        path: for the routes that we want.
        past: ``Ways.past``.
        remark: where a detour is shown while it lasts.
    """

    def __init__(
        self, path: DataPath, past: Callable[[Iterable[Prefix]], Mapping[Prefix, str]], remark: Remarks
    ) -> None:
        self._path, self._past = path, past
        self._notices = Notices(log, remark)
        self._suspects: dict[Prefix, str] = {}
        self._next = 0
        self.wake = Wake()

    async def run(self) -> None:
        """Look whenever rules change, and now and then, for ever."""
        while True:
            await self.wake.wait(AGAIN_S if self._suspects else LOOK_S)
            self.look()

    def look(self) -> None:
        """Ask the kernel once."""
        try:
            found = dict(self._past([*self._suspects, *self._sample()]))
        except KernelError as exc:
            log.debug("cannot look for detours: %s", exc)
            return
        certain = {block: how for block, how in found.items() if self._suspects.get(block) == how}
        self._suspects = dict(islice(found.items(), BLOCKS))
        self._notices.say([_sentence(certain)] if certain else [])

    def _sample(self) -> list[Prefix]:
        """Some of the blocks that our routes lead to: the peers', or where there are none of them, the network."""
        routes = [route for route in self._path.desired.routes if route.kind is RouteKind.UNICAST]
        blocks = list(dict.fromkeys(route.dst for route in _of_peers(routes) or routes))
        begin = self._next if self._next < len(blocks) else 0
        self._next = begin + BLOCKS
        return blocks[begin : begin + BLOCKS]


def _of_peers(routes: Iterable[Route]) -> list[Route]:
    return [route for route in routes if route.gateway]


def _sentence(found: Mapping[Prefix, str]) -> str:
    block, how = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"packets to {block}{more} {how}, by a routing rule of another program, and do not take our routes: remove the "
        "rule (see `ip rule`), or have it spare the cluster network"
    )
