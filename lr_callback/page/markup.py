"""Markup: elements of HTML, in which a text is escaped wherever it stands."""

from __future__ import annotations

import html
from collections.abc import Iterable

_EMPTY = frozenset({"meta", "br"})
"""Elements that have no end."""


class Markup(str):
    """Text that is HTML already. Every other text is escaped.

    Example::

        >>> tag("p", "a < b", Markup("<br>"))
        '<p>a &lt; b<br></p>'
    """

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | None) -> Markup:
    """Return an element.

    Args:
        name: of the element.
        children: elements, or texts, which are escaped.
        attributes: name -> value, which is escaped; an underscore in a name stands for a hyphen, one at its end for
            nothing; None: left out.

    Example::

        >>> tag("th", "<script>", class_="name", aria_label='"b"')
        '<th class="name" aria-label="&quot;b&quot;">&lt;script&gt;</th>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>" if name in _EMPTY else f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Return elements and texts one after the other; texts are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escaped(part) for part in parts))


def escaped(text: str) -> Markup:
    r"""Return a text as HTML; what cannot be shown, or would turn the direction of what follows, is marked.

    Example::

        >>> escaped('a & "b"\x00')
        'a &amp; &quot;b&quot;�'
    """
    shown = "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in text)
    return Markup(html.escape(shown, quote=True))
