"""Layer error: how wrong factorized layers are beside the dense ones."""

from __future__ import annotations

from torch import Tensor, nn

from lr_callback.metrics.base import OfLayers, Reduction
from lr_callback.metrics.functional.layer_error import check_measure, relative_layer_error


class RelativeLayerError(OfLayers):
    """Relative error of factorized layers beside the dense ones, by default that of the worst.

    Args:
        error: ``slice``, ``operator``, ``bound`` or ``frobenius``, see
            :func:`~lr_callback.metrics.functional.relative_layer_error`.
        reduction: ``max``, the worst of all layers that it is given; ``mean`` or ``min``.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no such measure of weights, or no such reduction.

    Example::

        >>> from torch import nn
        >>> from lr_callback import allocate, factorize_
        >>> from lr_callback.metrics import RelativeLayerError
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> dense, allocation = list(model), allocate(model, 0.5)
        >>> report = factorize_(model, allocation)
        >>> metric = RelativeLayerError()
        >>> for layer, made in zip(dense, model):
        ...     metric.update(layer, made)
        >>> abs(float(metric.compute()) - allocation.worst_error) < 1e-5
        True
    """

    is_differentiable = True
    higher_is_better = False

    def __init__(self, error: str = "slice", reduction: Reduction = "max", **kwargs: object) -> None:
        check_measure(error)
        super().__init__(error, reduction, **kwargs)
        self.error = error

    def update(self, dense: Tensor | nn.Module, factorized: nn.Module) -> None:
        """Add a layer.

        Args:
            dense: the dense layer, or its weight as it holds it.
            factorized: the layer in its place, which may have stayed dense.

        Raises:
            TypeError: If an argument is something else. Nothing was added.
            ValueError: If the shapes do not agree, or the dense weight is all zero. Nothing was added.
        """
        self._add(relative_layer_error(dense, factorized, self.error))
