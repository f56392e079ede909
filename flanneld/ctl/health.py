"""``flannelctl health``: asks a daemon whether it runs, or whether its network works, and says the answer.

For health checks of containers without curl. It looks nowhere but at the daemon's own health server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from flanneld.cli_flags import DAEMON_FLAGS, daemon_options
from flanneld.errors import FlannelError, Unavailable, UsageError
from flanneld.flag_values import boolean
from flanneld.goflags import Flag, scan, usage
from flanneld.model.options import Options

_ASK_S = 3.0
"""An answer takes a millisecond. Less than the 5 s after which most container runtimes stop a check."""

HEAD = """\
usage: flannelctl health [--ready] [--url URL]

Asks /healthz, or /readyz with --ready, and prints the answer; exit status 0 when it is yes, 1 when it is no or there is
none. Without --url it goes by the flags of the daemon that is process 1, as in a container, and by FLANNELD_HEALTHZ_*.
A daemon that is process 1 and has no health server counts as running."""


def _http(text: str) -> str:
    parts = urlsplit(text)
    try:
        usable = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:  # not a number
        usable = False
    if not usable:
        raise ValueError("use one such as http://127.0.0.1:8471")
    return text


READY = Flag("ready", boolean, "ask whether the network works, not only whether the daemon runs", "", env=False)
URL = Flag("url", _http, "where its health server is; a path in it is asked as it is", "URL", env=False, default="none")
FLAGS = (READY, URL)


def main(words: Sequence[str], process_1: Callable[[], list[str]] | None = None) -> int:
    """Run the command; returns the exit status.

    Args:
        words: the command line after ``health``.
        process_1: gives the command line of process 1.

    Raises:
        UsageError: a wrong flag, or nothing tells where to ask.
        Unavailable: no answer.
    """
    given = scan(words, FLAGS)
    if given.help:
        print(usage(HEAD, FLAGS, Options()))
        return 0
    path = "/readyz" if given.values.get("ready") else "/healthz"
    if "url" in given.values:
        url = urlsplit(str(given.values["url"]))
        return _answered(str(url.hostname), url.port or 80, url.path.rstrip("/") or path)
    argv = daemon_words((process_1 or _process_1)())
    if where := address(argv or (), os.environ):
        return _answered(*where, path)
    if argv is None or path == "/readyz":
        raise UsageError("where to ask is not known: use --url, or start flanneld with --healthz-port")
    print("flanneld runs, without a health server (--healthz-port gives it one)")
    return 0


def _answered(host: str, port: int, path: str) -> int:
    status, text = _ask(host, port, path)
    print(text)
    return 0 if status == 200 else 1


def daemon_words(argv: Sequence[str]) -> list[str] | None:
    """What follows ``flanneld`` in a command line, whose first word may be an init; None without it."""
    for number, word in enumerate(argv):
        if PurePath(word).name == "flanneld":
            return list(argv[number + 1 :])
    return None


def address(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Where a daemon's health server listens, as one who is on the same host reaches it.

    Args:
        argv: the daemon's flags.
        environ: its environment.

    Returns:
        Address and port; None when it has none, or its flags make no sense.
    """
    try:
        options = daemon_options(scan(argv, DAEMON_FLAGS).values, environ)
    except FlannelError:
        return None
    # "all addresses" is none to connect to
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.healthz_ip, options.healthz_ip)
    return (host, options.healthz_port) if options.healthz_port else None


def _process_1() -> list[str]:
    try:
        return os.fsdecode(Path("/proc/1/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def _ask(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and text of the answer.

    Raises:
        Unavailable: there was none.
    """
    from http.client import HTTPConnection, HTTPException  # 20 ms that --help has not to wait for

    try:
        with closing(HTTPConnection(host, port, timeout=_ASK_S)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace").strip()
    except (OSError, HTTPException) as exc:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        why = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        raise Unavailable(f"http://{where}{path} gives no answer, does flanneld run there? ({why})") from exc
