"""Regression: the change of a linear map that brings its outputs closest to wanted ones, from moments alone.

For a map ``D`` of inputs ``z`` and what its outputs lack, ``e = y - D z``, the change is ``E[e z^T] (E[z z^T] +
ridge)^-1``. Directions of ``z`` that were not seen keep the map that they have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lr_callback.mathematics.moments import SecondMoments

RIDGE = 1e-6
"""Of the mean square of the inputs; it decides where what was seen leaves the map open."""


def regress(moments: SecondMoments, width: int, intercept: bool) -> tuple[Tensor, Tensor, float]:
    """Solve for the change of a decoder.

    Args:
        moments: of rows ``[z, e, 1]``.
        width: entries of ``z``.
        intercept: whether the bias may change, too.

    Returns:
        The change ``(g, F / g, width)``, that of the bias ``(g, F / g)``, and the fraction of the error that is left.
    """
    both = moments.products
    seen, missing = slice(0, width), slice(width, both.shape[1] - 1)
    means = both[:, -1:, :-1] if intercept else torch.zeros_like(both[:, -1:, :-1])
    centered = both[:, :-1, :-1] - means.mT @ means
    squares = centered[:, seen, seen]
    products = centered[:, missing, seen]
    change = ridge_solve(squares, products)
    shift = (means[:, :, missing] - means[:, :, seen] @ change.mT).squeeze(1)
    gained = (2 * change * products - (change @ squares) * change).sum()
    offset = (means[:, :, missing] ** 2).sum()
    before = both[:, missing, missing].diagonal(dim1=1, dim2=2).sum()
    return change, shift, float(1 - (gained + offset) / before) if before > 0 else 1.0


def ridge_solve(squares: Tensor, products: Tensor) -> Tensor:
    """Return ``products (squares + ridge)^-1``.

    Args:
        squares: ``(..., n, n)``, second moments of any rank.
        products: ``(..., m, n)``.
    """
    ridge = RIDGE * squares.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
    raised = squares + ridge[..., None, None] * torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)
    solved: Tensor = torch.linalg.solve(raised, products.mT).mT
    return solved
