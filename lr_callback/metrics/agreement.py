"""Agreement: how often two models predict the same class."""

from __future__ import annotations

import torch
from torch import Tensor

from lr_callback.metrics.base import Plotted
from lr_callback.metrics.functional.agreement import agreeing, check_top_k


class PredictionAgreement(Plotted):
    """Fraction of samples for which a model predicts the class that another one, usually the dense one, does.

    It needs no labels. All samples count the same, whatever the size of their batch and the process that they are on.

    Args:
        top_k: the other model's class must be among so many that the model scores highest.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``top_k`` is no whole number.
        ValueError: If it is below 1.

    Example::

        >>> from lr_callback.metrics import PredictionAgreement
        >>> metric = PredictionAgreement()
        >>> metric.update(torch.tensor([[4.0, 3.0], [0.0, 1.0]]), torch.tensor([[5.0, 2.0], [3.0, 2.0]]))
        >>> metric.update(torch.tensor([[4.0, 3.0], [0.0, 1.0]]), torch.tensor([[5.0, 2.0], [2.0, 3.0]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    plot_upper_bound = 1.0
    samples: Tensor

    def __init__(self, top_k: int = 1, **kwargs: object) -> None:
        check_top_k(top_k)
        super().__init__(**kwargs)
        self.top_k = top_k
        # A MetricCollection takes metrics whose states have the same names and values for one.
        self._agreed = f"agreed_in_top_{top_k}"
        self.add_state(self._agreed, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            preds: class scores of the model, as of :func:`~lr_callback.metrics.functional.prediction_agreement`.
            target: class scores of the model that it is compared with, of the same shape.

        Raises:
            TypeError: If one is no tensor. Nothing was added.
            ValueError: If the shapes or the dtypes are others. Nothing was added.
        """
        agreed = agreeing(preds, target, self.top_k)
        setattr(self, self._agreed, getattr(self, self._agreed) + agreed.sum())
        self.samples = self.samples + agreed.numel()

    def compute(self) -> Tensor:
        """Return the fraction of all samples; NaN before the first."""
        agreed: Tensor = getattr(self, self._agreed)
        return agreed / self.samples
