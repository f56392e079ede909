"""What this host remembers in its state directory: who it is, and which subnets it had.

Everything here is convenience: a lost, read-only, corrupt or copied directory costs a warning, never the
start. Several daemons may share one directory; what belongs to one network carries the network's name.

::

    /var/lib/flanneld/
    ├── machine-id            operator's override of /etc/machine-id (may be absent)
    ├── made-up-id            when the machine has no id
    ├── identity              derived, with the mark of the machine it was derived on
    ├── coreos.com-network-5a1f….json   subnets we last held in that network
    └── coreos.com-network-5a1f….lock   held while a daemon serves that network

Other versions of this program share the directory: see ``state_file.py`` for the JSON files. The names of all
files and the plain text of the others never change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from flanneld.errors import ConfigError, KernelError
from flanneld.model.addr import Family, Prefix
from flanneld.model.identity import derive_identity, machine_mark
from flanneld.report import state_file
from flanneld.report.atomic import make_directory, remove_leftovers, write_atomic
from flanneld.report.own_file import read_file
from flanneld.report.state_file import Kind, set_aside

log = logging.getLogger(__name__)

_MACHINE_ID = re.compile(r"[0-9a-f]{32}")
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_Content = TypeVar("_Content", bound=msgspec.Struct)


class Identity(msgspec.Struct, frozen=True):
    """Content of the file ``identity``."""

    identity: str
    machine: str
    """``machine_mark`` of the machine it was derived on."""


class Subnets(msgspec.Struct, frozen=True):
    """Content of a network's file."""

    network: str
    identity: str
    """Whose subnets these are: a directory copied to another machine must not speak for it."""
    subnet: str | None = None
    subnet6: str | None = None


# Version 1 was the content itself, with "kind" and "version" among its fields and no checksum.
IDENTITY = Kind("flanneld-identity", 2, Identity, {1: partial(msgspec.json.decode, type=Identity)})
SUBNETS = Kind("flanneld-subnets", 2, Subnets, {1: partial(msgspec.json.decode, type=Subnets)})


class StateDir:
    """The state directory, as one daemon for one network uses it.

    Args:
        path: the directory, ``--state-dir``; made when first written to.
        network_id: what tells networks apart on one host, e.g. the etcd prefix (contract 3.3).
        etc_machine_id: where the operating system keeps the machine's id.
    """

    def __init__(self, path: Path, network_id: str, etc_machine_id: Path = Path("/etc/machine-id")) -> None:
        self.path = Path(os.path.abspath(path))
        self.network_id = network_id
        self._etc_machine_id = etc_machine_id
        self._identity: str | None = None
        self._lock_fd = -1
        self._told_unwritable = False

    # -- one daemon for each network --

    def lock(self) -> None:
        """Refuse to be the second daemon of this network on this host; held until ``close`` or death.

        Raises:
            ConfigError: another process holds it; names its pid.
        """
        path = self.file(".lock")
        try:
            make_directory(self.path)
            # CLOEXEC, which Python sets: a firewall tool that outlives us must not keep the lock
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o600)  # whoever may open it, if only to read, may lock it and keep us out
        except OSError as exc:
            self._unwritable(exc.strerror)
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.read(fd, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"another flanneld (pid {holder}) serves the network {self.network_id} on this host: stop it, "
                f"or give one of them its own --state-dir (it holds {path})"
            ) from exc
        self._lock_fd = fd
        for name in (self.file("").name, "identity", "made-up-id"):
            remove_leftovers(self.path, name)
        # the pid is for the sentence above only; a full disk does not weaken the lock
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())

    def close(self) -> None:
        """Let go of the lock; everything else stays."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- who we are --

    def identity(self) -> str:
        """This host's identity, 32 hex digits: the same after restart, reboot and loss of the directory.

        A persisted one counts only on the machine on which it was derived: the directory of a golden image
        reaches every clone, and two clones with one identity would share one subnet (F19). On the same
        machine it counts wherever the directory is moved.
        """
        if self._identity is None:
            self._identity = self._find_identity()
        return self._identity

    def _find_identity(self) -> str:
        machine_id = self._machine_id()
        mark = machine_mark(machine_id)
        path = self.path / "identity"
        kept = self._load(path, IDENTITY)
        if kept and kept.machine == mark and _IDENTITY.fullmatch(kept.identity):
            return kept.identity
        identity = derive_identity(machine_id, str(self.path))
        if kept:
            log.warning(
                "the state directory was made on another machine (copied or cloned), so this host takes an "
                "identity of its own path=%s identity=%s",
                self.path,
                identity,
            )
        self._save(path, IDENTITY, Identity(identity, mark))
        return identity

    def _machine_id(self) -> str:
        """Operator's override, else the system's (machine-id(5)), else a random one that we keep."""
        override = _line(self.path / "machine-id")
        if override:
            return override
        system = _line(self._etc_machine_id)
        # before the first boot is over it is empty or says "uninitialized"
        if _MACHINE_ID.fullmatch(system):
            return system
        return self._made_up_id()

    def _made_up_id(self) -> str:
        """For containers without /etc/machine-id. Kept, and the same until the next reboot if it is lost.

        The boot id is random for each boot and shared by all containers of a machine; the host name tells
        those apart that play hosts of their own.
        """
        path = self.path / "made-up-id"
        kept = _line(path)
        if _MACHINE_ID.fullmatch(kept):
            return kept
        boot_id = _line(Path("/proc/sys/kernel/random/boot_id")) or secrets.token_hex(16)
        made = hashlib.sha256(f"{boot_id} {os.uname().nodename}".encode()).hexdigest()[:32]
        log.warning(
            "this machine has no machine-id, so one is made up: write one to %s to choose it, or set up %s",
            self.path / "machine-id",
            self._etc_machine_id,
        )
        self._write(path, made.encode() + b"\n")
        return made

    # -- what we had --

    def previous_subnets(self) -> tuple[Prefix | None, Prefix | None]:
        """The subnets (IPv4, IPv6) that this host last held in this network; (None, None) = none known."""
        path = self.file(".json")
        kept = self._load(path, SUBNETS)
        if kept is None or kept.identity != self.identity():
            return None, None
        try:
            if kept.network != self.network_id:
                raise ValueError(f"it belongs to the network {kept.network!r}")
            return _prefix(kept.subnet, Family.V4), _prefix(kept.subnet6, Family.V6)
        except ValueError as exc:
            set_aside(path, str(exc))
            return None, None

    def remember(self, subnet: Prefix | None, subnet6: Prefix | None) -> None:
        """Keep the subnets for the next start. Waits for the disk."""
        text, text6 = (str(prefix) if prefix else None for prefix in (subnet, subnet6))
        self._save(self.file(".json"), SUBNETS, Subnets(self.network_id, self.identity(), text, text6))

    # -- files --

    def file(self, suffix: str) -> Path:
        """A file of this network; the hash keeps apart what reads alike (``/a/b`` and ``/a-b``)."""
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", self.network_id).strip("-.")[:64] or "network"
        return self.path / f"{readable}-{hashlib.sha256(self.network_id.encode()).hexdigest()[:8]}{suffix}"

    def _load(self, path: Path, kind: Kind[_Content]) -> _Content | None:
        try:
            return state_file.read(path, kind)
        except KernelError as exc:
            self._unwritable(str(exc))
            return state_file.peek(path, kind)

    def _save(self, path: Path, kind: Kind[_Content], content: _Content) -> None:
        try:
            state_file.write(path, kind, content)
        except KernelError as exc:
            self._unwritable(str(exc))

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomic(path, content, "the state file")
        except KernelError as exc:
            self._unwritable(str(exc))

    def _unwritable(self, reason: str | None) -> None:
        if not self._told_unwritable:
            self._told_unwritable = True
            log.warning(
                "the state directory cannot be written, so nothing is remembered over a restart: make it "
                "writable or choose another --state-dir path=%s reason=%s",
                self.path,
                reason,
            )


def holder_of(path: Path, network_id: str, subnets: Collection[Prefix]) -> str:
    """Which other network had one of these subnets last, as its file in a state directory tells; empty when none.

    Args:
        path: the directory; nothing is made or moved there.
        network_id: the network that is not another one.
        subnets: to look for.
    """
    texts, found = {str(subnet) for subnet in subnets}, set()
    for file in sorted(path.glob("*.json")):
        kept = state_file.peek(file, SUBNETS)
        if kept and texts & {kept.subnet, kept.subnet6}:
            found.add(kept.network)
    return "" if network_id in found else min(found, default="")


def known_identity(path: Path) -> str:
    """The identity kept in a state directory, without making or moving anything; empty when there is none."""
    kept = state_file.peek(path / "identity", IDENTITY)
    return kept.identity if kept else ""


def _line(path: Path) -> str:
    """The first line of a small file, stripped; empty when there is none."""
    try:
        return read_file(path, 256).partition(b"\n")[0].decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def _prefix(text: str | None, family: Family) -> Prefix | None:
    if text is None:
        return None
    prefix = Prefix.parse(text)
    if prefix.family is not family:
        raise ValueError(f"{text!r} is not {family.label}")
    return prefix
