"""Truncation: the factors of one slicing, from the leading eigenvectors of its Gram matrices.

A budget far below what a layer takes leaves one rank to each slice of the widest layers. There the first eigenvector is
all that is wanted, and :func:`leading_vectors` finds it by inverse iteration, in less than half of the time that all
take. A Cholesky decomposition both solves the systems and proves that no eigenvalue is larger; where the vector is not
exact in the end, as of two equal eigenvalues, all eigenvectors are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.lanczos import unit_vector
from lr_callback.mathematics.spectrum import gram_matrices, is_wide, task_ranges

_EPSILON = torch.finfo(torch.float64).eps
_ABOVE = 64 * torch.finfo(torch.float32).eps  # a shift is above an eigenvalue that was computed in float32
_SMALL = 32  # up to this size all eigenvectors take no longer than the first one
_SOLVES = 5  # of the inverse iteration, each of which gains some three digits
_EXACT = 1e-11  # what an eigenvector may leave over, relative to its eigenvalue


def truncate(slices: Tensor, rank: int, workers: Workers) -> tuple[Tensor, Tensor]:
    """Return balanced factors of the best rank-``rank`` approximation of each slice.

    Args:
        slices: ``(k, rows, columns)``.
        rank: ``j``, 1 to the smaller side.
        workers: where the decompositions are computed.

    Returns:
        Left factors ``(k, rows, j)``, ``U sqrt(S)``, and right factors ``(k, j, columns)``, ``sqrt(S) V``, float64.

    Source: Eckart, Young (1936), Mirsky (1960); arXiv 2107.11442, section 2.1.

    Example::

        >>> import torch
        >>> from lr_callback.common.parallel import workers
        >>> slices = torch.eye(4).repeat(2, 1, 1)
        >>> with workers() as crew:
        ...     left, right = truncate(slices, 4, crew)
        >>> torch.allclose(left @ right, slices.double())
        True
    """
    tall = not is_wide(slices)
    oriented = slices.mT if tall else slices
    gram = gram_matrices(oriented, workers)

    def task(part: slice) -> tuple[Tensor, Tensor]:
        left = leading_vectors(gram[part], rank)
        return balanced(left, left.mT @ oriented[part].double())

    parts = workers.map(task, task_ranges(oriented))
    left, right = parts[0] if len(parts) == 1 else (torch.cat(side) for side in zip(*parts, strict=True))
    return (right.mT, left.mT) if tall else (left, right)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors ``(k, n, rank)`` of the largest eigenvalues, descending, of Gram matrices ``(k, n, n)``.

    What is above the diagonal is not read.

    Example::

        >>> leading_vectors(torch.diag(torch.tensor([1.0, 4.0, 2.0]).double())[None], 1)[0].abs().round().tolist()
        [[0.0], [1.0], [0.0]]
    """
    if rank > 1 or gram.shape[-1] <= _SMALL:
        return _all_vectors(gram)[..., :rank]
    first, exact = _first_vectors(gram)
    if not bool(exact.all()):
        first[~exact] = _all_vectors(gram[~exact])[..., :1]
    return first


def _all_vectors(gram: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)


def _first_vectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first eigenvectors ``(k, n, 1)``, and a mask ``(k,)`` of those that are exact."""
    shift = _above_all(gram)
    factor, info = torch.linalg.cholesky_ex(torch.diag_embed(shift.expand(gram.shape[:2])) - gram)
    vectors = unit_vector(gram.shape[-1]).to(gram).view(1, -1, 1)
    for _ in range(_SOLVES):
        before, solved = vectors, torch.cholesky_solve(vectors.expand(len(gram), -1, 1), factor)
        length = solved.norm(dim=1, keepdim=True)
        vectors = solved / length
    # (shift - G) solved = before: what G leaves over of a vector needs no product with G.
    left_over = before - vectors * (vectors * before).sum(1, keepdim=True)
    error = left_over.norm(dim=1, keepdim=True) / (length * shift.unsqueeze(-1))
    return vectors, (info == 0) & (error.flatten() <= _EXACT)


def _above_all(gram: Tensor) -> Tensor:
    """Return ``(k, 1)``: a number a little above the largest eigenvalue of each Gram matrix, 0 if all are 0."""
    scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(torch.float64).tiny).view(-1, 1, 1)
    largest: Tensor = torch.linalg.eigvalsh((gram / scale).float())[:, -1:]
    return largest.double() * scale[..., 0] * (1 + _ABOVE)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Share the scale of ``right`` ``(..., j, columns)`` row by row with the columns of ``left`` ``(..., rows, j)``."""
    norms = right.norm(dim=-1)
    largest = norms.amax(dim=-1, keepdim=True)
    # A singular value of zero leaves its unit vector on the left: with both factors zero it could never train.
    empty = norms <= largest * (_EPSILON * right.shape[-1])
    root = torch.where(empty, 1.0, norms).sqrt()
    right = torch.where(empty.unsqueeze(-1), 0.0, right / root.unsqueeze(-1))
    return left * root.unsqueeze(-2), right
