"""``flannelctl leases``: who holds which subnet. Only reads; ``lease_release.py`` says what writes.

It asks etcd for one list, and for each lease how long it still lives; the daemon never does the latter. What is
different with Kubernetes stands in ``kube_leases.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from flanneld.cli_flags import DAEMON_FLAGS, ETCD_FLAGS, etcd_options
from flanneld.ctl.etcd_view import EtcdLeases
from flanneld.ctl.kube_leases import KUBE_FLAGS, KubeLeases, kube_options
from flanneld.ctl.lease_release import release
from flanneld.ctl.lease_view import View, as_json, details, late_line, mark_late, mark_own, order, table
from flanneld.errors import ConfigError, UsageError
from flanneld.flag_values import boolean, choice, something
from flanneld.goflags import Flag, from_environment, scan, usage
from flanneld.kernel.place import place
from flanneld.model.addr import IP, Prefix, parse_ip
from flanneld.model.options import Options
from flanneld.model.plain import plain
from flanneld.plan.allocate import Room
from flanneld.report.state_dir import known_identity

HEAD = """\
usage: flannelctl leases [list] [flags]          all leases, ours with a star
       flannelctl leases show SUBNET|HOST        one: by its subnet, any address in it, or its host's address or name
       flannelctl leases watch [flags]           all leases, then each change, until interrupted
       flannelctl leases release SUBNET|HOST ... give back what a host held that is gone; shows it, does it with --yes
       flannelctl leases gc [flags]              the same for all leases whose hosts did not renew them in time

Flags and FLANNELD_* variables are those of flanneld; --kube-subnet-mgr shows the leases on Kubernetes nodes."""

OUTPUT = Flag("o", choice("table", "json"), "form of the output, table or json", "FORMAT", target="output", env=False)
STATE_DIR = Flag("state-dir", something, "flanneld's state directory, tells which lease is ours", "DIR")
YES = Flag("yes", boolean, "release and gc: do it, instead of showing it", "", env=False)
MARGIN = next(flag for flag in DAEMON_FLAGS if flag.field == "renew_margin_s")._replace(
    about="flanneld's setting: a lease with less left than that is late"
)
FLAGS = (*ETCD_FLAGS, *KUBE_FLAGS, STATE_DIR, MARGIN, OUTPUT, YES)
ACTIONS = {"list": 0, "show": 1, "watch": 0, "release": None, "gc": 0}
"""How many words each takes; None = one or more."""


def main(argv: Sequence[str]) -> int:
    """Run ``flannelctl leases``; returns the exit status."""
    given = scan(argv, FLAGS, take_words=True)
    if given.help:
        print(usage(HEAD, FLAGS, Options()))
        return 0
    action, *words = given.words or ("list",)
    _check(action, words, writes=bool(given.values.get("yes")))
    options = etcd_options(given.values, os.environ)
    own = Ownership.of_this_machine(given.values, os.environ)
    as_text = given.values.get("output") != "json"
    kube = kube_options(given.values, os.environ)
    source: Source = KubeLeases(kube, os.environ) if kube.kube_subnet_mgr else EtcdLeases(options)
    if isinstance(source, EtcdLeases) and action in ("release", "gc"):
        return asyncio.run(_release(source, own, words, yes=bool(given.values.get("yes"))))
    if action in ("release", "gc"):
        raise UsageError("a lease on a Kubernetes node ends with the node: kubectl delete node NAME")
    if action == "watch":
        asyncio.run(_watch(source, Changes(own, _print_change if as_text else _print_change_json)))
    elif action == "show":
        asyncio.run(_show(source, own, words[0], as_text))
    else:
        asyncio.run(_list(source, own, as_text))
    return 0


def _check(action: str, words: Sequence[str], *, writes: bool) -> None:
    if action not in ACTIONS:
        raise UsageError(f"there is no command leases {action!r}: use {', '.join(ACTIONS)}")
    wanted = ACTIONS[action]
    if wanted is None and not words:
        raise UsageError("leases release takes the subnets or hosts whose leases are to be given back")
    if wanted is not None and len(words) != wanted:
        raise UsageError("leases show takes one subnet or host" if wanted else f"leases {action} takes no words")
    if writes and action not in ("release", "gc"):
        raise UsageError(f"leases {action} only reads: leave out --yes")


class Source(Protocol):
    """Where leases are kept."""

    async def views(self, wanted: Callable[[View], bool]) -> list[View]:
        """All that are wanted, in any order."""
        ...

    async def follow(self, changes: Changes) -> None:
        """Tell of all, then of each change, for ever."""
        ...

    async def room(self, views: Sequence[View]) -> Room | None:
        """How many subnets there are besides these leases; None where that cannot be said."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Ownership:
    """Tells which lease is this machine's, and which are late.

    Args:
        identity: this machine's; empty = not known.
        margin_s: how long before their end hosts renew their leases.
    """

    def __init__(self, identity: str, margin_s: float) -> None:
        self._identity, self._margin_s = identity, margin_s

    @staticmethod
    def of_this_machine(given: Mapping[str, object], environ: Mapping[str, str]) -> Ownership:
        """By the identity that flanneld keeps in its state directory, if it can be read."""
        values = {**from_environment(environ, (STATE_DIR, MARGIN), given), **given}
        identity = known_identity(Path(str(values.get("state_dir", Options().state_dir)), place()))
        return Ownership(identity, float(str(values.get("renew_margin_s", Options().renew_margin_s))))

    def mark(self, view: View) -> View:
        """The same lease, marked if it is ours, or late."""
        return mark_late(mark_own(view, _is_local, self._identity), self._margin_s)


class Changes:
    """What is known, and a word about each change of it."""

    def __init__(self, own: Ownership, show: Callable[[str, View], None]) -> None:
        self._own, self._show = own, show
        self._known: dict[str, View] = {}

    def put(self, key: str, view: View) -> None:
        """A lease is there, perhaps as before."""
        view = self._own.mark(view)
        before = self._known.get(key)
        self._known[key] = view
        if before is None or before[1:3] != view[1:3] or before.problem != view.problem:
            self._show("changed" if before else "added", view)
        elif before.revision != view.revision and not view.node:  # a node is written for many reasons
            self._show("renewed", view)

    def drop(self, key: str) -> None:
        """A lease is gone, if it was there."""
        if view := self._known.pop(key, None):
            self._show("removed", view)

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop all others."""
        for key in self._known.keys() - set(keys):
            self.drop(key)


async def _list(source: Source, own: Ownership, as_text: bool) -> None:
    try:
        views = sorted(map(own.mark, await source.views(lambda _: True)), key=order)
        rest = await source.room(views) if as_text else None
    finally:
        await source.close()
    if not as_text:
        print(json.dumps([as_json(view) for view in views], indent=2))
    elif views:
        print(table(views))
        for view in views:
            if view.problem:
                print(plain(f"! {view.problem}"), file=sys.stderr)
            elif view.is_late:
                print(plain(f"? {late_line(view)}"), file=sys.stderr)
    else:
        print("no leases", file=sys.stderr)
    if rest is not None:
        print(f"{rest.free} of {rest.total} subnets are free", file=sys.stderr)


async def _show(source: Source, own: Ownership, what: str, as_text: bool) -> None:
    targets = await _targets(what) if not isinstance(source, KubeLeases) else await _targets_or_node(what)
    views = await _views(source, own, lambda view: view.node == what or any(view.holds(target) for target in targets))
    if not views:
        raise ConfigError(f"no lease is for {what}: `flannelctl leases list` shows all")
    if as_text:
        print("\n\n".join(map(details, views)))
    else:
        print(json.dumps([as_json(view) for view in views], indent=2))


async def _release(source: EtcdLeases, own: Ownership, words: Sequence[str], *, yes: bool) -> int:
    """``release`` with words, ``gc`` without."""
    try:
        every = sorted(map(own.mark, await source.views(lambda _: True)), key=order)
        views = await _named(every, words) if words else [view for view in every if view.is_late]
        if views:
            return await release(source, views, yes=yes)
    finally:
        await source.close()
    print("every lease was renewed in time", file=sys.stderr)
    return 0


async def _named(every: Sequence[View], words: Sequence[str]) -> list[View]:
    """The leases that the operator named; not by an address of a pod, which is a slip of the finger from a host's."""
    named: dict[str, View] = {}
    for word in words:
        targets = await _targets(word)
        found = {view.name: view for view in every if any(view.is_leased_to(target) for target in targets)}
        if not found:
            raise ConfigError(f"nothing was released: no lease is of {word}, `flannelctl leases list` shows all")
        named |= found
    return list(named.values())


async def _watch(source: Source, changes: Changes) -> None:
    try:
        await source.follow(changes)
    finally:
        await source.close()


async def _views(source: Source, own: Ownership, wanted: Callable[[View], bool]) -> list[View]:
    try:
        return sorted((own.mark(view) for view in await source.views(wanted)), key=order)
    finally:
        await source.close()


async def _targets_or_node(what: str) -> list[Prefix | IP]:
    """The same, where what is no name of a host may be that of a node."""
    try:
        return await _targets(what)
    except ConfigError:
        return []


async def _targets(what: str) -> list[Prefix | IP]:
    """What the operator named, as a subnet or addresses."""
    try:
        return [Prefix.parse(what) if "/" in what else parse_ip(what)]
    except ValueError as error:
        if "/" in what:
            raise UsageError(str(error)) from error
    try:
        found = await asyncio.get_running_loop().getaddrinfo(what, None)
    except OSError as error:
        raise ConfigError(f"{what!r} is neither a subnet nor an address, and no host has that name") from error
    return [parse_ip(str(sockaddr[0])) for *_, sockaddr in found if "%" not in str(sockaddr[0])]


def _is_local(ip: IP) -> bool:
    """Whether an address is configured here: the kernel lets a socket bind to no other."""
    family = socket.AF_INET if len(ip) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((socket.inet_ntop(family, ip), 0))
    except OSError:
        return False
    return True


def _print_change(what: str, view: View) -> None:
    clock = time.strftime("%H:%M:%S")
    mark = "*" if view.is_own else " "
    where = view.problem or f"{view.attrs.where()} {view.attrs.backend_type} {view.mac()}"
    print(plain(f"{clock} {what:<8}{mark} {view.subnet_text():<18} {where}".rstrip()), flush=True)


def _print_change_json(what: str, view: View) -> None:
    print(json.dumps({"event": what, **as_json(view)}), flush=True)
