"""Ellipsoids: where a concave function of a few numbers, none negative, is largest.

Whatever point is looked at, larger values are on one side of it: there the function rises. Of the ellipsoid in which
the largest value is, that half is in a smaller one, and less than half of it if a larger value is known already.

Source: Shor, "Cut-off method with space extension in convex programming problems" (Cybernetics, 1977); the deep cuts
are in Bland, Goldfarb, Todd, "The ellipsoid method: a survey" (Operations Research, 1981).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ellipsoid:
    """Where the largest value is.

    Args:
        size: how many numbers it is a function of, at least 2.
        radius: of the ball around zero to begin with.

    Example::

        >>> ellipsoid, best = Ellipsoid(2, 10.0), torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> for _ in range(80):
        ...     if ellipsoid.cut_to_positive():
        ...         _ = ellipsoid.cut(best - ellipsoid.centre, 0.0, 0.0)
        >>> ellipsoid.centre.round(decimals=3)
        tensor([3., 1.], dtype=torch.float64)
    """

    def __init__(self, size: int, radius: float) -> None:
        self.size, self.centre = size, torch.zeros(size, dtype=torch.float64)
        self.shape = torch.eye(size, dtype=torch.float64) * radius**2

    def cut_to_positive(self) -> bool:
        """Return whether the centre has no negative number; otherwise cut the lowest off."""
        lowest = int(self.centre.argmin())
        if self.centre[lowest] >= 0:
            return True
        way = torch.zeros_like(self.centre)
        way[lowest] = 1.0
        self.cut(way, -float(self.centre[lowest]), 0.0)
        return False

    def cut(self, rise: Tensor, missing: float, small: float) -> bool:
        """Keep the side where, going along ``rise`` from the centre, at least what is missing is gained.

        Returns:
            False if no more than ``small`` can be gained.
        """
        width = float((rise @ self.shape @ rise).clamp(min=0).sqrt())
        if width <= max(small, missing, 0.0):
            return False
        depth, size = missing / width, self.size
        step = self.shape @ rise / width
        self.centre = self.centre + (1 + size * depth) / (size + 1) * step
        shrink = 2 * (1 + size * depth) / ((size + 1) * (1 + depth))
        self.shape = size**2 * (1 - depth**2) / (size**2 - 1) * (self.shape - shrink * torch.outer(step, step))
        return True
