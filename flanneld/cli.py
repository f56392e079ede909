"""``flanneld``: reads the command line, sets up logging and hands over to ``app.py``.

Exit status (contract 0.3): 0 help, version and a stop by signal; 1 what can never work as configured;
2 a wrong flag or variable, for which Go flannel ends with 0 (contract 1.6).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from flanneld import __version__
from flanneld.cli_flags import DAEMON_FLAGS, daemon_options
from flanneld.errors import ConfigError, KernelError, UsageError
from flanneld.goflags import misspelt_variables, scan, usage
from flanneld.model.options import Options
from flanneld.report import log

_log = logging.getLogger(__name__)

_CAP_NET_ADMIN = 12
"""Source: include/uapi/linux/capability.h."""

_HELP = """\
Usage: flanneld [flags]

Leases a subnet for this host and makes its containers reachable from the network's other hosts.
A flag may be written -x or --x, its value --x=v or --x v. FLANNELD_X in the environment stands in
for a flag that is not given, so FLANNELD_ETCD_PREFIX for --etcd-prefix."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop.

    Args:
        argv: the words after the program's name; None = those of this process.

    Returns:
        The exit status.
    """
    try:
        given = scan(sys.argv[1:] if argv is None else argv, DAEMON_FLAGS)
        if given.help:
            print(usage(_HELP, DAEMON_FLAGS, Options()))
            return 0
        if given.values.get("version"):
            print(__version__, file=sys.stderr)  # where Go flannel prints it (contract 0.1 step 2)
            return 0
        options = daemon_options(given.values, os.environ)
    except UsageError as error:
        print(f"flanneld: {error}", file=sys.stderr)
        return 2
    log.setup(options.log_format, options.v, options.vmodule)
    return _start(options, os.environ, password_is_shown="etcd_password" in given.values)


def _start(options: Options, environ: Mapping[str, str], *, password_is_shown: bool) -> int:
    for text in misspelt_variables(environ, DAEMON_FLAGS):
        _log.warning("%s", text)
    try:
        _require_net_admin()
        if password_is_shown:
            _log.warning("--etcd-password is shown to every user of this host by ps: give it in FLANNELD_ETCD_PASSWORD")
        # Here, because --help, --version and wrong flags need not wait for the whole daemon's imports.
        from flanneld.app import run

        return run(options)
    except (ConfigError, KernelError) as error:
        _log.error("%s", error)
        return 2 if isinstance(error, UsageError) else 1


def _require_net_admin() -> None:
    """Fail now with one sentence rather than later with a row of EPERMs.

    Raises:
        ConfigError: the process may not configure the network.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return  # nothing to tell it by; the kernel will
    if not effective >> _CAP_NET_ADMIN & 1:
        raise ConfigError(
            "flanneld may not configure the network: run it as root, or in a container with the capability NET_ADMIN"
        )
