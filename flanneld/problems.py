"""What keeps this host from being ready, and what it works in spite of, by part; shown by ``/readyz``, by systemd's
status line and by ``flannelctl status``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

Problem = Callable[[str | None], None]
"""A part says what is wrong with it, in one sentence, or None when it is well."""


class Notices:
    """What a part says beside its problems: each sentence is a line in the log when it begins to hold and one when it
    does no longer, and a remark in between.

    Args:
        log: where the lines go.
        remark: as ``Problems.remark`` gives it.
        said: what the log has already.
    """

    def __init__(self, log: logging.Logger, remark: Problem, said: Iterable[str] = ()) -> None:
        self._log, self._remark = log, remark
        self._said = list(said)
        self._shown: str | None = None

    def say(self, sentences: Iterable[str], remark: Iterable[str] | None = None) -> None:
        """All that holds now.

        Args:
            sentences: for the log.
            remark: those of them to be shown as a remark too; None = all.
        """
        holding = list(dict.fromkeys(sentences))
        for sentence in holding:
            if sentence not in self._said:
                self._log.warning("%s", sentence)
        for sentence in self._said:
            if sentence not in holding:
                self._log.info("no longer: %s", sentence)
        self._said = holding
        shown = "; ".join(holding if remark is None else remark) or None
        if shown != self._shown:
            self._shown = shown
            self._remark(shown)


class Problems:
    """One slot for each part; a part that has said nothing yet is not ready."""

    def __init__(self, changed: Callable[[Sequence[str]], None]) -> None:
        self._changed = changed
        self._slots: dict[str, str | None] = {}
        self._remarks: dict[str, str | None] = {}

    def slot(self, part: str, at_first: str | None = None) -> Problem:
        """Reserve a slot.

        Args:
            part: its name; two parts of one name share the slot.
            at_first: what stands there until the part says otherwise.
        """
        return self._sayer(self._slots, part, at_first)

    def remark(self, part: str) -> Problem:
        """Reserve a slot for what does not keep this host from being ready."""
        return self._sayer(self._remarks, part, None)

    def _sayer(self, slots: dict[str, str | None], part: str, at_first: str | None) -> Problem:
        slots[part] = at_first

        def say(problem: str | None) -> None:
            if slots[part] != problem:
                slots[part] = problem
                self._changed(self.now())

        self._changed(self.now())
        return say

    def remarks(self) -> list[str]:
        """What works but is not as it should be."""
        return [remark for remark in self._remarks.values() if remark]

    def now(self) -> list[str]:
        """All present problems."""
        return [problem for problem in self._slots.values() if problem]
