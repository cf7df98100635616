"""Drawings as SVG: plain text, the same on every machine, each on a card, light or dark as the reader's screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Point = tuple[float, float]
"""x to the right and y down, in units of the drawing."""

_STYLE = """
  .card { fill: #ffffff; stroke: #d5dbe1; }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1f2937; }
  text.title { font-size: 15px; font-weight: 600; }
  text.small, text.soft { font-size: 11.5px; }
  text.soft { fill: #5b6675; }
  text.code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
  text.mark { fill: #c2410c; font-weight: 600; font-size: 12px; }
  .edge { fill: none; stroke: #64748b; stroke-width: 1.2; }
  .axis { fill: none; stroke: #94a3b8; stroke-width: 1; }
  .head { fill: #64748b; }
  .quiet { fill: #e2e8f0; }
  .panel { fill: #f1f5f9; stroke: #d5dbe1; }
  .encoder { fill: #bfdbfe; stroke: #3b82f6; }
  .decoder { fill: #fed7aa; stroke: #ea8a2e; }
  .ca { fill: #3b82f6; } .cb { fill: #22a06b; } .cc { fill: #eab308; } .cd { fill: #a855f7; }
  .h0 { fill: #1e5aa8; } .h1 { fill: #6ea3dc; } .h2 { fill: #c5daf2; }
  .m0 { fill: #c2410c; } .m1 { fill: #f08c4a; } .m2 { fill: #fbd0ae; }
  .la { fill: none; stroke: #3b82f6; stroke-width: 2; } .lb { fill: none; stroke: #22a06b; stroke-width: 2; }
  .lc { fill: none; stroke: #ca9a04; stroke-width: 2; }
  .frontier { fill: none; stroke: #1f2937; stroke-width: 4; stroke-opacity: 0.22; }
  .limit { fill: none; stroke: #c2410c; stroke-width: 1.6; }
  .dashed { stroke-dasharray: 5 4; }
  .dot { fill: #c2410c; stroke: #ffffff; }
"""
_DARK = """
    .card { fill: #171b26; stroke: #333b4d; }
    text { fill: #e5e9f0; }
    text.soft { fill: #a3adbd; }
    text.mark { fill: #fb9a5c; }
    .edge { stroke: #8b97aa; } .axis { stroke: #566177; } .head { fill: #8b97aa; }
    .quiet { fill: #333b4d; }
    .panel { fill: #1f2534; stroke: #333b4d; }
    .encoder { fill: #1e3a68; stroke: #5b9bf5; }
    .decoder { fill: #5f3814; stroke: #f0a04e; }
    .h0 { fill: #2f6fc4; } .h1 { fill: #79aee6; } .h2 { fill: #cfe1f6; }
    .m0 { fill: #d9531c; } .m1 { fill: #f59a5e; } .m2 { fill: #fcd9bf; }
    .frontier { stroke: #ffffff; stroke-opacity: 0.3; }
    .limit { stroke: #fb9a5c; } .dot { fill: #fb9a5c; stroke: #171b26; }
"""


class Drawing:
    """What is drawn, in order; what comes later lies on top.

    Args:
        width: of the drawing.
        height: of the drawing.
        title: what it shows, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, style: str, rounded: float = 0) -> None:
        """Add a rectangle."""
        corner = f' rx="{number(rounded)}"' if rounded else ""
        size = f'width="{number(width)}" height="{number(height)}"'
        self.parts.append(f'<rect x="{number(x)}" y="{number(y)}" {size}{corner} class="{style}"/>')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """Add a line of text, its base line at y; the anchor is start, middle or end."""
        kind = f' class="{style}"' if style else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{kind}{place}>{escape(words, quote=False)}</text>')

    def lines(self, x: float, y: float, words: Iterable[str], style: str = "", step: float = 17) -> None:
        """Add several lines of text, one below the other."""
        for index, line in enumerate(words):
            self.text(x, y + index * step, line, style)

    def path(self, points: Sequence[Point], style: str) -> None:
        """Add straight lines from point to point."""
        listed = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{listed}" class="{style}"/>')

    def arrow(self, start: Point, end: Point) -> None:
        """Add a line with a head at its end, to the right or down."""
        (x, y), flat = end, start[1] == end[1]
        self.path([start, (x - 6, y) if flat else (x, y - 6)], "edge")
        sides = [(x - 8, y - 4), (x - 8, y + 4)] if flat else [(x - 4, y - 8), (x + 4, y - 8)]
        listed = " ".join(f"{number(a)},{number(b)}" for a, b in [end, *sides])
        self.parts.append(f'<polygon points="{listed}" class="head"/>')

    def dot(self, x: float, y: float, style: str = "dot") -> None:
        """Add a dot."""
        self.parts.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="4.5" class="{style}"/>')

    def cells(self, x: float, y: float, styles: Sequence[Sequence[str]], size: float) -> None:
        """Add a matrix, a square for each entry."""
        squares: dict[str, list[str]] = {}
        for row, line in enumerate(styles):
            for column, style in enumerate(line):
                corner = f"M{number(x + column * size)} {number(y + row * size)}"
                squares.setdefault(style, []).append(f"{corner}h{size - 1:g}v{size - 1:g}h-{size - 1:g}z")
        self.parts += [f'<path d="{"".join(found)}" class="{style}"/>' for style, found in sorted(squares.items())]

    def svg(self) -> str:
        """Return the file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(self.width)} {number(self.height)}" '
            f'width="{number(self.width)}" role="img">'
        )
        style = f"<style>{_STYLE}  @media (prefers-color-scheme: dark) {{{_DARK}  }}\n</style>"
        size = f'width="{number(self.width - 1)}" height="{number(self.height - 1)}"'
        card = f'<rect x="0.5" y="0.5" {size} rx="8" class="card"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", style, card, *self.parts, "</svg>", ""])


def number(value: float) -> str:
    """Return a number to one digit after the point, without a zero there.

    Example::

        >>> number(3.0), number(2.25), number(-0.01)
        ('3', '2.2', '0')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
