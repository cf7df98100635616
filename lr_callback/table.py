"""Tables: aligned plain text, for terminals, logs and messages."""

from __future__ import annotations

from collections.abc import Sequence


def align(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Return rows under a header as aligned text, two blanks between columns.

    Args:
        header: titles.
        rows: cells, as many a row as the header has.
        right: indices of the columns that are aligned to the right.

    Example::

        >>> print(align(["layer", "rank"], [["conv1", "12"]], right=frozenset({1})))
        layer  rank
        conv1    12
    """
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(_line(line, widths, right) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: frozenset[int]) -> str:
    padded = (
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def shorten(text: str, width: int) -> str:
    """Return the text at no more than ``width`` characters, its middle left out if it is longer.

    Example::

        >>> shorten("layer1.0.conv1", 9)
        'layer...1'
        >>> shorten("conv1", 9)
        'conv1'
    """
    if len(text) <= width:
        return text
    tail = (width - 3) // 4
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"
