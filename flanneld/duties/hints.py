"""Turns kernel notifications into work for the reconcile loop."""

from __future__ import annotations

from collections.abc import Callable

from flanneld.contracts import DataPath
from flanneld.kernel.listen import Hint
from flanneld.model.objects import Address, KernelObject, Link, Neighbour
from flanneld.plan.drift import Entry, judge
from flanneld.wake import Wake

Damaged = Callable[[Entry, Entry | None], None]
"""Told of a wanted entry that is gone, and of what is there instead."""


class HintFilter:
    """Turns kernel notifications into work, dropping those that agree with what we want."""

    def __init__(
        self,
        path: DataPath,
        damaged: Damaged,
        wake: Wake,
        underlay: Wake,
        blame: Callable[[KernelObject, str], None] = lambda _obj, _who: None,
        who: Callable[[int], str] = lambda _port: "",
        offloads: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._damaged, self._wake, self._underlay = path, damaged, wake, underlay
        self._blame, self._who, self._offloads = blame, who, offloads

    def __call__(self, hint: Hint) -> None:
        """Judge one notification."""
        found = judge(
            hint.obj,
            new=hint.new,
            desired=self._path.desired,
            own=self._path.own,
            watch_routes=self._path.watches_routes,
            answer_is_right=self._path.answer_is_right,
        )
        if isinstance(found, str):
            (self._underlay if found.startswith("underlay") else self._wake)(found)
        elif found is None and isinstance(hint.obj, Link) and hint.obj.name in self._path.own.devices:
            self._offloads()  # what changed is not in the announcement
        elif found is not None:
            self._damaged(found, _instead(hint))
        if found is not None and hint.port and (who := self._who(hint.port)):
            self._blame(found if not isinstance(found, str) else hint.obj, who)


def _instead(hint: Hint) -> Entry | None:
    """What was announced in place of a wanted entry; None when that is only gone."""
    obj = hint.obj
    if not hint.new or isinstance(obj, Link | Address) or (isinstance(obj, Neighbour) and not obj.mac):
        return None
    return obj
