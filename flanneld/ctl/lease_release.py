"""``flannelctl leases release`` and ``gc``: give subnets of hosts that are gone back to the network.

Shows first, and writes only with ``--yes``. Deletes a key only as it was read: a host that wrote it meanwhile keeps it.
One that lives makes its lease again within milliseconds (design/lease-protocol.md); a Go flanneld that lives ends
instead (contract 3.35), which is said before.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from flanneld.ctl.lease_view import TTL_S, View, duration, table
from flanneld.errors import ConfigError
from flanneld.model.plain import plain

FRESH_S = 600
"""A lease that was written within so many seconds is a living host's, for all anybody knows."""

BACK_S = 2.0
"""How long to look whether a released lease is made again; our daemons take a few milliseconds."""
LOOK_S = 0.2

NOTE = """\
Nothing was released: add --yes if {these} gone for good. A flanneld that lives leases its subnet again at once;
a Go flanneld that lives ends when its lease is deleted."""


class Keyed(Protocol):
    """Leases that are keys of a store."""

    async def remove(self, view: View) -> bool:
        """Delete a lease if it is as it was seen; tells whether it was."""
        ...

    async def present(self, views: Sequence[View]) -> list[View]:
        """Those of them whose key is there, whatever it holds."""
        ...


async def release(store: Keyed, views: Sequence[View], *, yes: bool) -> int:
    """Release leases, or only show which.

    Returns:
        The exit status: 0 when all are released, or nothing was asked for.

    Raises:
        ConfigError: one of them is a living host's by its age.
    """
    print(table(list(views)))
    if fresh := [view for view in views if _is_fresh(view)]:
        ages = ", ".join(f"{view.subnet_text()} {duration(TTL_S - (view.ttl_s or 0))} ago" for view in fresh)
        raise ConfigError(
            f"nothing was released: a host wrote {ages}, so it lives or did a moment ago; stop flanneld there, and try "
            f"again when {duration(FRESH_S)} have passed"
        )
    if not yes:
        print(NOTE.format(these="this host is" if len(views) == 1 else "these hosts are"), file=sys.stderr)
        return 0
    gone = [view for view in views if await store.remove(view)]
    back = await _come_back(store, gone)
    for view in views:
        print(plain(_outcome(view, is_gone=view in gone, is_back=view in back)))
    return 0 if len(gone) == len(views) and not back else 1


def _is_fresh(view: View) -> bool:
    return view.ttl_s is not None and TTL_S - FRESH_S < view.ttl_s <= TTL_S


async def _come_back(store: Keyed, gone: Sequence[View]) -> list[View]:
    back: Iterable[View] = ()
    for _ in range(round(BACK_S / LOOK_S) if gone else 0):
        await asyncio.sleep(LOOK_S)
        back = await store.present(gone)
        if len(list(back)) == len(gone):
            break
    return list(back)


def _outcome(view: View, *, is_gone: bool, is_back: bool) -> str:
    what = f"{view.subnet_text()} of {view.attrs.where()}"
    if not is_gone:
        return f"kept {what}: it was written or deleted meanwhile, look again"
    return f"back {what}: a host leased it at once, most likely its own, which lives" if is_back else f"released {what}"
