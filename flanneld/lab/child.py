"""Processes that outlive the command that started them: etcd and the daemons.

A process is known by its pid *and* its start time, kept in a file, so that another command finds it again
and never signals a stranger to whom the kernel has given the pid meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Child(NamedTuple):
    """One process, identified beyond the reuse of its pid."""

    pid: int
    started: int
    """Clock ticks after boot (proc_pid_stat(5), field 22)."""

    @staticmethod
    def of(pid: int) -> Child | None:
        """The process that has this pid now; None when there is none or it is a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in b"ZX" else Child(pid, int(fields[19]))

    @staticmethod
    def read(path: Path) -> Child | None:
        """The process that a pid file names, if it still runs."""
        try:
            pid, started = map(int, path.read_text().split())
        except (OSError, ValueError):
            return None
        child = Child(pid, started)
        return child if child.is_alive() else None

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return Child.of(self.pid) == self

    def signal(self, number: int) -> bool:
        """Send a signal; tells whether it was still there to get it."""
        with _pidfd(self) as descriptor:
            if descriptor is None:
                return False
            try:
                signal.pidfd_send_signal(descriptor, number)
            except ProcessLookupError:
                return False
            return True

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until it has ended; False when it still runs after ``timeout_s``."""
        with _pidfd(self) as descriptor:
            if descriptor is not None:
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                if not poll.poll(timeout_s * 1000):
                    return False
        self._reap()
        return True

    def end(self, timeout_s: float) -> bool:
        """SIGTERM, and SIGKILL after ``timeout_s``; tells whether SIGTERM was enough."""
        self.signal(signal.SIGCONT)  # a stopped process does not act on SIGTERM
        self.signal(signal.SIGTERM)
        if self.wait_gone(timeout_s):
            return True
        self.signal(signal.SIGKILL)
        self.wait_gone(timeout_s)
        return False

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # started by an earlier command: init reaps it
            os.waitpid(self.pid, os.WNOHANG)


class _pidfd:  # noqa: N801  # reads as the function it stands for
    """A descriptor of exactly this process, or None when it is gone."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._descriptor: int | None = None

    def __enter__(self) -> int | None:
        try:
            self._descriptor = os.pidfd_open(self._child.pid)
        except ProcessLookupError:
            return None
        # the descriptor pins the process: if the start time fits now, it is the right one for good
        return self._descriptor if Child.of(self._child.pid) == self._child else None

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def spawn(netns: str, argv: Sequence[str], log: Path, pid_file: Path, env: Mapping[str, str]) -> Child:
    """Start a program in a namespace, detached: it survives us, our terminal and our Ctrl-C.

    Args:
        netns: name of the namespace.
        argv: the program and its arguments.
        log: standard output and error are appended here.
        pid_file: where ``Child.read`` will look.
        env: its whole environment.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # `ip netns exec` execs, so the pid stays; it also mounts the namespace's own /sys
    command = ["ip", "netns", "exec", netns, *argv]
    pid = os.posix_spawnp("ip", command, env, file_actions=actions, setsid=True)
    child = Child.of(pid) or Child(pid, 0)
    pid_file.write_text(f"{child.pid} {child.started}\n")
    return child


def kill_all(pids: Sequence[int], timeout_s: float) -> None:
    """SIGKILL to each at once, then wait until all are gone, at most ``timeout_s`` for each."""
    children = [child for pid in pids if pid != os.getpid() and (child := Child.of(pid))]
    for child in children:
        child.signal(signal.SIGKILL)
    for child in children:
        child.wait_gone(timeout_s)
