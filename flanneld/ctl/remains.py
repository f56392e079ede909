"""What one network has left on this host, item by item: finds it, and knows how each thing is removed.

Used by ``cleanup.py``; what belongs to whom is decided in ``plan/``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from backends.udp import DEVICE as TUN
from backends.udp_fast import find_leftovers
from flanneld.errors import KernelError
from flanneld.kernel.iptables import Iptables, Tool
from flanneld.kernel.nft import Nftables, remove_empty_table
from flanneld.kernel.rtnl import Rtnl
from flanneld.kernel.run import find
from flanneld.model.addr import Prefix
from flanneld.model.cni_conf import is_rendered
from flanneld.model.objects import Link
from flanneld.model.state import State
from flanneld.plan import cleanup
from flanneld.plan.cleanup import Scope
from flanneld.plan.diff import Op
from flanneld.plan.ownership import Ownership
from flanneld.plan.traffic_iptables import Remnant
from flanneld.plan.traffic_nft import TABLES
from flanneld.report.atomic import file_refused, leftovers
from flanneld.report.held_file import MAX_FOREIGN_FILE
from flanneld.report.own_file import read_file

REMEDY = "--network CIDR says which network is meant"


class Item(NamedTuple):
    """One thing to remove, or to change."""

    text: str
    remove: Callable[[], Awaitable[None]]
    """Raises ``FlannelError`` when it cannot be done."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What was found."""

    items: tuple[Item, ...] = ()
    left: tuple[str, ...] = ()
    """What looks like flannel's but stays, and why."""

    def __add__(self, other: Remains) -> Remains:
        return Remains(self.items + other.items, self.left + other.left)


async def learn(scope: Scope, kernel: Rtnl) -> Scope:
    """The scope with the networks that this host's tables tell of, when nobody else named one."""
    if scope.networks:
        return scope
    marked = {link.name for link in kernel.links().values() if link.alias == scope.alias}
    networks = cleanup.covering(kernel.routes(), marked)
    if not networks:
        blocks: set[Prefix] = set()
        for remnant in await _iptables(()):
            blocks |= remnant[1].blocks
        for named in (await _nft()).values():
            blocks |= named
        networks = cleanup.around(scope.subnets, blocks)
    return scope._replace(networks=networks)


# ---- the kernel's tables -------------------------------------------------------------------------------


async def in_kernel(scope: Scope, kernel: Rtnl) -> Remains:
    """Devices with all that is on them, routes, nexthop objects, and the udp backend's programs."""
    devices, states = await _look(scope, kernel)
    left = tuple(f"link {name}: it could be another network's; {REMEDY}" for name in devices.unclear)
    items: list[Item] = []
    if TUN in devices.ours or TUN not in kernel.links():
        items += (Item(text, _at_once(remove)) for text, remove in find_leftovers(TUN).items())
    told: set[str] = set()
    for own, observed in states:
        for op in cleanup.removal(observed, own):
            text = cleanup.describe(op, observed)
            if text not in told:
                items.append(Item(text, partial(_apply, kernel, [op])))
            told.add(text)
    return Remains(tuple(items), left)


async def to_hand_over(scope: Scope, kernel: Rtnl) -> Remains:
    """The same, but what Go flanneld takes over stays, in a shape that it keeps."""
    devices, states = await _look(scope, kernel)
    items: list[Item] = []
    if TUN in devices.ours:  # Go asks for another name when this one is taken (contract 6.48)
        return await in_kernel(scope, kernel)
    for link in states[0][1].links.values():
        if kernel.has_l2miss(link.name):
            text = f"make link {link.name} anew without l2miss, with all its entries: traffic stops for a moment"
            items.append(Item(text, partial(_remake, scope, kernel, link)))
    told: set[str] = set()
    for own, observed in states:
        for op in cleanup.handover(observed, own, defaults_of(devices.ours)):
            text = cleanup.describe_handover(op)
            if text not in told:
                items.append(Item(text, partial(_hand_over, kernel, op, own)))
            told.add(text)
    return Remains(tuple(items))


async def _look(scope: Scope, kernel: Rtnl) -> tuple[cleanup.Devices, list[tuple[Ownership, State]]]:
    routes = kernel.routes()
    devices = cleanup.find_devices(scope, kernel.links().values(), kernel.addresses(), routes)
    own = cleanup.ownership(scope, devices.ours)
    settings = defaults_of(devices.ours)
    owns = [own._replace(underlay=name) for name in cleanup.underlays(own, routes) or [""]]
    return devices, [(own, await kernel.read(own, settings)) for own in owns]


def defaults_of(devices: Iterable[str]) -> dict[str, str]:
    """By path below ``/proc/sys``, what the settings that we change are for a new device."""
    return {
        f"net/{version}/{kind}/{name}/{key}": value
        for version, kind, key in _SETTINGS
        if (value := _default(f"net/{version}/{kind}", key))
        for name in devices
    }


def _default(directory: str, key: str) -> str:
    for model in ("default", "lo"):  # network namespaces have no default of their own for neighbours
        with contextlib.suppress(OSError):
            return Path("/proc/sys", directory, model, key).read_text().strip()
    return ""


_SETTINGS = [
    (version, "neigh", key)
    for version in ("ipv4", "ipv6")
    for key in ("app_solicit", "ucast_solicit", "mcast_solicit", "unres_qlen_bytes")
] + [("ipv4", "conf", "arp_ignore"), ("ipv6", "conf", "accept_dad")]
"""``backends/vxlan.py`` says why; ``accept_ra`` is not among them, Go flanneld turns it off too (contract 6.13)."""


async def _apply(kernel: Rtnl, ops: Sequence[Op]) -> None:
    for failure in kernel.apply_now(ops):
        raise failure.error


async def _hand_over(kernel: Rtnl, op: Op, own: Ownership) -> None:
    kernel.use_plain_routes()
    await _apply(kernel, [op])


async def _remake(scope: Scope, kernel: Rtnl, link: Link) -> None:
    own = cleanup.ownership(scope, frozenset({link.name}))
    observed = await kernel.read(own, ())
    kernel.use_plain_routes()
    failures = kernel.remake(link, cleanup.remake(observed, link))
    await kernel.read(own, ())  # its nexthop objects are gone
    for failure in failures:
        raise failure.error


# ---- firewall ------------------------------------------------------------------------------------------


async def in_firewall(scope: Scope) -> Remains:
    """Rules of either tool, ours or Go flanneld's; those of another network stay."""
    items, left = [], []
    for table, blocks in (await _nft()).items():
        name = f"nftables table {' '.join(table)}"
        if why := _not_ours(scope, blocks):
            left.append(f"{name}: {why}")
        else:
            items.append(Item(name, partial(_remove_table, table)))
    for tool, remnant in await _iptables(scope.networks):
        text = f"{tool.prefix} {remnant.text}"
        if why := _not_ours(scope, remnant.blocks):
            left.append(f"{text}: {why}")
        elif remnant.payload:
            items.append(Item(text, partial(tool.restore, remnant.payload)))
            if remnant.is_alone and tool.variant == "nf_tables" and find("nft"):
                word = TABLES[tool.family][0]
                # it would go on taking every packet through connection tracking
                text = f"nftables table {word} {remnant.table}, which iptables made and which is empty then"
                items.append(Item(text, partial(_remove_if_empty, word, remnant.table)))
    return Remains(tuple(items), tuple(left))


def _not_ours(scope: Scope, blocks: frozenset[Prefix]) -> str:
    """Why rules that speak of some blocks stay; empty when they are ours, or nobody's."""
    if not blocks or any(network.covers(block) for network in scope.networks for block in blocks):
        return ""
    of = " and ".join(sorted(map(str, blocks)))
    return f"of {of}" if scope.networks else f"of {of}, which could be another network's; {REMEDY}"


async def _iptables(networks: Sequence[Prefix]) -> list[tuple[Tool, Remnant]]:
    with contextlib.closing(Iptables()) as tool:
        return await tool.remnants(networks)


async def _nft() -> dict[tuple[str, str], frozenset[Prefix]]:
    with contextlib.closing(Nftables()) as tool:
        return await tool.remnants()


async def _remove_if_empty(word: str, name: str) -> None:
    await remove_empty_table(word, name)


async def _remove_table(name: tuple[str, str]) -> None:
    with contextlib.closing(Nftables()) as tool:
        await tool.remove_table(name)


# ---- files ---------------------------------------------------------------------------------------------


def subnet_file(path: Path) -> Remains:
    """``subnet.env``, whoever wrote it; it tells CNI plugins of a subnet that is no more."""
    half = _half_written(path)
    try:
        is_ours = b"FLANNEL_" in read_file(path, MAX_FOREIGN_FILE)
    except OSError:
        return half
    if not is_ours:
        return half + Remains(left=(f"file {path}: it is no subnet file",))
    return Remains((_file(path),)) + half


def control_socket(path: Path) -> Remains:
    """What a killed daemon was asked through (``report/control.py``)."""
    return Remains((_file(path),)) if path.is_socket() else Remains()


def cni_file(path: Path) -> Remains:
    """The CNI configuration list, if nobody has changed it."""
    half = _half_written(path)
    try:
        raw = read_file(path, MAX_FOREIGN_FILE)
    except OSError:
        return half
    if not is_rendered(raw):
        return half + Remains(left=(f"file {path}: not as we write it",))
    return Remains((_file(path),)) + half


def _half_written(path: Path) -> Remains:
    """What a daemon left that was killed while it replaced a file."""
    own = len(f".{path.name}.12345678")  # longer ones are of another file whose name begins alike
    return Remains(tuple(_file(half) for half in leftovers(path.parent, path.name) if len(half.name) == own))


def state_files(directory: Path, stem: str) -> Remains:
    """This network's files in the state directory, and the machine's when no other network needs them.

    Args:
        directory: of the state.
        stem: what the names of this network's files begin with.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return Remains()
    of_machine = [name for name in names if name.partition(".")[0] in ("identity", "made-up-id")]
    of_machine += (path.name for kind in ("identity", "made-up-id") for path in leftovers(directory, kind))
    ours = [name for name in names if name.startswith(f"{stem}.")]
    ours += (path.name for path in leftovers(directory, stem))
    others = [name for name in names if name not in (*of_machine, *ours, "machine-id")]
    files = ours if others else [*ours, *of_machine]
    items = [_file(directory / name) for name in files]
    if items and len(files) == len(names):
        items.append(Item(f"directory {directory}", _at_once(partial(_rmdir, directory))))
    return Remains(tuple(items))


def _file(path: Path) -> Item:
    return Item(f"file {path}", _at_once(partial(_unlink, path)))


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise file_refused(f"remove {path}", exc) from exc


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as exc:
        raise KernelError(f"remove {path}", exc.errno or 0) from exc


def _at_once(action: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        action()
        await asyncio.sleep(0)

    return run
