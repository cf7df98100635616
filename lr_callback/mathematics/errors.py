"""Errors: how wrong a layer becomes at each number of slices and each rank, relative to the layer.

A measure maps a slicing to the absolute error at rank 0, 1, ..., last. Divided by the error of keeping nothing of the
unsliced layer (its norm) it is the *relative error*. Every measure here is exact for the layer that is built, before
its factors are rounded to the layer's dtype.

The groups of a convolution are blocks on the diagonal of the matrix that it is: its operator norm is the largest of
theirs, its squared Frobenius norm their sum. So a measure may take the slices of all groups as those of one, except
for the residual of several slices, which is a matrix of its own for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.importance import WEIGHTED
from lr_callback.mathematics.residual import residual_norms
from lr_callback.mathematics.spectrum import Slicing, scaled_left_vectors, singular_values, slicings
from lr_callback.mathematics.weighting import weighted_slicings

Measure = Callable[[Slicing, Tensor, Workers], Tensor]
"""From a slicing and limits ``(last + 1,)`` to its absolute errors ``(last + 1,)`` at rank 0 to ``last``.

From its limit on an error is of no use, and a measure for which it saves work may return infinity in its place.
"""


def slice_error(slicing: Slicing, limit: Tensor, workers: Workers) -> Tensor:
    """Return the worst slice's error ``max_i ||W_i - What_i||_2 = max_i sigma_{i, j+1}``.

    Source: the paper's code, made exact: the code looks up ``sigma_j`` where it means ``sigma_{j+1}``.
    """
    worst = singular_values(slicing.gram, workers).amax(dim=0)
    return _at_ranks(worst, limit)


def bound_error(slicing: Slicing, limit: Tensor, workers: Workers) -> Tensor:
    """Return the bound ``sqrt(k) max_i sigma_{i, j+1}`` on the operator norm of the residual.

    Source: arXiv 2107.11442, Theorem 1; its code drops ``sqrt(k)``, which gives :func:`slice_error`.
    """
    return sqrt(slicing.num_slices) * slice_error(slicing, limit, workers)


def operator_error(slicing: Slicing, limit: Tensor, workers: Workers) -> Tensor:
    """Return the operator norm of the residual ``||W - What||_2`` itself."""
    if slicing.num_slices == 1:
        return slice_error(slicing, limit, workers)
    dtype = torch.float64 if slicing.slices.dtype == torch.float64 else torch.float32
    # Squares of weights of any size must fit the working precision: scale by the longest row or column.
    scale = slicing.gram.diagonal(dim1=-2, dim2=-1).amax().sqrt()
    vectors, values = scaled_left_vectors(slicing, workers, scale, dtype)
    blocks = torch.split(vectors, slicing.num_slices)
    residual = torch.stack([residual_norms(block, len(limit) - 1, workers, limit / scale) for block in blocks])
    return torch.maximum(scale * residual.amax(dim=0), _at_ranks(values.amax(dim=0), limit))


def _at_ranks(values: Tensor, limit: Tensor) -> Tensor:
    """Return what is left at each rank of interest: entry ``r`` of the values, and nothing at full rank."""
    return torch.nn.functional.pad(values, (0, 1))[: len(limit)]


def frobenius_error(slicing: Slicing, limit: Tensor, workers: Workers) -> Tensor:
    """Return the Frobenius norm of the residual, ``sqrt(sum_i sum_{l > j} sigma_il^2)``."""
    energy = singular_values(slicing.gram, workers).square().sum(dim=0)
    tail = energy.flip(0).cumsum(0).flip(0)
    return _at_ranks(tail.sqrt(), limit)


ERRORS: Mapping[str, Measure] = {
    "slice": slice_error,
    "operator": operator_error,
    "bound": bound_error,
    "frobenius": frobenius_error,
}
"""Measures by their names; those of :mod:`~lr_callback.mathematics.importance` are ``frobenius``, weighted."""


def relative_errors(
    matrix: Tensor,
    error: str,
    last: Mapping[int, int],
    workers: Workers,
    prices: Mapping[int, int] | None = None,
    moments: Tensor | None = None,
) -> dict[int, Tensor]:
    """Compute the relative error of a folded layer for each number of slices and each rank.

    Args:
        matrix: ``(rows, columns)``, or ``(g, rows, columns)`` of groups, the layer folded with one slice; finite and
            not all zero.
        error: a name in :data:`ERRORS` or :data:`~lr_callback.mathematics.importance.WEIGHTED`.
        last: number of slices ``k`` -> largest rank of interest, at most the smaller side of a slice.
        workers: where it is computed.
        prices: number of slices -> cost of a rank. With it, an error may be infinite where another number of slices
            has no larger error at no larger cost: nothing would ever choose it, and much work is saved.
        moments: second moments of the columns, ``(g, columns, columns)`` or their diagonals ``(g, columns)``: errors
            are then those of the matrix times their root, slice by slice (:mod:`lr_callback.mathematics.weighting`).

    Returns:
        Number of slices -> ``(last + 1,)`` float64 on the CPU: entry ``r`` is the error at rank ``r``. It never rises
        with rank and is 0 at full rank.

    Raises:
        ValueError: If there is no measure of that name.

    Example::

        >>> from lr_callback.common.parallel import workers
        >>> with workers() as crew:
        ...     curve = relative_errors(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])), "slice", {1: 4}, crew)[1]
        >>> curve.tolist()
        [1.0, 0.5, 0.25, 0.25, 0.0]
    """
    measure = find_measure(error)
    if error == "operator" and moments is None and matrix.shape[-2] > matrix.shape[-1]:
        # The triangle of a QR decomposition has the same slices up to one rotation, and fewer rows.
        [matrix] = workers.map(_triangle, [matrix])
    absolute: dict[int, Tensor] = {}
    counts, first = sorted({1, *last}), error == "operator"
    if moments is None:
        made = slicings(matrix, counts, workers, first)
    else:
        made = weighted_slicings(matrix, moments, counts, workers)
    for slicing in made:
        count = slicing.num_slices
        limit = torch.full((last.get(count, 0) + 1,), torch.inf, dtype=torch.float64, device=matrix.device)
        if prices is not None and count in prices:
            limit = _best_so_far(absolute, prices, prices[count] * _ranks(limit))
        absolute[count] = measure(slicing, limit, workers)
        del slicing  # what it holds must not be there when the next one is made
    norm = torch.where(absolute[1][0] > 0, absolute[1][0], 1.0)
    # What is on another device is computed there to the end, and comes over at once.
    relative = (torch.cat([absolute[count] for count in last]) / norm).cpu()
    parts = torch.split(relative, [len(absolute[count]) for count in last])
    return {count: part.clone() for count, part in zip(last, parts, strict=True)}


def _triangle(matrix: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(matrix.double(), mode="r").R
    return triangle.to(torch.promote_types(matrix.dtype, torch.float32))


def _best_so_far(absolute: Mapping[int, Tensor], prices: Mapping[int, int], costs: Tensor) -> Tensor:
    """Return the smallest error already computed at each of the costs, or below it; infinity if there is none."""
    known = [count for count in absolute if count in prices]
    if not known:
        return torch.full(costs.shape, torch.inf, dtype=torch.float64, device=costs.device)
    paid, order = torch.cat([prices[count] * _ranks(absolute[count]) for count in known]).sort(stable=True)
    best = torch.cat([absolute[count] for count in known])[order].cummin(0).values
    # Keeping nothing is the same whatever the number of slices.
    return torch.where(costs > 0, best[torch.searchsorted(paid, costs, right=True) - 1], 0.0)


def _ranks(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def find_measure(error: str) -> Measure:
    """Return the measure of that name.

    Raises:
        ValueError: If there is none.
    """
    if error not in ERRORS and error not in WEIGHTED:
        raise ValueError(f"`error` must be one of {[*ERRORS, *WEIGHTED]}, got {error!r}.")
    return ERRORS["frobenius" if error in WEIGHTED else error]
