"""``flannelctl leases``: who holds which subnet. Only reads.

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from flanneld.cli_flags import ETCD_FLAGS, etcd_options
from flanneld.ctl.kube_leases import KUBE_FLAGS, KubeLeases, kube_options
from flanneld.ctl.lease_view import View, as_json, details, mark_own, order, table
from flanneld.errors import ConfigError, UsageError
from flanneld.flag_values import choice, something
from flanneld.goflags import Flag, from_environment, scan, usage
from flanneld.kernel.place import place
from flanneld.model.addr import IP, Prefix, parse_ip
from flanneld.model.options import EtcdOptions, Options
from flanneld.model.plain import plain
from flanneld.report.state_dir import known_identity
from flanneld.sources.etcd_client import KV, Compacted, Credentials, EtcdClient, TLSFiles, parse_endpoints
from flanneld.sources.etcd_leases import Keys

TTL_REQUESTS_AT_ONCE = 16
"""So that a list of 5000 leases does not make etcd drop others' requests."""

HEAD = """\
usage: flannelctl leases [list] [flags]          all leases, ours with a star
       flannelctl leases show SUBNET|HOST        one: by its subnet, any address in it, or its host's address or name
       flannelctl leases watch [flags]           all leases, then each change, until interrupted

Flags and FLANNELD_* variables are those of flanneld; --kube-subnet-mgr shows the leases on Kubernetes nodes."""

OUTPUT = Flag("o", choice("table", "json"), "form of the output, table or json", "FORMAT", target="output", env=False)
STATE_DIR = Flag("state-dir", something, "flanneld's state directory, tells which lease is ours", "DIR")
FLAGS = (*ETCD_FLAGS, *KUBE_FLAGS, STATE_DIR, OUTPUT)


def main(argv: Sequence[str]) -> int:
    """Run ``flannelctl leases``; returns the exit status."""
    given = scan(argv, FLAGS, take_words=True)
    if given.help:
        print(usage(HEAD, FLAGS, Options()))
        return 0
    action, *words = given.words or ("list",)
    wanted = {"list": 0, "show": 1, "watch": 0}.get(action)
    if wanted is None:
        raise UsageError(f"there is no command leases {action!r}: use list, show or watch")
    if len(words) != wanted:
        raise UsageError("leases show takes one subnet or host" if wanted else f"leases {action} takes no words")
    options = etcd_options(given.values, os.environ)
    own = Ownership.of_this_machine(given.values, os.environ)
    as_text = given.values.get("output") != "json"
    kube = kube_options(given.values, os.environ)
    source: Source = KubeLeases(kube, os.environ) if kube.kube_subnet_mgr else EtcdLeases(options)
    if action == "watch":
        asyncio.run(_watch(source, Changes(own, _print_change if as_text else _print_change_json)))
    elif action == "show":
        asyncio.run(_show(source, own, words[0], as_text))
    else:
        asyncio.run(_list(source, own, as_text))
    return 0


class Source(Protocol):
    """Where leases are kept."""

    async def views(self, wanted: Callable[[View], bool]) -> list[View]:
        """All that are wanted, in any order."""
        ...

    async def follow(self, changes: Changes) -> None:
        """Tell of all, then of each change, for ever."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Ownership:
    """Tells which lease is this machine's."""

    def __init__(self, identity: str) -> None:
        self._identity = identity

    @staticmethod
    def of_this_machine(given: Mapping[str, object], environ: Mapping[str, str]) -> Ownership:
        """By the identity that flanneld keeps in its state directory, if it can be read."""
        values = {**from_environment(environ, (STATE_DIR,), given), **given}
        return Ownership(known_identity(Path(str(values.get("state_dir", Options().state_dir)), place())))

    def mark(self, view: View) -> View:
        """The same lease, marked if it is ours."""
        return mark_own(view, _is_local, self._identity)


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
    views = await _views(source, own, lambda _: True)
    if not as_text:
        print(json.dumps([as_json(view) for view in views], indent=2))
    elif views:
        print(table(views))
        for view in views:
            if view.problem:
                print(plain(f"! {view.problem}"), file=sys.stderr)
    else:
        print("no leases", file=sys.stderr)


async def _show(source: Source, own: Ownership, what: str, as_text: bool) -> None:
    targets = await _targets(what) if not isinstance(source, KubeLeases) else await _targets_or_node(what)
    views = await _views(source, own, lambda view: view.node == what or any(view.holds(target) for target in targets))
    if not views:
        raise ConfigError(f"no lease is for {what}: `flannelctl leases list` shows all")
    if as_text:
        print("\n\n".join(map(details, views)))
    else:
        print(json.dumps([as_json(view) for view in views], indent=2))


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


class EtcdLeases:
    """Leases in etcd; a ``Source``."""

    def __init__(self, options: EtcdOptions) -> None:
        user = options.etcd_username
        self._prefix = Keys(options.etcd_prefix).subnets.encode()
        self._client = EtcdClient(
            parse_endpoints(options.etcd_endpoints),
            TLSFiles(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile),
            Credentials(user, options.etcd_password) if user and options.etcd_password else None,
        )

    async def views(self, wanted: Callable[[View], bool]) -> list[View]:
        """See ``Source``; with their time to live."""
        views = [view for kv in (await self._client.list(self._prefix)).kvs if wanted(view := self._view(kv))]
        lives = await self._times_to_live({view.ttl_id for view in views if view.ttl_id})
        return [view._replace(ttl_s=lives.get(view.ttl_id)) for view in views]

    async def follow(self, changes: Changes) -> None:
        """See ``Source``."""
        client, prefix = self._client, self._prefix
        while True:
            listing = await client.list(prefix)
            changes.keep_only([self._name(kv) for kv in listing.kvs])
            for kv in listing.kvs:
                changes.put(self._name(kv), self._view(kv))
            try:
                async with aclosing(client.watch(prefix, prefix=True, start_revision=listing.revision + 1)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            if event.deleted:
                                changes.drop(self._name(event.kv))
                            else:
                                changes.put(self._name(event.kv), self._view(event.kv))
            except Compacted:
                continue  # too long without etcd: its history is gone, so compare with a new list

    async def close(self) -> None:
        """See ``Source``."""
        await self._client.close()

    async def _times_to_live(self, ids: Iterable[int]) -> dict[int, int]:
        turn = asyncio.Semaphore(TTL_REQUESTS_AT_ONCE)

        async def ask(lease: int) -> tuple[int, int]:
            async with turn:
                return lease, await self._client.time_to_live(lease)

        # gather, because its first error is the one sentence that the operator gets, not a group of them
        return dict(await asyncio.gather(*(ask(lease) for lease in ids)))

    def _name(self, kv: KV) -> str:
        return kv.key.removeprefix(self._prefix).decode("utf-8", "backslashreplace")

    def _view(self, kv: KV) -> View:
        return View.of(self._name(kv), kv.value, kv.lease, kv.mod_revision)


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
