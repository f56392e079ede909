"""flanneld that kills itself before the N-th thing it does to the world: a file, the kernel, a tool, etcd.

Run as a program in the daemon's place. Between two such things nothing outside changes, so killing before each of
them is killing everywhere. Nothing of this is in the daemon: Python tells of files and processes (PEP 578), the
rest is wrapped here.

Environment:
    CRASH_AT: number of the thing, from 1; 0 = never.
    CRASH_FROM: when counting begins: ``start``, ``ready`` or ``stop``.
    CRASH_TRACE: file that gets one line for each thing.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

FILES = {"os.rename", "os.remove", "os.mkdir", "os.chmod", "os.link", "os.truncate"}
OTHERS = {"subprocess.Popen", "fcntl.ioctl", "os.exec"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Points:
    """Counts, and kills at the right one."""

    def __init__(self, at: int, phase: str, trace: str) -> None:
        self._at, self._phase, self._count = at, phase, 0
        self._lock = threading.Lock()
        self._armed = phase == "start"
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if trace else -1

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self._armed = self._armed or phase == self._phase

    def point(self, what: str) -> None:
        """Something is about to be done."""
        if not self._armed:
            return
        with self._lock:
            self._count += 1
            if self._trace >= 0:
                os.write(self._trace, f"{self._count} {what}\n".encode())
            if self._count == self._at:
                os.write(2, f"killed before {self._count}: {what}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """For ``sys.addaudithook``."""
        if event == "open":
            if isinstance(args[2], int) and args[2] & WRITING and _is_file(args[0]):
                self.point(f"open {args[0]}")
        elif event == "socket.bind":
            if isinstance(args[1], str):  # makes a file
                self.point(f"bind {args[1]}")
        elif event in FILES or event in OTHERS:
            self.point(f"{event} {args[0] if args else ''!r}")


def _is_file(path: object) -> bool:
    return isinstance(path, str | os.PathLike) and not str(path).startswith(("/dev/", "/proc/self/"))


def wrap(owner: Any, name: str, points: Points) -> None:
    """Make each call of a function, which does something when called or when awaited, a point."""
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        points.point(f"{name} {_shown(args)}")
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def _shown(args: tuple[Any, ...]) -> str:
    return " ".join(str(getattr(arg, "path", "") or type(arg).__name__) for arg in args[1:3])


def tell(owner: Any, name: str, phase: str, points: Points) -> None:
    """Make a call of a function the beginning of a phase."""
    inner: Callable[..., Awaitable[Any] | None] = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        points.begin(phase)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def main() -> int:
    """Be flanneld."""
    from flanneld import cli
    from flanneld.kernel import bpf, nlsocket
    from flanneld.report.state_dir import StateDir
    from flanneld.report.systemd import Notifier
    from flanneld.sources.etcd_client import EtcdClient

    given = {name: os.environ.get(f"CRASH_{name}", "") for name in ("AT", "FROM", "TRACE")}
    points = Points(int(given["AT"] or 0), given["FROM"] or "start", given["TRACE"])
    wrap(nlsocket.Socket, "_batch", points)
    wrap(bpf, "_bpf", points)
    wrap(EtcdClient, "_ask", points)
    wrap(StateDir, "close", points)
    tell(Notifier, "ready", "ready", points)
    tell(Notifier, "stopping", "stop", points)
    sys.addaudithook(points.audit)
    return cli.main()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # not this file's directory, whose names are no top-level modules
    sys.exit(main())
