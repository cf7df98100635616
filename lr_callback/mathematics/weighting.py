"""Weighting: slicings and truncations of a layer whose inputs do not all count the same.

With the second moments ``C_i = L_i L_i^T`` of a slice's inputs, singular values are those of ``W_i L_i``, and the best
factors of rank ``j`` are ``U_j`` and ``U_j^T W_i``, ``U_j`` the leading left singular vectors of ``W_i L_i``: the
principal components of the slice's outputs. Neither needs an inverse, so moments of too few inputs will do.

A wide slice needs no ``L_i``: its Gram matrix is ``W_i C_i W_i^T``. A tall one is multiplied with the Cholesky factor
of ``C_i``, whose diagonal is raised by a trillionth of its mean, for channels that are always zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.spectrum import Slicing, is_wide, slicings, split
from lr_callback.mathematics.truncation import balanced, leading_vectors

_FLOOR = 1e-12
_TASK = 2**18  # numbers of a task: below this, handing it to a worker costs more than it saves


def weighted_slicings(matrix: Tensor, moments: Tensor, counts: Sequence[int], workers: Workers) -> Iterator[Slicing]:
    """Yield the slicings of a folded layer, as :func:`~lr_callback.mathematics.spectrum.slicings`, weighted.

    Args:
        matrix: ``(rows, columns)``, or ``(g, rows, columns)`` of groups, the layer folded with one slice; not changed.
        moments: of the columns, ``(g, columns, columns)`` or their diagonals ``(g, columns)``, float64.
        counts: numbers of slices, each a divisor of the input channels.
        workers: where the products are computed.

    Time: ``g * rows * columns^2 / k`` multiply-adds for ``k`` slices; diagonals take no more than no weights.
    """
    if moments.dim() == 2:
        yield from slicings(matrix * _roots(moments, matrix), counts, workers)
        return
    groups = moments.shape[0]
    wide = [count for count in sorted(counts) if is_wide(split(matrix, count))]
    tall = [count for count in sorted(counts) if count not in wide]
    for count in [*wide, *tall]:
        slices, blocks = split(matrix, count), diagonal_blocks(moments, count)
        if count in wide:
            yield Slicing(slices, _products(slices, blocks, workers), groups)
        else:
            yield Slicing(*_scaled(slices, blocks, workers), groups)


def _scaled(slices: Tensor, blocks: Tensor, workers: Workers) -> tuple[Tensor, Tensor]:
    """Return tall slices times the roots of their moments, and the Gram matrices of these, float64."""

    def task(part: slice) -> tuple[Tensor, Tensor]:
        scaled = slices[part].double() @ _cholesky(blocks[part])
        return scaled, scaled.mT @ scaled

    # Parts that are the same whatever the number of workers have the same bits.
    size = max(1, _TASK // blocks[0].numel())
    parts = workers.map(task, [slice(start, start + size) for start in range(0, len(blocks), size)])
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _roots(moments: Tensor, like: Tensor) -> Tensor:
    """Return the roots of mean squares ``(g, columns)``, as a row to multiply a layer of that shape with."""
    roots = moments.sqrt().unsqueeze(1)
    return roots[0] if like.dim() == 2 else roots


def diagonal_blocks(moments: Tensor, num_slices: int) -> Tensor:
    """Return the moments ``(g * k, c / k, c / k)`` of each slice, of ``(g, c, c)``; those between slices are dropped.

    Of diagonals ``(g, c)`` those of each slice, ``(g * k, c / k)``.
    """
    if moments.dim() == 2:
        return moments.reshape(moments.shape[0] * num_slices, -1)
    groups, size = moments.shape[0], moments.shape[1] // num_slices
    split = moments.reshape(groups, num_slices, size, num_slices, size).diagonal(dim1=1, dim2=3)
    return split.permute(0, 3, 1, 2).reshape(groups * num_slices, size, size)


def _products(slices: Tensor, blocks: Tensor, workers: Workers) -> Tensor:
    """Return ``W_i C_i W_i^T`` of wide slices, float64."""
    count, side = slices.shape[:2]
    total = slices.new_empty((count, side, side), dtype=torch.float64)

    def task(where: tuple[int, slice]) -> None:
        index, rows = where
        double = slices[index].double()
        torch.mm(double[rows] @ blocks[index], double.mT, out=total[index, rows])

    # Two halves of the rows, whatever the number of workers: fixed parts have fixed bits.
    halves = [slice(0, side // 2), slice(side // 2, side)]
    workers.map(task, [(index, rows) for index in range(count) for rows in halves])
    return total


def _cholesky(blocks: Tensor) -> Tensor:
    """Return ``L_i`` with ``L_i L_i^T = C_i``, of second moments ``(b, s, s)`` of any rank."""
    squares = blocks.diagonal(dim1=1, dim2=2)
    floor = squares.mean() * _FLOOR + torch.finfo(torch.float64).tiny
    # Last of all what single precision makes of inputs that are too small to square: nothing is seen of them.
    for raised in (floor, floor * 1e3, floor * 1e6, floor * 1e6 + torch.finfo(torch.float32).tiny):
        result = torch.linalg.cholesky_ex(blocks + torch.diag_embed(raised.expand_as(squares)))
        root: Tensor = result.L
        if not bool(result.info.any()):
            return root
    raise ValueError(
        "`importance.inputs` must be second moments, which are never negative in any direction; these are."
    )


def weighted_truncate(slices: Tensor, rank: int, moments: Tensor, workers: Workers) -> tuple[Tensor, Tensor]:
    """Return balanced factors of the approximation of each slice that is best for inputs of the given moments.

    Args:
        slices: ``(b, rows, columns)``.
        rank: ``j``, 1 to the smaller side.
        moments: of each slice's columns, ``(b, columns, columns)`` or diagonals ``(b, columns)``.
        workers: where the decompositions are computed.

    Returns:
        Left factors ``(b, rows, j)`` and right factors ``(b, j, columns)``, float64.

    Example::

        >>> from lr_callback.common.parallel import workers
        >>> slices, moments = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0.0, 1.0]])
        >>> with workers() as crew:
        ...     left, right = weighted_truncate(slices, 1, moments, crew)
        >>> (left @ right)[0].abs().tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    parts = workers.map(lambda index: project(slices[index], rank, moments[index]), range(len(slices)))
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def project(matrix: Tensor, rank: int, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Project a slice on the principal components of its outputs.

    Args:
        matrix: ``(rows, columns)``.
        rank: ``j``, 1 to the smaller side.
        moments: of the columns, ``(columns, columns)`` or the diagonal ``(columns,)``.

    Returns:
        Balanced factors ``(rows, j)`` and ``(j, columns)``, float64.
    """
    double, moments = matrix.double(), moments.double()
    if is_wide(double):
        seen = double * moments if moments.dim() == 1 else double @ moments
        left = leading_vectors((seen @ double.mT)[None], rank)[0]
    else:
        seen = double * moments.sqrt() if moments.dim() == 1 else double @ _cholesky(moments[None])[0]
        vectors = leading_vectors((seen.mT @ seen)[None], rank)[0]
        left = torch.linalg.qr(seen @ vectors).Q
    return balanced(left, left.mT @ double)
