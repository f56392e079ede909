"""Text from others, made fit for a terminal and a log: one line, nothing that moves a cursor or turns words around."""

from __future__ import annotations


def plain(text: str) -> str:
    """The text with everything that is not printable escaped: line ends, terminal codes, bidirectional marks."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
