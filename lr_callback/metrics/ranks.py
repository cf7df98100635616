"""Ranks: how many directions of a layer count, weighed by how much they do."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from lr_callback.mathematics.folding import decoder_axes
from lr_callback.metrics.base import OfLayers, Reduction
from lr_callback.metrics.functional.ranks import effective_rank, stable_rank


class _RankOfLayers(OfLayers):
    """A rank of layers that a function tells."""

    is_differentiable = True
    higher_is_better = None

    def __init__(self, folding: str = "kernel_in_encoder", reduction: Reduction = "mean", **kwargs: object) -> None:
        decoder_axes(folding, 0)
        super().__init__(folding, reduction, **kwargs)
        self.folding = folding

    def update(self, layer: Tensor | nn.Module | float) -> None:
        """Add a layer.

        Args:
            layer: a matrix, a weight ``(F, C, *kernel)``, or a dense or factorized layer of a type that can be
                factorized; or the rank itself, where it is known already.

        Raises:
            TypeError: If it is something else. Nothing was added.
            ValueError: If a tensor has less than two axes, no entry or no floating dtype. Nothing was added.
        """
        self._add(layer if isinstance(layer, float) else self._rank(layer))

    @abstractmethod
    def _rank(self, layer: Tensor | nn.Module) -> Tensor:
        """Return the rank of a layer."""


class EffectiveRank(_RankOfLayers):
    """Effective rank of layers: ``exp`` of the entropy of the singular values, divided by their sum.

    Args:
        folding: which kernel axes are on the side of the outputs.
        reduction: ``mean``, ``max`` or ``min`` over the layers.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no such folding, or no such reduction.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    Example::

        >>> import torch
        >>> from lr_callback.metrics import EffectiveRank
        >>> metric = EffectiveRank()
        >>> metric.update(torch.eye(4))
        >>> metric.update(torch.ones(5, 6))
        >>> metric.compute()
        tensor(2.5000)
    """

    def _rank(self, layer: Tensor | nn.Module) -> Tensor:
        return effective_rank(layer, self.folding)


class StableRank(_RankOfLayers):
    """Stable rank of layers: the squared Frobenius norm over the squared operator norm.

    Args:
        folding: which kernel axes are on the side of the outputs.
        reduction: ``mean``, ``max`` or ``min`` over the layers.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no such folding, or no such reduction.

    Source: Rudelson, Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, where it is the numerical rank.

    Example::

        >>> import torch
        >>> from lr_callback.metrics import StableRank
        >>> metric = StableRank(reduction="max")
        >>> metric.update(torch.diag(torch.tensor([2.0, 1.0])))
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.)
    """

    def _rank(self, layer: Tensor | nn.Module) -> Tensor:
        return stable_rank(layer, self.folding)
