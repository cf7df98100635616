"""Base: what the metrics have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reduction = Literal["mean", "max", "min"]
_REDUCTIONS: Mapping[str, tuple[float, str, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": (0.0, "sum", torch.add),
    "max": (-inf, "max", torch.maximum),
    "min": (inf, "min", torch.minimum),
}
"""Reduction -> what it begins with, how processes are brought together, and how updates are."""


class Plotted(Metric):
    """A metric of one number, which torchmetrics can plot."""

    full_state_update = False
    plot_lower_bound = 0.0

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Plot a value, or values one after the other, with matplotlib.

        Args:
            val: of ``compute`` or ``forward``, or a list of such; None: what ``compute`` gives now.
            ax: where to draw; None: in a figure of its own.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return cast("tuple[Figure | None, Axes]", self._plot(val, ax))


class OfLayers(Plotted):
    """A number of every layer that it is given, brought together.

    Args:
        setting: what the number depends on besides the layer, as a name.
        reduction: ``mean``, ``max`` or ``min`` over all updates, and over the processes of a distributed run.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no such reduction.
    """

    count: Tensor

    def __init__(self, setting: str, reduction: Reduction, **kwargs: object) -> None:
        if reduction not in list(_REDUCTIONS):  # what cannot be hashed is none, too
            where = type(self).__name__
            raise ValueError(f"{where}: `reduction` must be one of {list(_REDUCTIONS)}, got {reduction!r}.")
        super().__init__(**kwargs)
        self.reduction = reduction
        # A MetricCollection takes metrics for one whose states have the same names and, after the first update, the
        # same values: the name of a state says all that tells it from others.
        self._state = f"{reduction}_{type(self).__name__}_{setting}"
        start, over_processes, _ = _REDUCTIONS[reduction]
        self.add_state(self._state, torch.tensor(start), dist_reduce_fx=over_processes)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, number: Tensor | float) -> None:
        """Take in the number of one layer."""
        before: Tensor = getattr(self, self._state)
        _, _, combine = _REDUCTIONS[self.reduction]
        setattr(self, self._state, combine(before, torch.as_tensor(number).to(before)))
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """Return the mean, the largest or the smallest number of all updates; NaN before the first."""
        found: Tensor = getattr(self, self._state)
        return found / self.count if self.reduction == "mean" else found.where(self.count > 0, torch.nan)
