"""``flannelctl leases``: who holds which subnet. Only reads.

It asks etcd for one list, and for each lease how long it still lives; the daemon never does the latter.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from flanneld.cli_flags import ETCD_FLAGS, etcd_options
from flanneld.ctl.lease_view import View, as_json, details, mark_own, order, table
from flanneld.errors import ConfigError, UsageError
from flanneld.flag_values import choice, something
from flanneld.goflags import Flag, from_environment, scan, usage
from flanneld.kernel.place import place
from flanneld.model.addr import IP, Prefix, parse_ip
from flanneld.model.options import EtcdOptions, Options
from flanneld.report.state_dir import known_identity
from flanneld.sources.etcd_client import KV, Compacted, Credentials, EtcdClient, TLSFiles, parse_endpoints
from flanneld.sources.etcd_leases import Keys

TTL_REQUESTS_AT_ONCE = 16
"""So that a list of 5000 leases does not make etcd drop others' requests."""

HEAD = """\
usage: flannelctl leases [list] [flags]          all leases, ours with a star
       flannelctl leases show SUBNET|HOST        one: by its subnet, any address in it, or its host's address or name
       flannelctl leases watch [flags]           all leases, then each change, until interrupted

Flags and FLANNELD_ETCD_* variables are those of flanneld."""

OUTPUT = Flag("o", choice("table", "json"), "form of the output, table or json", "FORMAT", target="output", env=False)
STATE_DIR = Flag("state-dir", something, "flanneld's state directory, tells which lease is ours", "DIR")
FLAGS = (*ETCD_FLAGS, STATE_DIR, OUTPUT)


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
    if action == "watch":
        asyncio.run(_watch(options, own, _print_change if as_text else _print_change_json))
    elif action == "show":
        asyncio.run(_show(options, own, words[0], as_text))
    else:
        asyncio.run(_list(options, own, as_text))
    return 0


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


async def _list(options: EtcdOptions, own: Ownership, as_text: bool) -> None:
    async with _client(options) as client:
        views = await _views(client, options, own)
    if not as_text:
        print(json.dumps([as_json(view) for view in views], indent=2))
    elif views:
        print(table(views))
        for view in views:
            if view.problem:
                print(f"! {view.problem}", file=sys.stderr)
    else:
        print("no leases", file=sys.stderr)


async def _show(options: EtcdOptions, own: Ownership, what: str, as_text: bool) -> None:
    targets = await _targets(what)
    async with _client(options) as client:
        views = await _views(client, options, own, lambda view: any(view.holds(target) for target in targets))
    if not views:
        raise ConfigError(f"no lease is for {what}: `flannelctl leases list` shows all")
    if as_text:
        print("\n\n".join(map(details, views)))
    else:
        print(json.dumps([as_json(view) for view in views], indent=2))


async def _watch(options: EtcdOptions, own: Ownership, show: Callable[[str, View], None]) -> None:
    prefix = Keys(options.etcd_prefix).subnets.encode()
    known: dict[bytes, View] = {}

    def put(kv: KV) -> None:
        view = own.mark(_view(kv, prefix))
        before = known.get(kv.key)
        known[kv.key] = view
        if before is None or (before.attrs, before.problem) != (view.attrs, view.problem):
            show("changed" if before else "added", view)
        elif before.revision != view.revision:
            show("renewed", view)

    def drop(key: bytes) -> None:
        if view := known.pop(key, None):
            show("removed", view)

    async with _client(options) as client:
        while True:
            listing = await client.list(prefix)
            for key in known.keys() - {kv.key for kv in listing.kvs}:
                drop(key)
            for kv in listing.kvs:
                put(kv)
            try:
                async with aclosing(client.watch(prefix, prefix=True, start_revision=listing.revision + 1)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            drop(event.kv.key) if event.deleted else put(event.kv)
            except Compacted:
                continue  # too long without etcd: its history is gone, so compare with a new list


async def _views(
    client: EtcdClient, options: EtcdOptions, own: Ownership, wanted: Callable[[View], bool] = lambda _: True
) -> list[View]:
    """The leases that are wanted, with their time to live."""
    prefix = Keys(options.etcd_prefix).subnets.encode()
    views = [own.mark(_view(kv, prefix)) for kv in (await client.list(prefix)).kvs]
    views = [view for view in views if wanted(view)]
    lives = await _times_to_live(client, {view.ttl_id for view in views if view.ttl_id})
    return sorted((view._replace(ttl_s=lives.get(view.ttl_id)) for view in views), key=order)


async def _times_to_live(client: EtcdClient, ids: Iterable[int]) -> dict[int, int]:
    turn = asyncio.Semaphore(TTL_REQUESTS_AT_ONCE)

    async def ask(lease: int) -> tuple[int, int]:
        async with turn:
            return lease, await client.time_to_live(lease)

    # gather, because its first error is the one sentence that the operator gets, not a group of them
    return dict(await asyncio.gather(*(ask(lease) for lease in ids)))


def _view(kv: KV, prefix: bytes) -> View:
    return View.of(kv.key.removeprefix(prefix).decode("utf-8", "backslashreplace"), kv.value, kv.lease, kv.mod_revision)


@asynccontextmanager
async def _client(options: EtcdOptions) -> AsyncIterator[EtcdClient]:
    user = options.etcd_username
    client = EtcdClient(
        parse_endpoints(options.etcd_endpoints),
        TLSFiles(options.etcd_cafile, options.etcd_certfile, options.etcd_keyfile),
        Credentials(user, options.etcd_password) if user and options.etcd_password else None,
    )
    try:
        yield client
    finally:
        await client.close()


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
    print(f"{clock} {what:<8}{mark} {view.subnet_text():<18} {where}".rstrip(), flush=True)


def _print_change_json(what: str, view: View) -> None:
    print(json.dumps({"event": what, **as_json(view)}), flush=True)
