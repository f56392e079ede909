"""``flannelctl docker-opts``: flannel's ``mk-docker-opts.sh`` (contract 10.2 to 10.4), the same options and bytes.

The options are read as shell's ``getopts`` reads them (``-ic``, ``-f/path``), so that a unit file needs only another
program name. Unlike the script it ends with an error when there is no subnet file, instead of writing a file without
options, and asking for help is none.
"""

from __future__ import annotations

import getopt
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flanneld.errors import ConfigError, UsageError
from flanneld.model.addr import Family, Prefix
from flanneld.report.atomic import write_atomic

HEAD = """\
usage: flannelctl docker-opts [-f FILE] [-d FILE] [-i] [-c] [-m] [-k KEY]

Writes the flags that make Docker use this host's subnet, for EnvironmentFile= in its unit.

  -f FILE  subnet file of flanneld (default /run/flannel/subnet.env)
  -d FILE  file to write, - for standard output (default /run/docker_opts.env)
  -i       only one variable for each flag, DOCKER_OPT_BIP and so on
  -c       only one variable with all flags; without -i and -c both
  -k KEY   name of that variable (default DOCKER_OPTS); what it says in the environment stays in front
  -m       leave --ip-masq out

Other DOCKER_OPT_* variables of the environment are written too."""

SUBNET_FILE = "/run/flannel/subnet.env"
OUTPUT_FILE = "/run/docker_opts.env"
COMBINED_KEY = "DOCKER_OPTS"
_PREFIX = "DOCKER_OPT_"
_IP_MASQ = {"true": "false", "false": "true"}
"""FLANNEL_IPMASQ and Docker's --ip-masq: one of the two masquerades."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ROUTES = Path("/proc/self/net/route")


class Wish(NamedTuple):
    """What the command line asks for."""

    subnet_file: Path = Path(SUBNET_FILE)
    output: str = OUTPUT_FILE
    individual: bool = True
    combined: bool = True
    key: str = COMBINED_KEY
    ip_masq: bool = True


def main(argv: Sequence[str]) -> int:
    """Run ``flannelctl docker-opts``; returns the exit status."""
    wish = parse(argv)
    if wish is None:
        print(HEAD)
        return 0
    env = read_env(wish.subnet_file)
    _write(wish.output, render(env, os.environ, wish))
    _refuse_conflict(env.get("FLANNEL_SUBNET", ""))
    return 0


def parse(argv: Sequence[str]) -> Wish | None:
    """The command line (contract 10.2); None when it asks for help.

    Raises:
        UsageError: names the word that is wrong.
    """
    try:
        given, words = getopt.getopt(list(argv), "f:d:ick:mh?", ["help"])
    except getopt.GetoptError as error:
        raise UsageError(f"docker-opts: {error}; --help shows the options") from None
    options = dict(given)
    if options.keys() & {"-h", "-?", "--help"}:
        return None
    if words:
        raise UsageError(f"docker-opts takes no word {words[0]!r}; --help shows the options")
    key = options.get("-k", COMBINED_KEY)
    if not _NAME.fullmatch(key):
        raise UsageError(f"-k {key!r} is no name of a variable: use letters, digits and _")
    one = options.keys() & {"-i", "-c"}
    return Wish(
        Path(options.get("-f", SUBNET_FILE)),
        options.get("-d", OUTPUT_FILE),
        not one or "-i" in options,
        not one or "-c" in options,
        key,
        "-m" not in options,
    )


def read_env(path: Path) -> dict[str, str]:
    """The subnet file, as its strict readers take it: ``KEY=value``, nothing quoted (contract 4.5).

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no subnet file {path}: flanneld writes it when it has a lease, so look at its log "
            "(systemctl status flanneld), or name another file with -f"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the subnet file {path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    return {key: value for key, equals, value in (line.partition("=") for line in lines) if equals}


def render(env: Mapping[str, str], environ: Mapping[str, str], wish: Wish) -> bytes:
    """The file to write (contract 10.3).

    Raises:
        ConfigError: FLANNEL_IPMASQ is neither true nor false.
    """
    found = {key: value for key, value in environ.items() if key.startswith(_PREFIX)} | _flags(env, wish.ip_masq)
    flags = dict(sorted(found.items()))
    lines = [f"{key}={_quoted(value)}" for key, value in flags.items()] if wish.individual else []
    if wish.combined:
        all_flags = " ".join([environ.get(wish.key, ""), *flags.values()])
        lines.append(f"{wish.key}={_quoted(all_flags)}")
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")


def _flags(env: Mapping[str, str], ip_masq: bool) -> dict[str, str]:
    """Docker's flags by variable; none for what the subnet file does not say."""
    flags = {}
    if subnet := env.get("FLANNEL_SUBNET"):
        flags["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := env.get("FLANNEL_MTU"):
        flags["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if ip_masq and (ours := env.get("FLANNEL_IPMASQ")):
        if ours not in _IP_MASQ:
            raise ConfigError(f"FLANNEL_IPMASQ in the subnet file is {ours!r}: it has to be true or false")
        flags["DOCKER_OPT_IPMASQ"] = f"--ip-masq={_IP_MASQ[ours]}"
    return flags


def _quoted(text: str) -> str:
    """In double quotes, which a shell and systemd's EnvironmentFile= read alike."""
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def _write(output: str, content: bytes) -> None:
    if output == "-":
        sys.stdout.write(content.decode("utf-8", "surrogateescape"))
        return
    path = Path(output)
    try:
        # renaming over /dev/stdout or a symbolic link would replace the way, not the file at its end
        if not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(content)
            return
        path = path.resolve()
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise ConfigError(f"{output} cannot be written: {exc.strerror}") from exc
    write_atomic(path, content, "Docker's options")


def _refuse_conflict(bip: str) -> None:
    """A gateway route to our own subnet would win from Docker's bridge, or lose to it (contract 10.4).

    Raises:
        ConfigError: there is one; the options are written all the same.
    """
    try:
        subnet = Prefix.parse(bip).masked()
        table = _ROUTES.read_text("ascii")
    except (ValueError, OSError):
        return  # IPv6 only; or no IPv4 in this kernel
    if subnet.family is Family.V4 and (found := gateway_of(subnet, table)):
        raise ConfigError(
            f"the routing table already has {subnet} via {found}: remove that route (ip route delete {subnet}), "
            "or Docker's bridge and the route will fight for the subnet"
        )


def gateway_of(subnet: Prefix, table: str) -> str:
    """Gateway and device of a route to exactly this IPv4 subnet; empty when there is none.

    Args:
        subnet: an IPv4 prefix without host bits.
        table: text of ``/proc/net/route``. Source: proc(5); addresses are hexadecimal in the host's byte order.
    """
    for fields in (line.split() for line in table.splitlines()[1:]):
        device, destination, gateway, mask = fields[0], *(_ip(fields[i]) for i in (1, 2, 7))
        length = int.from_bytes(mask, "big").bit_count()
        if destination == subnet.ip and length == subnet.length and any(gateway):
            return f"{'.'.join(map(str, gateway))} dev {device}"
    return ""


def _ip(text: str) -> bytes:
    return int(text, 16).to_bytes(4, sys.byteorder)
