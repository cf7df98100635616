"""A chart of errors against costs, inside of a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from drawing import Drawing, Point


@dataclass(frozen=True)
class Chart:
    """Axes from 0 to 1 to the right, and from 0 to ``top`` upwards.

    Args:
        picture: to draw in.
        x: of the origin.
        y: of the origin.
        width: of the axes.
        height: of the axes.
        top: value at the upper end.
    """

    picture: Drawing
    x: float
    y: float
    width: float
    height: float
    top: float = 1.0

    def at(self, across: float, up: float) -> Point:
        """Return where a value stands in the drawing."""
        return self.x + across * self.width, self.y - up / self.top * self.height

    def axes(self, across: str, up: str = "", marks: Sequence[float] = (0.0, 0.5, 1.0)) -> None:
        """Draw the axes, their names and the shares below."""
        self.picture.path([(self.x, self.y - self.height), (self.x, self.y), (self.x + self.width, self.y)], "axis")
        for share in marks:
            left = self.x + share * self.width
            self.picture.path([(left, self.y), (left, self.y + 4)], "axis")
            self.picture.text(left, self.y + 17, f"{share:.0%}", "soft", "middle")
        self.picture.text(self.x + self.width / 2, self.y + 34, across, "soft", "middle")
        self.picture.text(self.x - 8, self.y - self.height - 8, up, "soft")

    def curve(self, points: Sequence[Point], style: str) -> None:
        """Draw a line through values."""
        self.picture.path([self.at(*point) for point in points], style)

    def steps(self, points: Sequence[Point], style: str) -> None:
        """Draw values each of which holds up to the next."""
        corners = [points[0]]
        for (_, before), (across, up) in pairwise(points):
            corners += [(across, before), (across, up)]
        self.curve(corners, style)

    def level(self, up: float, style: str) -> None:
        """Draw a line at one height."""
        self.curve([(0, up), (1, up)], style)
