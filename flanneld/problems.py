"""What keeps this host from being ready, by part; shown on ``/readyz`` and in systemd's status line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Problem = Callable[[str | None], None]
"""A part says what is wrong with it, in one sentence, or None when it is well."""


class Problems:
    """One slot for each part; a part that has said nothing yet is not ready."""

    def __init__(self, changed: Callable[[Sequence[str]], None]) -> None:
        self._changed = changed
        self._slots: dict[str, str | None] = {}

    def slot(self, part: str, at_first: str | None = None) -> Problem:
        """Reserve a slot.

        Args:
            part: its name; two parts of one name share the slot.
            at_first: what stands there until the part says otherwise.
        """
        self._slots[part] = at_first

        def say(problem: str | None) -> None:
            if self._slots[part] != problem:
                self._slots[part] = problem
                self._changed(self.now())

        self._changed(self.now())
        return say

    def now(self) -> list[str]:
        """All present problems."""
        return [problem for problem in self._slots.values() if problem]
