"""Entry point of ``flannelctl``: picks the sub-command, turns errors into one sentence and an exit status.

0 = done, 1 = it could not be done, 2 = the command line is wrong, 130 = interrupted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence

from flanneld import __version__
from flanneld.errors import FlannelError, UsageError
from flanneld.model.plain import plain

USAGE = """\
usage: flannelctl COMMAND ...

  status                    what the daemon of this host is doing, and what is wrong
  audit                     what others changed on this host, and when it was undone
  leases list|show|watch    which host holds which subnet
  health                    ask the daemon whether it runs, or with --ready whether the network works
  install-conf SRC DEST     put a configuration file in place in one step
  docker-opts               Docker's flags for this host's subnet, as mk-docker-opts.sh writes them
  cleanup                   take the network off this host, or leave it to Go flanneld
  lab up|status|exec|down   a real cluster in network namespaces of this machine
  lab demo                  build one, show that it works, take it down

flannelctl COMMAND --help tells more; --version prints the version."""


def _status(words: Sequence[str]) -> int:
    from flanneld.ctl import daemon_view

    return daemon_view.status(words)


def _audit(words: Sequence[str]) -> int:
    from flanneld.ctl import daemon_view

    return daemon_view.audit(words)


def _leases(words: Sequence[str]) -> int:
    from flanneld.ctl import leases  # a sub-command's imports (gRPC, pyroute2) are not every command's cost

    return leases.main(words)


def _health(words: Sequence[str]) -> int:
    from flanneld.ctl import health

    return health.main(words)


def _install_conf(words: Sequence[str]) -> int:
    from flanneld.ctl import install_conf

    return install_conf.main(words)


def _docker_opts(words: Sequence[str]) -> int:
    from flanneld.ctl import docker_opts

    return docker_opts.main(words)


def _cleanup(words: Sequence[str]) -> int:
    from flanneld.ctl import cleanup

    return cleanup.main(words)


def _lab(words: Sequence[str]) -> int:
    from flanneld.ctl import lab

    return lab.main(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "status": _status,
    "audit": _audit,
    "leases": _leases,
    "health": _health,
    "install-conf": _install_conf,
    "docker-opts": _docker_opts,
    "cleanup": _cleanup,
    "lab": _lab,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``flannelctl``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except FlannelError as error:
        print(f"flannelctl: {plain(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # `flannelctl … | head`: nobody reads on, which is no error of ours; keep Python from flushing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UsageError(f"a command is missing: {', '.join(COMMANDS)}; --help tells more")
    if words[0] in ("-h", "-help", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] in ("-version", "--version", "version"):
        print(f"flannelctl {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(f"there is no command {words[0]!r}: use {', '.join(COMMANDS)}")
    return COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
