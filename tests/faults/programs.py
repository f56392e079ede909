"""Faults of the eBPF programs and maps of the udp backend. Any program with the right may open and change them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from backends.udp_programs import TC_ACT_SHOT
from flanneld.kernel import tc
from flanneld.kernel.bpf import Loaded, Map
from flanneld.kernel.bpfasm import Program, Reg
from flanneld.kernel.nlsocket import Socket
from flanneld.lab.netns import run_in
from flanneld.model.addr import parse_ip
from tests.faults.fault import Fault

if TYPE_CHECKING:
    from tests.faults.bed import Bed

HOOKS = (("flannel0", tc.Direction.EGRESS), ("eth0", tc.Direction.INGRESS))
OURS = "flanneld-udp-"


def _programs() -> list[int]:
    """Numbers of the programs by which packets leave and come in."""
    with closing(Socket()) as sock:
        return [
            one.program_id
            for device, direction in HOOKS
            for one in tc.filters(sock, socket.if_nametoindex(device), direction)
            if one.name.startswith(OURS)
        ]


def _maps(bed: Bed) -> Iterator[Map]:
    """The maps that the programs look packets up in."""
    for number in run_in(bed.host.netns, _programs):
        with closing(Loaded.by_id(number)) as program:
            for one in program.info().map_ids:
                with closing(Map.by_id(one)) as found:
                    if found.name in ("flannel_peers", "flannel_sources"):
                        yield found


def _empty(bed: Bed) -> None:
    for found in _maps(bed):
        found.delete(found.keys())


def _delete_peer(bed: Bed) -> None:
    """Both entries of the peer at the other end of the traffic: where to send to it, and that it may send."""
    peer = bytes(parse_ip(bed.words["host"]))
    for found in _maps(bed):
        found.delete([key for key, value in found.items().items() if peer in (key, value[:4])])


def _bend(bed: Bed) -> None:
    """Its packets would go to a host that is not there."""
    peer, nowhere = (bytes(parse_ip(bed.words[word])) for word in ("host", "nowhere"))
    for found in _maps(bed):
        found.update({key: nowhere + value[4:] for key, value in found.items().items() if value[:4] == peer})


def _replace(bed: Bed) -> None:
    run_in(bed.host.netns, _drop_everything)


def _drop_everything() -> None:
    """Put a program that drops everything in the place of each of ours, under its name."""
    drop = Program("foreign")
    drop.set(Reg.R0, TC_ACT_SHOT)
    drop.exit()
    with closing(Loaded.load("foreign", drop.code())) as loaded, closing(Socket()) as sock:
        for device, direction in HOOKS:
            ifindex = socket.if_nametoindex(device)
            for one in tc.filters(sock, ifindex, direction):
                if one.name.startswith(OURS):
                    tc.attach(sock, ifindex, direction, loaded.fd, one.name, one.priority)


PROGRAMS = [
    Fault("programs replaced by others", ("F30",), ("udp",), act=_replace),
    Fault("maps of the programs emptied", ("F30",), ("udp",), act=_empty, lost_at_most=0),
    Fault("a peer deleted from the maps", ("F30",), ("udp",), act=_delete_peer, lost_at_most=0),
    Fault("a peer bent to another host in the maps", ("F30",), ("udp",), act=_bend, lost_at_most=0),
]
