"""Network namespaces for tests: made with a unique name, entered by threads, removed whatever happens.

A thread that has entered a namespace keeps it for its sockets and for the processes it starts, so the
code under test needs no knowledge of namespaces. One catch: ``/proc/net`` and ``/proc/self/net`` show
the namespace of the process's *main* thread; ``/proc/sys/net`` and ``/proc/thread-self/net`` the thread's own.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class Netns:
    """One network namespace with ``lo`` up; a context manager.

    Args:
        label: what the namespace is for; it begins the name, so that a stray one tells whose it was.
            With the random part the name is also short enough for use in device names.
    """

    def __init__(self, label: str = "fl") -> None:
        self.name = f"{label}-{secrets.token_hex(3)}"
        self._children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Netns:
        _run("ip", "netns", "add", self.name)
        try:
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Kill what ``spawn`` started and delete the namespace; devices in it vanish with it."""
        for child in self._children:
            child.kill()
            child.communicate()
        self._children.clear()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def run(self, *argv: str, stdin: str = "", check: bool = True) -> str:
        """Run a command inside and return its standard output; a failure shows its standard error."""
        return _run("ip", "netns", "exec", self.name, *argv, stdin=stdin, check=check)

    def spawn(self, *argv: str) -> subprocess.Popen[str]:
        """Start a command inside with pipes on its streams; it is killed when the namespace goes."""
        pipe = subprocess.PIPE
        child = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *argv], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        self._children.append(child)
        return child

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a plain function in a thread that has entered the namespace."""
        outcome: list[T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                self._enter()
                outcome.append(function(*args, **kwargs))
            except BaseException as exc:  # handed to the caller's thread
                errors.append(exc)

        thread = threading.Thread(target=inside, name=self.name, daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return outcome[0]

    def exec_async(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an async function on an event loop of its own inside; blocks the caller until it is done."""
        return self.call(lambda: asyncio.run(function(*args, **kwargs), debug=False))

    def _enter(self) -> None:
        # os.setns exists from Python 3.12 on
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot enter namespace {self.name}: {os.strerror(code)}")
        finally:
            os.close(fd)


def join(left: Netns, left_name: str, right: Netns, right_name: str) -> None:
    """Connect two namespaces with a veth pair, both ends up."""
    peer = ("peer", "name", right_name, "netns", right.name)
    _run("ip", "link", "add", left_name, "netns", left.name, "type", "veth", *peer)
    left.run("ip", "link", "set", left_name, "up")
    right.run("ip", "link", "set", right_name, "up")


def _run(*argv: str, stdin: str = "", check: bool = True) -> str:
    done = subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False, timeout=30)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
