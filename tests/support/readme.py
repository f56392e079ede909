"""The commands that a page of documentation marks as having been run, so that a test can run them.

A line ``<!-- run on: ROLE -->`` stands before an indented block of commands; the page gives each role a machine.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

_BLOCK = re.compile(r"^<!-- run on: (\w+) -->\n\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Role and commands of each marked block, in the order of the page."""
    text = page.read_text()
    found = [(role, textwrap.dedent(commands).strip() + "\n") for role, commands in _BLOCK.findall(text)]
    if len(found) != text.count("<!-- run on:"):
        raise ValueError(f"{page.name}: a mark has no indented block behind it, or is not alone on its line")
    return found
