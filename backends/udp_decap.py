"""The program that peers' datagrams come in by; ``udp_programs.py`` says where it stands."""

from __future__ import annotations

from typing import Final, NamedTuple

from backends.udp_programs import (
    FIXED_GSO,
    IPPROTO_UDP,
    IPV4,
    KEY,
    OVERHEAD,
    SKB_GSO_SIZE,
    SKB_PKT_TYPE,
    TC_ACT_SHOT,
    TC_ACT_UNSPEC,
    UDP,
    Count,
    adjust_room,
    count_and_end,
    ending,
    lies,
    load_bytes,
    look_up,
    measure,
    store_bytes,
    take_hop,
)
from flanneld.kernel.bpfasm import Helper, Program, Reg
from flanneld.model.addr import IP

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = Reg

BPF_F_INGRESS = 1
CSUM_LEVEL_QUERY = 0  # BPF_CSUM_LEVEL_QUERY


class Decap(NamedTuple):
    """What a ``decap`` program is made of."""

    sources_fd: int
    counters_fd: int
    ext_ip: IP
    port: int
    tun_ifindex: int
    link_header: int
    """Bytes in front of the IP header on the external interface: 14, or 0 where there is no Ethernet."""
    split_ifindex: int = 0
    """Where aggregates of several datagrams go, and unfinished ones. 0: they are left to the socket."""
    far_end: bool = False
    """This *is* where they come out: nobody behind it reads what the program leaves."""


# Stack of decap, from its end: both outer headers and the inner one.
_INNER: Final = -IPV4
_UDP, _IP = _INNER - UDP, _INNER - UDP - IPV4


def decap(name: str, spec: Decap) -> Program:
    """The program for packets that come in from the external interface.

    What is not for us must cost next to nothing: it is told by a few comparisons and not counted. Of what is for us,
    a fragment or a length that does not add up is left to our socket: the kernel assembles or refuses it there.

    An aggregate of several datagrams (of a sender with UDP_SEGMENT over a virtual link, or of a card with
    ``rx-udp-gro-forwarding``) goes through the compat pair, which splits it, and a second ``decap`` stands at the far
    end. Left to the socket it would be overtaken by the single datagrams around it. So does an unfinished datagram.

    A super-packet of a kernel peer, which comes whole over a virtual link only, keeps the mark of having been in a
    tunnel: kernels up to 6.18 have no helper that takes it off. Packets that are routed to a pod's own device do not
    mind (0.9 of vxlan and more). A bridge device takes none with that mark, so the kernel cuts them in software in
    front of it, and 0.45 of vxlan remains (measured). What a network card receives is single and has no mark.
    """
    p = Program(name)
    p.copy(R6, R1)
    measure(p, spec.link_header + OVERHEAD)
    p.note("both headers of an unfragmented datagram to our address and port, with an IPv4 header behind them")
    load_bytes(p, spec.link_header, _IP, OVERHEAD + IPV4)
    p.branch(R0, "!=", 0, "other")
    for offset, bits, wanted in (
        (_IP, 8, 0x45),
        (_IP + 9, 8, IPPROTO_UDP),
        (_IP + 16, 32, lies(spec.ext_ip)),
        (_UDP + 2, 16, lies(spec.port.to_bytes(2, "big"))),
    ):
        p.load(R2, FP, offset, bits)
        p.branch(R2, "!=", wanted, "other")
    if not spec.far_end:  # there the address is another device's
        p.load(R2, R6, SKB_PKT_TYPE, 32)
        p.branch(R2, "!=", 0, "other")  # PACKET_HOST: not what a promiscuous interface overhears
    p.load(R2, FP, _IP + 6, 16)
    p.branch(R2, "&", lies(b"\x3f\xff"), "leave")
    p.note("from a peer; anybody else is for the socket, with netfilter in front of it")
    p.load(R2, FP, _IP + 12, 32)
    p.store(FP, KEY, R2, 32)
    look_up(p, spec.sources_fd, KEY)
    p.branch(R0, "==", 0, "stranger", bits=64)
    p.load(R2, FP, _INNER, 8)
    p.compute(R2, ">>", 4)
    p.branch(R2, "!=", 4, "leave")
    p.note("all lengths agree, which is not so for an aggregate of several datagrams")
    for offset, more in ((_IP + 2, OVERHEAD), (_UDP + 4, UDP), (_INNER + 2, 0)):
        p.load(R2, FP, offset, 16)
        p.network_order(R2, 16)
        p.compute(R2, "-", more)
        p.branch(R2, "!=", R8, "lengths_differ")
    if not spec.far_end:
        _refuse_unfinished(p, "pair" if spec.split_ifindex else "leave")
    p.load(R2, FP, _INNER + 8, 8)
    p.branch(R2, "<=", 1, "expired")
    p.note("off with the outer headers, on to the TUN")
    adjust_room(p, -OVERHEAD, FIXED_GSO)
    p.branch(R0, "!=", 0, "leave")
    take_hop(p, _INNER)
    # TTL and checksum change by opposite amounts, so a sum over the packet, which the card may have made, stays right.
    store_bytes(p, spec.link_header + 8, _INNER + 8, 4)
    p.branch(R0, "!=", 0, "broken")
    p.set(R1, spec.tun_ifindex)
    p.set(R2, BPF_F_INGRESS)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.RX)
    p.goto("count")
    p.label("lengths_differ")
    if spec.split_ifindex:
        _split(p, spec)
    p.label("leave")
    p.set(R7, Count.RX_ERROR if spec.far_end else Count.RX_LEFT)
    p.set(R9, TC_ACT_SHOT if spec.far_end else TC_ACT_UNSPEC)
    p.goto("count")
    ending(p, "expired", Count.RX_EXPIRED, TC_ACT_SHOT)
    ending(p, "broken", Count.RX_ERROR, TC_ACT_SHOT)
    ending(p, "stranger", Count.RX_STRANGER, TC_ACT_UNSPEC)
    count_and_end(p, spec.counters_fd)
    p.label("other")
    p.set(R0, TC_ACT_UNSPEC)
    p.exit()
    return p


def _refuse_unfinished(p: Program, elsewhere: str) -> None:
    """Send a datagram elsewhere whose own UDP checksum nobody filled in or looked at.

    A sender with a socket leaves it to hardware too, and over a virtual link it comes unfinished. The kernel keeps
    where the checksum belongs, so without the outer headers that place is wrong: a pod behind us never notices, but
    the kernel drops what it has to fragment again, and a card that forwards it would write into the payload. The
    pair finishes it. Our kernel peers send none, and over a real link the card has checked it, which the kernel
    shows as a checksum level or a sum over the packet.
    """
    p.note("an unfinished outer checksum is finished first: there is one, and no card has vouched for it")
    p.load(R2, FP, _UDP + 6, 16)
    p.branch(R2, "==", 0, "finished")
    for helper, argument in ((Helper.CSUM_LEVEL, CSUM_LEVEL_QUERY), (Helper.CSUM_UPDATE, 0)):
        p.copy(R1, R6)
        p.set(R2, argument)
        p.call(helper)
        p.compute(R0, ">>", 32, bits=64)  # both give 32 bits, or a negative error where the packet has no such thing
        p.branch(R0, "==", 0, "finished")
    p.goto(elsewhere)
    p.label("finished")


def _split(p: Program, spec: Decap) -> None:
    p.note("an aggregate: into the pair, to be split")
    p.load(R2, R6, SKB_GSO_SIZE, 32)
    p.branch(R2, "==", 0, "leave")
    p.label("pair")
    p.set(R1, spec.split_ifindex)
    p.set(R2, 0)
    p.call(Helper.REDIRECT)
    p.copy(R9, R0)
    p.set(R7, Count.RX_SPLIT)
    p.goto("count")
