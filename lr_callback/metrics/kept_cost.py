"""Kept cost: how much of a dense model's cost is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.decisions.allocation import Allocation
from lr_callback.metrics.base import Plotted
from lr_callback.metrics.functional.costs import costs


class KeptCost(Plotted):
    """Fraction of a dense model's cost that is kept: what all updates keep over what they would cost dense.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Example::

        >>> from lr_callback.metrics import KeptCost
        >>> metric = KeptCost()
        >>> metric.update(kept=30, dense=120)
        >>> metric.compute()
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = False
    plot_upper_bound = 1.0
    kept: Tensor
    dense: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("kept", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("dense", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, kept: int | Allocation | nn.Module, dense: int | nn.Module | None = None) -> None:
        """Add the costs of a model, or of a part of one.

        Args:
            kept: as of :func:`~lr_callback.metrics.functional.kept_cost`.
            dense: likewise.

        Raises:
            TypeError: If an argument is something else, or does not go with the other. Nothing was added.
            ValueError: If a cost is out of range. Nothing was added.
        """
        own, whole = costs(kept, dense)
        self.kept, self.dense = self.kept + own, self.dense + whole

    def compute(self) -> Tensor:
        """Return kept over dense; NaN before the first update."""
        return self.kept / self.dense
