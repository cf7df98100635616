"""Docstrings as the site shows them: Sphinx's roles become links, and sections that Google's style lacks get a form.

mkdocstrings reads Markdown; the docstrings of the package are reStructuredText, as Python's ``help`` shows them well.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example::\n\n", flags=re.MULTILINE)
_SECTION = re.compile(r"^(\s*)(Source|Differences|Memory):(?= )", flags=re.MULTILINE)
_TABLE = re.compile(r"^(=+(?: +=+)+)\n(.*)\n\1\n((?:.+\n)+?)\1$", flags=re.MULTILINE)


def to_markdown(text: str, resolve: Callable[[str], str] = str) -> str:
    """Translate a docstring.

    Args:
        text: of the docstring, without indentation.
        resolve: from a name in it to its full path.

    Example::

        >>> to_markdown("See :func:`~package.room.fold`.")
        'See <autoref identifier="package.room.fold" optional><code>fold</code></autoref>.'
    """

    def link(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{resolve(name)}" optional><code>{shown}</code></autoref>'

    text = _TABLE.sub(_table, text)
    text = _EXAMPLE.sub(r"\1Examples:\n", text)
    text = _SECTION.sub(r"\1**\2:**", text)
    return _ROLE.sub(link, text)


def _table(match: re.Match[str]) -> str:
    """Write a table of reStructuredText, whose edges say where columns begin, as one of Markdown."""
    edge, head, body = match.groups()
    starts = [one.start() for one in re.finditer(r"=+", edge)]
    ends = [*starts[1:], None]

    def row(line: str) -> str:
        cells = (line[start:end].strip() for start, end in zip(starts, ends, strict=True))
        return f"| {' | '.join(cells)} |"

    return "\n".join([row(head), "|" + " --- |" * len(starts), *map(row, body.splitlines())])


def full_path(obj: griffe.Object, name: str) -> str:
    """Return the path of a name that a docstring writes: of the object's own members, or as seen from its module."""
    first, _, rest = name.partition(".")
    if first == obj.package.name:
        return name
    if first in obj.members:
        return f"{obj.path}.{name}"
    if obj.parent is not None and obj.parent.is_class and first in obj.parent.members:
        return f"{obj.parent.path}.{name}"
    try:
        return ".".join(filter(None, (obj.resolve(first), rest)))
    except griffe.NameResolutionError:
        return name


class Docstrings(griffe.Extension):
    """Translate the docstring of each object once, when it has been read."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **others: object) -> None:
        """Translate one."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, lambda name: full_path(obj, name))
