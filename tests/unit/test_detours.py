"""When packets that are led past our routes are worth telling: not for a moment, not for ever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import cast

from flanneld.contracts import DataPath
from flanneld.duties.detours import BLOCKS, DetourWatch
from flanneld.errors import KernelError
from flanneld.model.addr import Prefix
from flanneld.model.objects import Route
from flanneld.model.state import Desired

PEERS = list(Prefix.parse("10.244.0.0/16").subnets(24))[1:200]
NETWORK = Route(Prefix.parse("10.244.0.0/16"), "flannel.1")


class Bed:
    """A watch, a kernel whose rules the test decides, and what is shown."""

    def __init__(self, peers: int) -> None:
        self.shown: list[Sequence[str]] = [[]]
        self.past: dict[Prefix, str] = {}
        self.asked: list[Prefix] = []
        desired = Desired()
        for obj in (NETWORK, *(Route(block, "flannel.1", block.host(0), onlink=True) for block in PEERS[:peers])):
            desired.add(obj)
        path = cast(DataPath, SimpleNamespace(desired=desired))
        self.watch = DetourWatch(path, self.answer, self.shown.append)

    def answer(self, blocks: Iterable[Prefix]) -> dict[Prefix, str]:
        self.asked = list(blocks)
        return {block: how for block, how in self.past.items() if block in self.asked}


def test_a_detour_is_told_when_it_is_seen_again_and_ends_when_it_is_gone() -> None:
    bed = Bed(peers=3)
    bed.past = {PEERS[0]: "are refused (Permission denied)", PEERS[1]: "are refused (Permission denied)"}
    bed.watch.look()
    assert bed.shown == [[]]
    bed.watch.look()
    bed.watch.look()
    [_, [text]] = bed.shown
    assert text.startswith("packets to 10.244.1.0/24 (and 1 more) are refused (Permission denied), by a routing")
    assert "remove the rule" in text
    bed.past = {}
    bed.watch.look()
    assert bed.shown[-1] == []


def test_what_is_seen_once_is_not_told() -> None:
    bed = Bed(peers=3)
    for number in range(3):
        bed.past = {PEERS[number]: "are refused (Permission denied)"}
        bed.watch.look()
    assert bed.shown == [[]]


def test_a_kernel_that_cannot_be_asked_changes_nothing() -> None:
    bed = Bed(peers=1)

    def refuse(_blocks: Iterable[Prefix]) -> dict[Prefix, str]:
        raise KernelError("send to the kernel", 105)

    bed.watch._past = refuse
    bed.watch.look()
    assert bed.shown == [[]]


def test_of_many_peers_every_one_is_looked_at_in_turn_and_never_more_than_a_few_at_once() -> None:
    bed, seen = Bed(peers=199), set()
    for _ in range(4):
        bed.watch.look()
        assert len(bed.asked) <= BLOCKS
        seen.update(bed.asked)
    assert seen == set(PEERS)


def test_without_peers_the_network_itself_is_looked_at() -> None:
    bed = Bed(peers=0)
    bed.watch.look()
    assert bed.asked == [NETWORK.dst]
