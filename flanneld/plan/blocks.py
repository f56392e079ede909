"""Address blocks that may lie inside one another, and which of them overlap. Pure.

Costs nothing while all blocks have one length, as flannel's have: then none overlap.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from flanneld.model.addr import IP, Prefix


class Blocks:
    """A set of blocks of one family; host bits are cleared."""

    def __init__(self) -> None:
        self._all: set[Prefix] = set()
        self._lengths: Counter[int] = Counter()
        self._order: list[Prefix] | None = None
        """All of them in order, a block before those inside it; made when blocks of a second length come."""

    def put(self, block: Prefix, *, is_there: bool) -> None:
        """Add or remove a block; what is so already stays so."""
        if (block in self._all) == is_there:
            return
        if is_there:
            self._all.add(block)
            self._lengths[block.length] += 1
            if self._order is not None:
                insort(self._order, block)
            return
        self._all.discard(block)
        self._lengths[block.length] -= 1
        if not self._lengths[block.length]:
            del self._lengths[block.length]
        if self._order is not None:
            del self._order[bisect_left(self._order, block)]

    def overlapping(self, block: Prefix) -> Iterator[Prefix]:
        """The other blocks that share an address with this one, which need not be in the set."""
        if len(self._lengths) < 2 and block.length in self._lengths:
            self._order = None
            return
        yield from self._around(block)
        yield from self._inside(block)

    def _around(self, block: Prefix) -> Iterator[Prefix]:
        bits = len(block.ip) * 8
        value = int.from_bytes(block.ip, "big")
        for length in sorted(self._lengths):
            if length >= block.length:
                return
            shift = bits - length
            outer = Prefix(IP((value >> shift << shift).to_bytes(len(block.ip), "big")), length)
            if outer in self._all:
                yield outer

    def _inside(self, block: Prefix) -> Iterator[Prefix]:
        if not any(length > block.length for length in self._lengths):
            return
        if self._order is None:
            self._order = sorted(self._all)
        order, last = self._order, block.last.to_bytes(len(block.ip), "big")
        for at in range(bisect_left(order, Prefix(block.ip, block.length + 1)), len(order)):
            if order[at].ip > last:
                return
            yield order[at]
