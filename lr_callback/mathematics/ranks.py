"""Ranks that need not be whole: how many directions of a matrix count, weighed by how much they do.

A matrix is given as the blocks on its diagonal, ``(blocks, m, n)``, as the groups of a convolution are. Of what has an
entry that is not finite a rank is NaN, and of zeros it is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lr_callback.mathematics.lanczos import Lanczos


def effective_rank(matrices: Tensor) -> Tensor:
    """Return ``exp(-sum_i p_i ln p_i)`` with ``p_i = sigma_i / sum_l sigma_l``, from 1 to the smaller side.

    Args:
        matrices: ``(blocks, m, n)``, of any dtype.

    Returns:
        A number, float64, differentiable.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    Example::

        >>> round(float(effective_rank(torch.eye(5)[None])), 6)
        5.0
    """
    working = matrices.double()
    if not bool(torch.isfinite(working).all()):
        return working.new_full((), torch.nan)
    values: Tensor = torch.linalg.svdvals(working)
    positive = values[values > 0]  # the entropy is 0 at 0, where it has no derivative
    if not positive.numel():
        return positive.sum()
    rank: Tensor = torch.special.entr(positive / positive.sum()).sum().exp()
    return rank


def stable_rank(matrices: Tensor, steps: int | None = None) -> Tensor:
    """Return ``||W||_F^2 / ||W||_2^2``, from 1 to the smaller side.

    Args:
        matrices: ``(blocks, m, n)``, of any dtype.
        steps: of a recurrence that finds the operator norm of what is larger than that, in the dtype of the matrices,
            at least single precision: a few products and no decomposition, hardly too large. None: exact, in float64.

    Returns:
        A number, float64; differentiable without ``steps``.

    Source: Rudelson, Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, where it is the numerical rank.

    Example::

        >>> round(float(stable_rank(torch.diag(torch.tensor([2.0, 1.0]))[None])), 6)
        1.25
    """
    if steps is None:
        working = matrices.double()
    else:
        working = matrices.detach().to(torch.promote_types(matrices.dtype, torch.float32))
    if not working.numel():
        return working.new_zeros((), dtype=torch.float64)
    largest = working.detach().abs().amax()
    if not bool(torch.isfinite(largest)):
        return torch.full_like(largest, torch.nan, dtype=torch.float64)
    working = working / largest.where(largest > 0, 1.0)  # squares of large or small entries must be numbers, too
    total = working.square().sum().double()
    return total / _largest_squared(working, steps).max() if bool(total) else total


def _largest_squared(matrices: Tensor, steps: int | None) -> Tensor:
    """Return the largest squared singular value of each matrix."""
    smaller = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    blocks, size, _ = smaller.shape
    if steps is None or size <= steps:
        largest: Tensor = torch.linalg.svdvals(smaller)[:, 0].square()
        return largest
    limits = torch.full((blocks, 1), torch.inf, dtype=torch.float64, device=smaller.device)
    lanczos = Lanczos(size, limits, smaller)
    for _ in range(steps):
        lanczos.advance(lanczos.vectors @ smaller @ smaller.mT)
    return lanczos.largest(torch.ones_like(limits, dtype=torch.bool))
