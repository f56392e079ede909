"""Explores every state that a system can get into, and asks two things: is each of them right, does each lead to rest.

Knows nothing of leases. States are hashable values; a system says what can happen in one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Move(NamedTuple, Generic[S]):
    """One thing that can happen."""

    label: str
    is_fault: bool
    """What nobody can count on to happen: rest has to be reached without it."""
    after: S


class System(Protocol[S]):
    """What is explored."""

    def start(self) -> S:
        """Where it begins."""
        ...

    def moves(self, state: S) -> Iterator[Move[S]]:
        """All that can happen.

        Raises:
            Violation: one of them must not.
        """
        ...

    def is_quiet(self, state: S) -> bool:
        """Whether nothing needs to happen any more."""
        ...

    def check(self, state: S) -> None:
        """Raises ``Violation`` for a state that must not be."""
        ...


class Violation(Exception):
    """A rule was broken; the text says which."""


class Broken(AssertionError):
    """A rule was broken, with the way there."""


class Explored(NamedTuple):
    """What exploring came to."""

    states: int
    moves: int


def explore(system: System[S], *, at_most: int = 1_000_000) -> Explored:
    """Visit all states breadth first, so that the way to a broken rule is a shortest one.

    Raises:
        Broken: with the moves that lead there, one a line.
    """
    first = system.start()
    came_by: dict[S, tuple[S, str] | None] = {first: None}
    before: defaultdict[S, list[S]] = defaultdict(list)
    quiet: list[S] = []
    todo, count = deque([first]), 0
    while todo:
        state = todo.popleft()
        try:
            system.check(state)
            for label, is_fault, after in system.moves(state):
                count += 1
                if not is_fault:
                    before[after].append(state)
                if after not in came_by:
                    came_by[after] = (state, label)
                    todo.append(after)
        except Violation as broken:
            raise Broken(f"{broken}\n{_way(came_by, state)}") from None
        if system.is_quiet(state):
            quiet.append(state)
        if len(came_by) > at_most:
            raise AssertionError(f"more than {at_most} states")
    _check_rest(came_by, before, quiet)
    return Explored(len(came_by), count)


def _check_rest(came_by: dict[S, tuple[S, str] | None], before: dict[S, list[S]], quiet: list[S]) -> None:
    leads = set(quiet)
    todo = deque(quiet)
    while todo:
        for state in before.get(todo.popleft(), ()):
            if state not in leads:
                leads.add(state)
                todo.append(state)
    for state in came_by:
        if state not in leads:
            raise Broken(f"nothing leads to rest from here\n{_way(came_by, state)}")


def _way(came_by: dict[S, tuple[S, str] | None], state: S) -> str:
    lines = [f"  => {state}"]
    while (step := came_by[state]) is not None:
        state, label = step
        lines.append(f"  {label}")
    return "\n".join(reversed(lines))
