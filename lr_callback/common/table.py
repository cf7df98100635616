"""Tables: aligned plain text, for terminals, logs and messages."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80
"""Characters of a line of a terminal that is not known to be wider."""


def readable(name: str) -> str:
    """Return a layer's name without what ``torch.compile`` puts into it.

    Example::

        >>> readable("network._orig_mod.0")
        'network.0'
    """
    return name.replace("_orig_mod.", "")


def printable(text: str) -> str:
    r"""Return the text in printable ASCII, anything else as Python escapes it: one column a character, anywhere.

    Example::

        >>> printable("conv1"), printable("gr\xf6\xdfe\x1b")
        ('conv1', 'gr\\xf6\\xdfe\\x1b')
    """
    return text.encode("unicode_escape").decode("ascii")


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
    """Return the text at no more than ``width`` characters; of a longer one its end, which tells layers apart.

    Example::

        >>> shorten("encoder.layers.11.mlp.0", 11)
        '...11.mlp.0'
        >>> shorten("conv1", 9)
        'conv1'
    """
    if len(text) <= width:
        return text
    return f"...{text[len(text) - max(0, width - 3) :]}"[:width]


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first of some names for a message, and that there are more.

    Example::

        >>> listed(["one", "two", "three"], most=2), listed(["one"])
        ('one, two, ...', 'one')
    """
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def on_one_line(text: object, most: int = 400) -> str:
    r"""Return a text, or that of an error, on one line for a message, cut off where it is long.

    Example::

        >>> on_one_line(ValueError("no\n  such file")), on_one_line("too long", most=3)
        ('no such file', 'too')
    """
    return " ".join(str(text).split())[:most]


def wrap(text: str) -> str:
    """Return the text in lines of at most :data:`WIDTH` characters, the later ones indented; no word is longer."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
