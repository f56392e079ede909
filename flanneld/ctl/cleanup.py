"""``flannelctl cleanup``: takes one network off this host, or leaves it to Go flanneld. Shows first what it would do.

The daemon itself never removes anything when it ends, so that pods go on (contract 0.4); this is for the day when
they shall not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from flanneld.cli_flags import DAEMON_FLAGS, ETCD_FLAGS, daemon_options
from flanneld.ctl import remains
from flanneld.ctl.remains import Item, Remains
from flanneld.errors import ConfigError, FlannelError, UsageError
from flanneld.flag_values import boolean, integer
from flanneld.goflags import Flag, scan, usage
from flanneld.kernel.place import place
from flanneld.kernel.rtnl import Rtnl
from flanneld.model import remembered
from flanneld.model.addr import Prefix, format_ip
from flanneld.model.lease_codec import decode_attrs, parse_key
from flanneld.model.netconf_parse import parse_netconf
from flanneld.model.options import Options
from flanneld.model.subnet_env import PreviousEnv
from flanneld.plan.cleanup import Scope
from flanneld.report import state_file
from flanneld.report.control import socket_path
from flanneld.report.state_dir import SUBNETS, StateDir, holder_of, known_identity
from flanneld.report.subnet_file import SubnetFile
from flanneld.startup import alias_of

HEAD = """\
usage: flannelctl cleanup [flags]

Removes from this host what flanneld made for one network: devices with all that is on them, routes, firewall rules,
eBPF programs, subnet.env and the CNI configuration. Nothing else: other networks and everybody's own things stay, and
so do bridges and containers. Shows it first and asks. The daemon must not run, but for --dry-run.

Say --etcd-prefix (or --kube-subnet-mgr) and --subnet-file as for the daemon; FLANNELD_* variables count too.
Ends with 0 when nothing is left, 1 when something is."""


def _network(text: str) -> Prefix:
    try:
        return Prefix.parse(text).masked()
    except ValueError as error:
        raise ValueError("use a block such as 10.244.0.0/16") from error


_SHARED = ("subnet-file", "state-dir", "kube-subnet-mgr", "kube-annotation-prefix", "cni-conf-dir", "cni-conf-name")
OWN_FLAGS = (
    Flag("network", _network, "the cluster network, when subnet.env is gone", "CIDR", repeated=True, env=False),
    Flag("vni", integer(1, (1 << 24) - 1), "take flannel.VNI for ours though nothing shows it", "VNI", env=False),
    Flag("dry-run", boolean, "only show what would be removed", "", env=False),
    Flag("yes", boolean, "do not ask", "", env=False),
    Flag("handover", boolean, "leave to Go flanneld what it takes over, remove the rest", "", env=False),
    Flag("lease", boolean, "give our subnet back: delete our lease from etcd", "", env=False),
    Flag("state", boolean, "remove our files in the state directory too", "", env=False),
    Flag("force", boolean, "go on although a daemon seems to run", "", env=False),
)
FLAGS = (*ETCD_FLAGS, *(flag for flag in DAEMON_FLAGS if flag.name in _SHARED), *OWN_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Run ``flannelctl cleanup``; returns the exit status."""
    given = scan(argv, FLAGS)
    if given.help:
        print(usage(HEAD, FLAGS, Options()))
        return 0
    own = {flag.field for flag in OWN_FLAGS}
    options = daemon_options({k: v for k, v in given.values.items() if k not in own}, _only(os.environ))
    wish = {k: v for k, v in given.values.items() if k in own}
    if wish.get("handover") and (wish.get("lease") or wish.get("state")):
        raise UsageError(
            "--handover keeps lease and state, which Go flanneld takes over: leave out --lease and --state"
        )
    if wish.get("lease") and options.kube_subnet_mgr:
        raise UsageError("--lease is for etcd: with Kubernetes the subnet goes when the node is deleted")
    if os.geteuid() != 0:
        raise ConfigError("cleanup changes the kernel's tables and so must run as root")
    return asyncio.run(_cleanup(options, wish))


def _only(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of our own flags: a wrong one of the daemon's others is not our business."""
    ours = {flag.variable for flag in FLAGS}
    return {name: value for name, value in environ.items() if name in ours}


async def _cleanup(options: Options, wish: Mapping[str, object]) -> int:
    state = StateDir(Path(options.state_dir, place()), options.network_id)
    changes = not wish.get("dry_run")
    alone = _alone(options, state, force=bool(wish.get("force"))) if changes else contextlib.nullcontext()
    with alone, contextlib.closing(Rtnl(tidies=changes)) as kernel:
        env, others = _subnet_env(options, state)
        scope = await remains.learn(_scope(options, wish, env, state), kernel)
        found = others + await _find(options, wish, scope, state, kernel, has_file=not others.left)
        return await _do(options.network_id, scope, found, wish)


def _subnet_env(options: Options, state: StateDir) -> tuple[PreviousEnv, Remains]:
    """What the subnet file tells of this network; nothing when it is another's, as after a mistake in the prefix."""
    path = Path(options.subnet_file)
    env = SubnetFile(path).previous()
    other = holder_of(state.path, state.network_id, [subnet for subnet in (env.subnet, env.subnet6) if subnet])
    if not other:
        return env, Remains()
    return PreviousEnv(), Remains(left=(f"file {path}: it is of the network {other}; --subnet-file names another",))


def _scope(options: Options, wish: Mapping[str, object], env: PreviousEnv, state: StateDir) -> Scope:
    named = wish.get("network")
    named = named if isinstance(named, tuple) else ()
    kept = state_file.peek(state.file(".json"), SUBNETS)
    texts = [text for text in (kept.subnet, kept.subnet6) if text] if kept else []
    vni = wish.get("vni")
    networks = [network for network in (env.network, env.network6) if network] or _remembered(state.file(".cache"))
    return Scope(
        alias_of(options),
        (*named, *networks),
        tuple({subnet for subnet in (env.subnet, env.subnet6, *map(Prefix.parse, texts)) if subnet}),
        frozenset({f"flannel.{vni}", f"flannel-v6.{vni}"}) if vni else frozenset(),
    )


def _remembered(path: Path) -> list[Prefix]:
    """The networks of the configuration that the daemon saw last, should subnet.env be gone."""
    try:
        conf = parse_netconf(remembered.decode(path.read_bytes()).header.config.encode(), allocates=False)
    except (OSError, ValueError, ConfigError):
        return []
    return [part.network for family in conf.families() if (part := conf.family(family))]


async def _find(
    options: Options, wish: Mapping[str, object], scope: Scope, state: StateDir, kernel: Rtnl, *, has_file: bool
) -> Remains:
    if wish.get("handover"):
        return await remains.to_hand_over(scope, kernel)
    found = await remains.in_kernel(scope, kernel) + await remains.in_firewall(scope)
    if has_file:
        found += remains.subnet_file(Path(options.subnet_file))
        found += remains.control_socket(socket_path(options.subnet_file))
    if has_file and options.cni_conf_dir:
        found += remains.cni_file(Path(options.cni_conf_dir, options.cni_conf_name))
    if wish.get("lease"):
        found += await _lease(options, scope, known_identity(state.path))
    if wish.get("state"):
        found += remains.state_files(state.path, state.file("").name)
    return found


# ---- the dialogue --------------------------------------------------------------------------------------


async def _do(network: str, scope: Scope, found: Remains, wish: Mapping[str, object]) -> int:
    blocks = " ".join(map(str, scope.networks)) or "no network known"
    handover = bool(wish.get("handover"))
    for line in found.left:
        print(f"stays: {line}", file=sys.stderr)
    if not found.items:
        print(f"nothing to {'hand over' if handover else 'remove'} for {network} ({blocks})")
        return 0
    if wish.get("dry_run") or not wish.get("yes"):
        print(f"would {'hand over' if handover else 'remove'} for {network} ({blocks}):")
        for item in found.items:
            print(f"  {item.text}")
    if wish.get("dry_run"):
        return 0
    if not wish.get("yes") and not _agreed(len(found.items)):
        print("nothing was changed; --yes does it without asking", file=sys.stderr)
        return 1
    return await _remove(found.items, "done: " if handover else "removed ")


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"{count} in all. Go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


async def _remove(items: Sequence[Item], word: str) -> int:
    """Each by itself: one that fails does not keep the others."""
    failed = 0
    for item in items:
        try:
            await item.remove()
        except FlannelError as error:
            failed += 1
            print(f"flannelctl: {error}", file=sys.stderr)
        else:
            print(f"{word}{item.text}")
    return 1 if failed else 0


# ---- no daemon meanwhile -------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(options: Options, state: StateDir, *, force: bool) -> Iterator[None]:
    """Keep daemons of this network out while the block runs, as far as there is a lock to hold.

    Raises:
        ConfigError: one runs, ours or Go flanneld, which has no lock.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(state.file(".lock").open("rb"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            pid = lock.read(20).decode("ascii", "replace").strip()
            if not force:
                raise _running(options, pid) from exc
        except OSError:
            pass  # no daemon has ever been here
        if not force and (pid := _daemon_pid(options)):
            raise _running(options, pid)
        yield


def _running(options: Options, pid: str) -> ConfigError:
    return ConfigError(
        f"flanneld (pid {pid or 'unknown'}) serves {options.network_id} on this host and would make everything anew: "
        "stop it first, or say --force"
    )


def _daemon_pid(options: Options) -> str:
    """A process in our network namespace that is a flanneld, of either kind, of our network or with our file."""
    here = Path("/proc/self/ns/net").stat()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        process = Path("/proc", entry)
        try:
            space = (process / "ns/net").stat()
            words = _strings(process / "cmdline")
            environ = _strings(process / "environ")
        except OSError:
            continue  # it has just ended
        same_space = (space.st_dev, space.st_ino) == (here.st_dev, here.st_ino)
        if same_space and _serves(words, environ, options):
            return entry
    return ""


def _strings(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def _serves(words: Sequence[str], environ: Sequence[str], options: Options) -> bool:
    """Whether a command line is that of a daemon that would undo what we do."""
    programs = [os.path.basename(word) for word in words[:3]]  # a script has its interpreter before it
    if "flanneld" not in programs:
        return False
    try:
        given = scan(words[programs.index("flanneld") + 1 :], DAEMON_FLAGS).values
        theirs = daemon_options(given, dict(entry.partition("=")[::2] for entry in environ))
    except UsageError:
        return True  # flags of another version
    return theirs.network_id == options.network_id or theirs.subnet_file == options.subnet_file


# ---- the lease -----------------------------------------------------------------------------------------


async def _lease(options: Options, scope: Scope, identity: str) -> Remains:
    """Our lease in etcd: with our identity, or Go flanneld's for the subnet that this host had."""
    from flanneld.sources.connect import connect  # gRPC, which a cleanup without --lease need not load
    from flanneld.sources.etcd_leases import Keys

    items, keys = [], Keys(options.etcd_prefix)
    client = connect(options)
    try:
        for kv in (await client.list(keys.subnets.encode())).kvs:
            name = keys.name(kv.key)
            try:
                subnets, attrs = parse_key(kv.key), decode_attrs(kv.value)
            except FlannelError:
                continue
            same = attrs.identity == identity if attrs.identity else any(s in scope.subnets for s in subnets if s)
            if same:
                where = format_ip(attrs.public_ip) if attrs.public_ip else attrs.where()
                items.append(Item(f"lease {name} of {where}", partial(_delete, options, kv.key, kv.mod_revision)))
    finally:
        await client.close()
    return Remains(tuple(items))


async def _delete(options: Options, key: bytes, revision: int) -> None:
    from flanneld.sources.connect import connect

    client = connect(options)
    try:
        if not (await client.delete_if(key, mod_revision=revision)).succeeded:
            raise ConfigError("the lease was written meanwhile, by a daemon that has started: look again")
    finally:
        await client.close()
