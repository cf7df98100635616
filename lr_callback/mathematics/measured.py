"""Measured: how wrong a weight is beside another, from the two weights themselves, whatever became of the first.

The measures are those of :mod:`~lr_callback.mathematics.errors`, which foresees them from singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor

from lr_callback.mathematics.folding import fold
from lr_callback.mathematics.spectrum import split


def _operator(folded: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(folded, 2)
    return norms.max()


MEASURED: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda folded, num_slices: _operator(split(folded, num_slices)),
    "operator": lambda folded, num_slices: _operator(folded),
    "bound": lambda folded, num_slices: sqrt(num_slices) * _operator(split(folded, num_slices)),
    "frobenius": lambda folded, num_slices: torch.linalg.vector_norm(folded),
}
"""Measures by their names: from a folded weight ``(g, rows, columns)`` and a number of slices to its norm."""


def measured_error(dense: Tensor, other: Tensor, error: str, folding: str, num_slices: int, groups: int = 1) -> Tensor:
    """Return the relative error of a weight beside the dense one, in a named measure.

    Args:
        dense: ``(F, C / g, *kernel)``, not all zero.
        other: of the same shape.
        error: a name in :data:`MEASURED`.
        folding: that the measure is of.
        num_slices: ``k``, divides ``C / g``.
        groups: ``g``.

    Returns:
        A number, float64, differentiable; NaN if an entry is not finite.

    Example::

        >>> dense = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> float(measured_error(dense, torch.diag(torch.tensor([4.0, 0.0, 0.0])), "operator", "kernel_in_encoder", 1))
        0.5
    """
    whole, residual = dense.double(), dense.double() - other.double()
    if not bool(torch.isfinite(residual).all()):
        return residual.new_full((), torch.nan)
    measure = MEASURED[error]
    return measure(fold(residual, folding, 1, groups), num_slices) / measure(fold(whole, folding, 1, groups), 1)
