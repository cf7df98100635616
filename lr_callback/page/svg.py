"""Svg: a figure of matplotlib as an element of a page."""

from __future__ import annotations

import io
import re
from importlib import import_module
from typing import TYPE_CHECKING

from lr_callback.page.markup import Markup, escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_START = re.compile(r'<svg [^>]*?viewBox="(0 0 ([\d.]+) [^"]*)"[^>]*>')
_SCALES = (0.9, 1.7)
"""Pixels for a point of the figure, at least and at most: letters of all figures of a page are read, and alike."""
_NOTES = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", re.DOTALL)
_NAMES = re.compile(r'(\bid="|url\(#|href="#)')
_ATTRIBUTES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
    'style="stroke-linejoin: round; stroke-linecap: butt; --points: {}; min-width: {}px; max-width: {}px"'
)
"""What each figure has. The style is that of matplotlib's own sheet, which would hold for the whole page.

By ``--points``, the width of the figure, the page scales it on paper.
"""


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return a figure as an ``<svg>`` element that fits its place, on any ground, and needs no font and no other file.

    The same figure gives the same text. The names inside of it begin with ``name``, so that several figures can stand
    in one page.

    Args:
        figure: is not changed.
        name: of letters, digits and hyphens; another one for each figure of a page.
        label: what a person is told who does not see the figure.

    Raises:
        ValueError: If the name is of other characters.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(f"`name` must be of letters, digits and hyphens, a letter first, got {name!r}.")
    written = io.StringIO()
    with import_module("matplotlib").rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = _NAMES.sub(rf"\g<1>{name}-", _NOTES.sub("", text[text.index("<svg") :]))

    def begun(found: re.Match[str]) -> str:
        attributes = _ATTRIBUTES.format(*(round(scale * float(found[2])) for scale in (1, *_SCALES)))
        return f'<svg viewBox="{found[1]}" aria-label="{escaped(label)}" {attributes}>'

    return Markup(_START.sub(begun, text, count=1))
