"""What the firewall tests share: a host with neighbours to send real packets through, and stand-in tools.

::

    pod  10.5.1.2 ────── 10.5.1.1   host   10.5.1.0 ────── 10.5.2.2  far
                              198.51.100.1                 (a pod of another host, behind the overlay)
                                    │
                              198.51.100.2  outside

The address 10.5.1.0 stands on the link to ``far``, where flannel.1 would carry it; IPv6 likewise.
"""

from __future__ import annotations

import json
import re
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from flanneld.contracts import TrafficManager, TrafficRules
from flanneld.model.addr import Family, Prefix
from tests.support.netns import Netns, join

V4 = TrafficRules(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.1.0/24"), True, True, True)
V6 = TrafficRules(Prefix.parse("fd00:5::/48"), Prefix.parse("fd00:5:0:1::/64"), True, True, True)
BOTH = (V4, V6)


class Addresses(NamedTuple):
    """Who has which address, in one family."""

    pod: str
    gateway: str
    overlay: str
    """The host's own address on the link to ``far``: what masquerading uses there."""
    far: str
    host: str
    """The host's underlay address."""
    outside: str


ADDRESSES = {
    Family.V4: Addresses("10.5.1.2", "10.5.1.1", "10.5.1.0", "10.5.2.2", "198.51.100.1", "198.51.100.2"),
    Family.V6: Addresses(
        "fd00:5:0:1::2", "fd00:5:0:1::1", "fd00:5:0:1::", "fd00:5:0:2::2", "2001:db8::1", "2001:db8::2"
    ),
}


class Bed(NamedTuple):
    """The four namespaces of the drawing."""

    host: Netns
    pod: Netns
    far: Netns
    outside: Netns


@contextmanager
def bed() -> Iterator[Bed]:
    """Build the drawing, for both families, and remove it afterwards."""
    with ExitStack() as stack:
        all_four = Bed(*(stack.enter_context(Netns(f"fw-{name}")) for name in Bed._fields))
        host, pod, far, outside = all_four
        for ns in all_four:
            # otherwise each link is dumb for two seconds
            ns.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        for other, name in ((pod, "pod0"), (far, "far0"), (outside, "out0")):
            join(host, name, other, "eth0")
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            host.run("sysctl", "-qw", f"{key}=1")
        for family, at in ADDRESSES.items():
            net, flag = V4 if family is Family.V4 else V6, f"-{4 if family is Family.V4 else 6}"
            for ns, device, address in (
                (host, "pod0", f"{at.gateway}/{net.subnet.length}"),
                (host, "far0", f"{at.overlay}/{family.bits}"),
                (host, "out0", f"{at.host}/{24 if family is Family.V4 else 64}"),
                (pod, "eth0", f"{at.pod}/{net.subnet.length}"),
                (far, "eth0", f"{at.far}/{family.bits}"),
                (outside, "eth0", f"{at.outside}/{24 if family is Family.V4 else 64}"),
            ):
                nodad = ("nodad",) if family is Family.V6 else ()
                ns.run("ip", flag, "addr", "add", address, "dev", device, *nodad)
            host.run("ip", flag, "route", "add", f"{at.far}/{family.bits}", "dev", "far0")
            pod.run("ip", flag, "route", "add", "default", "via", at.gateway)
            far.run("ip", flag, "route", "add", "default", "via", at.overlay, "dev", "eth0", "onlink")
            outside.run("ip", flag, "route", "add", str(net.network), "via", at.host)
        yield all_four


def source_seen(
    sender: Netns, receiver: Netns, target: str, *, source: str = "", mark: int = 0, wait_s: float = 3.0
) -> str | None:
    """Send one datagram between namespaces and tell the source address that arrives; None = nothing came."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with receiver.call(_udp, family, "", 0) as inbox, sender.call(_udp, family, source, mark) as outbox:
        inbox.settimeout(wait_s)
        outbox.sendto(b"who am I?", (target, inbox.getsockname()[1]))
        try:
            return str(inbox.recvfrom(100)[1][0])
        except TimeoutError:
            return None


def _udp(family: socket.AddressFamily, source: str, mark: int) -> socket.socket:
    # a socket stays in the namespace it was made in, whichever thread uses it later
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    sock.bind((source, 0))
    return sock


async def ensure(rules: TrafficManager, *wanted: TrafficRules) -> Sequence[str]:
    """What a daemon that comes and goes does: make the rules, let go."""
    with closing(rules):
        return await rules.ensure(wanted)


async def remove(rules: TrafficManager) -> Sequence[str]:
    """What ``flanneld``'s cleanup does."""
    with closing(rules):
        return await rules.remove()


class StandIns:
    """A directory at the front of PATH whose programs log each call before the real one runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._log = folder / "calls"
        self._log.touch()
        monkeypatch.setenv("PATH", f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin")

    def add(self, name: str, real: str, first: str = "") -> None:
        """Put a program in front of ``real``.

        Args:
            name: what it is called as.
            real: path of the program that runs in the end.
            first: shell commands before that; ``$input`` is what came on stdin.
        """
        path = self._folder / name
        path.write_text(
            f'#!/bin/bash\necho "{name} $*" >>{self._log}\ninput=$(cat)\n{first}\n{real} "$@" <<<"$input"\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[str]:
        """Command lines so far."""
        return self._log.read_text().splitlines()


VARIANTS = {"iptables-nft": "xtables-nft-multi", "iptables-legacy": "xtables-legacy-multi"}


def use_variant(stand_ins: StandIns, variant: str) -> None:
    """Make ``iptables`` and its companions be of one variant, as Debian's alternatives do."""
    for stem in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            stand_ins.add(stem + suffix, f"/usr/sbin/{VARIANTS[variant]} {stem}{suffix}")


def saved_rules(ns: Netns, variant: str, stem: str = "iptables") -> list[str]:
    """All ``-A`` lines of both tables in one variant, in order."""
    tables = VARIANTS[variant]
    text = ns.run(f"/usr/sbin/{tables}", f"{stem}-save")
    return [line for line in text.splitlines() if line.startswith("-A")]


def nft_rules(ns: Netns) -> list[str]:
    """The whole nft ruleset, handles left out."""
    lines = ns.run("nft", "list", "ruleset").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def nft_tables(ns: Netns) -> set[str]:
    """Names of the nft tables that exist."""
    listing = json.loads(ns.run("nft", "-j", "list", "tables"))["nftables"]
    return {item["table"]["name"] for item in listing if "table" in item}
