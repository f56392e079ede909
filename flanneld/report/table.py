"""Plain text tables, as people and ``awk`` like them: columns two blanks apart, no frames."""

from __future__ import annotations

from collections.abc import Sequence

from flanneld.model.plain import plain


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a head; the last column is not padded. Cells may hold anybody's text."""
    lines = [head, *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
