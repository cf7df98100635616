"""Spectra: the singular values of every slicing of a layer, and the singular vectors of one slicing.

Singular values are roots of the eigenvalues of Gram matrices in float64, on the smaller side of each slice. That is
several times cheaper than an SVD and resolves about 1e-7 of the largest value, far below any error worth choosing.
The slicings of a layer share their products: where slices are wide, the Gram matrix of a coarse slicing is a sum of
those of a finer one; where they are tall, those of a fine slicing are diagonal blocks of those of a coarser one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers

_EPSILON = torch.finfo(torch.float64).eps
_LARGE = 2**19  # elements of a Gram matrix that is decomposed alone
_PARTS = 4  # of the rows of a Gram matrix, each computed up to its last column only
_WHOLE = 64  # up to this side a Gram matrix is computed in one part: smaller products take longer than they save
_TASK = 2**18  # elements of a task: below this, handing it to a worker costs more than it saves
_BLOCK = 2**17  # elements that a worker converts to float64 at a time: as fast as more, and takes less memory


@dataclass(frozen=True)
class Slicing:
    """One slicing of a layer: its matrices and their Gram matrices.

    Args:
        slices: ``(g * k, rows, columns)`` in the weight's dtype, those of one group after those of another.
        gram: ``(g * k, n, n)`` float64, ``n`` the smaller side: ``W_i W_i^T`` if wide, ``W_i^T W_i`` if tall. It is
            symmetric, and what is above the diagonal may be left out.
        groups: ``g``.
    """

    slices: Tensor
    gram: Tensor
    groups: int = 1

    @property
    def num_slices(self) -> int:
        """Number of slices ``k`` of a group."""
        return self.slices.shape[0] // self.groups

    @property
    def full_rank(self) -> int:
        """Smaller side of a slice."""
        return self.gram.shape[-1]


def is_wide(matrices: Tensor) -> bool:
    """Return whether matrices ``(..., rows, columns)`` have at least as many columns as rows."""
    return matrices.shape[-1] >= matrices.shape[-2]


def split(matrix: Tensor, num_slices: int) -> Tensor:
    """Return the slices ``(g * k, rows, columns / k)`` of a folded layer ``(rows, columns)`` or ``(g, rows, columns)``.

    Equal to :func:`lr_callback.mathematics.folding.fold` with ``k`` slices, where ``matrix`` is the fold with one.
    """
    rows, columns = matrix.shape[-2:]
    sliced = matrix.reshape(-1, rows, num_slices, columns // num_slices)
    return sliced.transpose(1, 2).flatten(0, 1)


def slicings(
    matrix: Tensor, counts: Sequence[int], workers: Workers, coarsest_first: bool = False
) -> Iterator[Slicing]:
    """Yield the slicings of a folded layer, one at a time, the wide ones first.

    Args:
        matrix: ``(rows, columns)``, or ``(g, rows, columns)`` of groups, the layer folded with one slice; not changed.
        counts: numbers of slices, each a divisor of the input channels.
        workers: where the products are computed.
        coarsest_first: whether the coarsest comes before the finest of the wide ones. Its errors need no vectors, and
            give every other slicing something to be better than; those of the finest are often the smallest for
            their cost. It takes more memory.

    Memory: the Gram matrices of one slicing, in float64, at most as many numbers as the matrix, and those that the next
    ones derive from; the caller must not keep a slicing while it asks for the next.
    """
    rows, columns = matrix.shape[-2:]
    wide = [count for count in sorted(counts, reverse=True) if columns // count >= rows]
    tall = [count for count in sorted(counts) if columns // count < rows]
    first = wide[0] if wide else 0
    yield from _derived(matrix, wide[-1:] + wide[:-1] if coarsest_first else wide, first, workers)
    yield from _derived(matrix, tall, tall[0] if tall else 0, workers)


def _derived(matrix: Tensor, order: Sequence[int], have: int, workers: Workers) -> Iterator[Slicing]:
    """Yield slicings in an order, all wide or all tall; ``have`` is the one that the others derive from, if they do."""
    groups = matrix.shape[0] if matrix.dim() == 3 else 1
    base = gram_matrices(split(matrix, have), workers) if order else matrix
    for index, count in enumerate(order):
        slices = split(matrix, count)
        gram = base if count == have else _derive(base, groups * count)
        gram = gram_matrices(slices, workers) if gram is None else gram
        if _serves(count, have, order[index + 1 :], finer=not is_wide(slices)):
            # The others derive from this one: no more than two sets are ever there.
            base, have = gram, count
        yield Slicing(slices, gram, groups)
        del slices, gram


def _serves(count: int, have: int, others: Sequence[int], finer: bool) -> bool:
    """Return whether each other slicing that derives from the one with ``have`` slices does so from this one, too."""

    def derives(source: int, other: int) -> bool:
        return other % source == 0 if finer else source % other == 0

    return all(derives(count, other) or not derives(have, other) for other in others)


def _derive(base: Tensor, count: int) -> Tensor | None:
    """Return the Gram matrices of ``count`` slices from those of a base slicing, None if neither divides the other."""
    have, side = base.shape[0], base.shape[-1]
    if have % count == 0:
        return base.reshape(count, have // count, side, side).sum(1)
    if count % have == 0:
        parts = count // have
        blocks = base.reshape(have, parts, side // parts, parts, side // parts)
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(count, side // parts, side // parts)
    return None


def gram_matrices(slices: Tensor, workers: Workers) -> Tensor:
    """Multiply each slice ``(rows, columns)`` with its transpose, on the smaller side, in float64; the lower half."""
    oriented = slices if is_wide(slices) else slices.mT
    count, side = oriented.shape[:2]
    total = oriented.new_zeros((count, side, side), dtype=torch.float64)

    def task(where: tuple[slice, slice]) -> None:
        part, rows = where
        _add_products(total[part, rows, : rows.stop], oriented[part], rows)

    # Parts of the rows, whatever the number of workers: fixed parts have fixed bits. The largest come first.
    parts = 1 if side <= _WHOLE else _PARTS
    edges = [side * part // parts for part in range(parts, -1, -1)]
    rows = [slice(start, stop) for stop, start in itertools.pairwise(edges)]
    workers.map(task, [(part, some) for part in task_ranges(oriented) for some in rows])
    return total


def _decompose(
    function: Callable[[slice], None], gram: Tensor, parts: list[slice], copies: int, workers: Workers
) -> None:
    """Call a function that decomposes Gram matrices for each part of them, not too many large ones at the same time.

    LAPACK takes some copies of each matrix that it is at; those of large ones, which are of the largest layers, may
    take half as much memory as there is already.
    """

    def one_after_the_other(some: list[slice]) -> None:
        for part in some:
            function(part)

    large = gram[0].numel() > _LARGE
    lanes = max(1, gram.shape[0] // (2 * copies)) if large else len(parts)
    workers.map(one_after_the_other, [parts[lane::lanes] for lane in range(lanes)])


def task_ranges(matrices: Tensor) -> list[slice]:
    """Split a batch of matrices ``(k, n, m)`` along ``k`` into tasks of a worthwhile size."""
    size = max(1, _TASK // max(1, matrices.shape[-2] * matrices.shape[-1]))
    return [slice(start, start + size) for start in range(0, matrices.shape[0], size)]


def _add_products(total: Tensor, matrices: Tensor, rows: slice) -> None:
    """Add the products of the named rows of ``(k, n, m)`` with all rows up to them, a block of columns at a time."""
    width = max(1, _BLOCK // max(1, matrices.shape[0] * matrices.shape[1]))
    for block in torch.split(matrices[:, : rows.stop], width, dim=-1):
        double = block.double()
        total.baddbmm_(double[:, rows], double.mT)


def singular_values(gram: Tensor, workers: Workers) -> Tensor:
    """Return the singular values ``(k, n)`` of slices, descending, from their Gram matrices ``(k, n, n)``.

    Values that the Gram matrix cannot tell from zero are zero.
    """
    eigenvalues = gram.new_empty(gram.shape[:2])

    def task(part: slice) -> None:
        eigenvalues[part] = torch.linalg.eigvalsh(gram[part])

    _decompose(task, gram, task_ranges(gram), 1, workers)
    return _to_singular(eigenvalues)


def _to_singular(eigenvalues: Tensor) -> Tensor:
    """Return the descending roots of ascending eigenvalues ``(k, n)``, noise set to zero."""
    descending = eigenvalues.flip(-1)
    noise = descending[:, :1] * (_EPSILON * descending.shape[-1])
    return torch.where(descending > noise, descending, 0.0).sqrt()


def scaled_left_vectors(
    slicing: Slicing, workers: Workers, scale: float | Tensor = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of every slice, each as long as its singular value.

    Args:
        slicing: of a layer.
        workers: where the decompositions are computed.
        scale: what the vectors are divided by.
        dtype: of the vectors.

    Returns:
        ``(k, n, rows)``: entry ``[i, l]`` is ``sigma_l u_l / scale`` of slice ``i``, descending; and the singular
        values ``(k, n)``, float64, not scaled.
    """
    count, full = slicing.gram.shape[:2]
    values = slicing.gram.new_empty(count, full)
    # Rank first in memory: what is left at a rank is then one block, which nobody has to copy.
    vectors = slicing.gram.new_empty(full, count, slicing.slices.shape[1], dtype=dtype).transpose(0, 1)

    def task(part: slice) -> None:
        made, values[part] = _scaled(slicing.gram[part], slicing.slices[part], dtype)
        torch.mul(made, 1 / scale, out=vectors[part])

    larger = slicing.slices if slicing.gram[0].numel() < slicing.slices[0].numel() else slicing.gram
    _decompose(task, slicing.gram, task_ranges(larger), 4, workers)
    return vectors, values


def _scaled(gram: Tensor, slices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the left vectors, as long as the singular values, and these, of a few slices and their Gram matrices."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = _to_singular(eigenvalues)
    rows = vectors.mT.flip(-2)  # LAPACK's columns lie one after the other: these are blocks of memory
    if is_wide(slices):
        return rows.mul_(values.unsqueeze(-1)), values
    return torch.bmm(rows.to(dtype), slices.mT.to(dtype)), values
