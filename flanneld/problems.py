"""What keeps this host from being ready, and what it works in spite of, by part; shown by ``/readyz``, by systemd's
status line and by ``flannelctl status``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

Problem = Callable[[str | None], None]
"""A part says what is wrong with it, in one sentence, or None when it is well."""

Remarks = Callable[[Sequence[str]], None]
"""A part says all that is not as it should be, a sentence each."""


class Notices:
    """What a part says beside its problems: each sentence is a line in the log when it begins to hold and one when it
    does no longer, and a remark in between.

    Args:
        log: where the lines go.
        remark: as ``Problems.remarks_of`` gives it.
        said: what the log has already.
    """

    def __init__(self, log: logging.Logger, remark: Remarks, said: Iterable[str] = ()) -> None:
        self._log, self._remark = log, remark
        self._said = list(said)
        self._shown: list[str] = []

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
        shown = holding if remark is None else list(remark)
        if shown != self._shown:
            self._shown = shown
            self._remark(shown)


class Problems:
    """One slot for each part; a part that has said nothing yet is not ready."""

    def __init__(self, changed: Callable[[Sequence[str]], None]) -> None:
        self._changed = changed
        self._slots: dict[str, tuple[str, ...]] = {}
        self._remarks: dict[str, tuple[str, ...]] = {}

    def slot(self, part: str, at_first: str | None = None) -> Problem:
        """Reserve a slot.

        Args:
            part: its name; two parts of one name share the slot.
            at_first: what stands there until the part says otherwise.
        """
        return _one(self._sayer(self._slots, part, (at_first,) if at_first else ()))

    def remark(self, part: str) -> Problem:
        """Reserve a slot for what does not keep this host from being ready."""
        return _one(self.remarks_of(part))

    def remarks_of(self, part: str) -> Remarks:
        """As ``remark``, for a part that may have several things to say at a time."""
        return self._sayer(self._remarks, part, ())

    def _sayer(self, slots: dict[str, tuple[str, ...]], part: str, at_first: tuple[str, ...]) -> Remarks:
        slots[part] = at_first

        def say(sentences: Sequence[str]) -> None:
            if slots[part] != (said := tuple(sentences)):
                slots[part] = said
                self._changed(self.now())

        self._changed(self.now())
        return say

    def remarks(self) -> list[str]:
        """What works but is not as it should be."""
        return list(chain.from_iterable(self._remarks.values()))

    def now(self) -> list[str]:
        """All present problems."""
        return list(chain.from_iterable(self._slots.values()))


def _one(say: Remarks) -> Problem:
    return lambda sentence: say((sentence,) if sentence else ())
