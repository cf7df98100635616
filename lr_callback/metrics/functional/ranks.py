"""Effective and stable rank of a matrix, or of the weight of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.layers.layer_types import layer_type, ordered_weight
from lr_callback.mathematics import ranks
from lr_callback.mathematics.folding import fold


def effective_rank(layer: Tensor | nn.Module, folding: str = "kernel_in_encoder") -> Tensor:
    """Return the effective rank: ``exp`` of the entropy of the singular values, divided by their sum.

    Args:
        layer: a matrix; a weight ``(F, C, *kernel)``; or a dense or factorized layer of a type that can be factorized.
        folding: which kernel axes of a weight are on the side of the outputs; without kernel axes all are the same.

    Returns:
        A number from 1 to the rank of the matrix, differentiable; 0 of zeros, NaN if an entry is not finite. Computed
        in float64, by a decomposition.

    Raises:
        TypeError: If it is something else, or a layer of another type.
        ValueError: If a tensor has less than two axes, no entry or no floating dtype, or there is no such folding.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from lr_callback.metrics.functional import effective_rank
        >>> effective_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])))
        tensor(3.)
        >>> bool(1 <= effective_rank(nn.Conv2d(4, 8, 3)) <= 8)
        True
    """
    matrices = _folded(layer, folding, "EffectiveRank")
    return ranks.effective_rank(matrices).to(torch.promote_types(matrices.dtype, torch.float32))


def stable_rank(layer: Tensor | nn.Module, folding: str = "kernel_in_encoder") -> Tensor:
    """Return the stable rank: the squared Frobenius norm over the squared operator norm.

    Args:
        layer: as of :func:`effective_rank`.
        folding: likewise.

    Returns:
        A number from 1 to the rank of the matrix, differentiable; 0 of zeros, NaN if an entry is not finite. Computed
        in float64, by a decomposition.

    Raises:
        TypeError: If it is something else, or a layer of another type.
        ValueError: If a tensor has less than two axes, no entry or no floating dtype, or there is no such folding.

    Source: Rudelson, Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, where it is the numerical rank.

    Example::

        >>> import torch
        >>> from lr_callback.metrics.functional import stable_rank
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
        tensor(1.2500)
    """
    matrices = _folded(layer, folding, "StableRank")
    return ranks.stable_rank(matrices).to(torch.promote_types(matrices.dtype, torch.float32))


def _folded(layer: object, folding: str, where: str) -> Tensor:
    """Return the blocks ``(g, m, n)`` of a weight or a layer."""
    if isinstance(layer, Tensor):
        if layer.dim() < 2 or not layer.is_floating_point() or not layer.numel():
            raise ValueError(
                f"{where}: a tensor must be a matrix or a weight (F, C, *kernel) of a floating dtype, with an entry at "
                f"least, got {tuple(layer.shape)} in {layer.dtype}."
            )
        return fold(layer, folding, 1)
    kind = layer_type(layer) if isinstance(layer, nn.Module) else None
    if kind is None or not isinstance(layer, nn.Module):
        raise TypeError(
            f"{where}: must be given a tensor, or a layer of a type that can be factorized, got an object of the type "
            f"{type(layer).__name__}. Of a model give one layer after the other, of another layer its weight."
        )
    return fold(ordered_weight(layer), folding, 1, kind.geometry(layer).groups)
