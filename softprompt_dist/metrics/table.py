"""Tables that read well in Markdown and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right, all as wide as they need."""
    cells = [[_escaped(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = f"|:{'-' * widths[0]}-|" + "|".join(f"-{'-' * width}:" for width in widths[1:]) + "|"
    lines = [_line(row, widths) for row in cells]
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = cells
    right = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
    return "| " + " | ".join([name.ljust(widths[0]), *right]) + " |"


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")
