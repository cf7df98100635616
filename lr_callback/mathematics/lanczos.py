"""Lanczos: the largest eigenvalues of many symmetric operators of one size, advanced side by side.

Operators stand in blocks of columns, each column with a vector of its own: a step is then a few products of matrices
for all of them, and not many of a matrix with a vector. A column ends as soon as its value has settled, or earlier, as
soon as it is known to reach a limit: the pivots of ``T - limit I`` say so at each step, ``T`` being the column's
tridiagonal matrix, whose eigenvalues are never above those of the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Lanczos:
    """The three-term recurrence of several operators.

    Args:
        size: of a vector, ``n``.
        limits: ``(blocks, columns)`` float64: a column whose eigenvalue reaches its limit is over.
        like: gives the working precision and the device.
        start: ``(columns, n)`` unit vectors to begin with; None: one random vector, always the same.

    Attributes:
        vectors: ``(blocks, columns, n)``, what the operators are to be applied to next.
    """

    def __init__(self, size: int, limits: Tensor, like: Tensor, start: Tensor | None = None) -> None:
        blocks, columns = limits.shape
        self.vectors = (unit_vector(size).to(like) if start is None else start).expand(blocks, columns, size)
        self._before = torch.zeros_like(self.vectors)
        self._limits = limits
        self._pivots = self._highest = torch.full_like(limits, -torch.inf)
        self._scale = torch.zeros_like(self.vectors[..., 0])
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = [torch.zeros_like(self._scale)]

    @property
    def steps(self) -> int:
        """Number of steps that were made."""
        return len(self._diagonal)

    @property
    def over(self) -> Tensor:
        """Mask ``(blocks, columns)`` of the columns that have reached their limit."""
        return self._highest >= 0

    def advance(self, images: Tensor) -> None:
        """Take the images of the vectors, which are overwritten, and make the next vectors."""
        diagonal, beside = torch.linalg.vecdot(self.vectors, images), self._beside[-1]
        images.addcmul_(self.vectors, diagonal.unsqueeze(-1), value=-1)
        images.addcmul_(self._before, beside.unsqueeze(-1), value=-1)
        norms = torch.linalg.vector_norm(images, dim=-1)
        self._pivots = torch.addcdiv(diagonal - self._limits, beside.square(), self._pivots, value=-1)
        self._highest = torch.maximum(self._highest, self._pivots)
        self._scale = torch.maximum(self._scale, diagonal)
        # An invariant subspace ends a column: zero vectors add zeros to its tridiagonal matrix, which is harmless.
        alive = norms > self._scale * torch.finfo(images.dtype).eps
        images /= torch.where(alive, norms, torch.inf).unsqueeze(-1)
        self._before, self.vectors = self.vectors, images
        self._diagonal.append(diagonal)
        self._beside.append(torch.where(alive, norms, 0.0))

    def largest(self, chosen: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Return the largest Ritz value, float64, of columns chosen by a mask ``(blocks, columns)``, or its indices."""
        diagonal, beside = torch.stack(self._diagonal, -1)[chosen], torch.stack(self._beside[1:], -1)[chosen]
        values: Tensor = torch.linalg.eigvalsh(_tridiagonal(diagonal, beside))
        return values[:, -1]

    def leading(self) -> Tensor:
        """Return ``(blocks, columns, steps)``: the leading Ritz vectors, as sums of the vectors of all steps."""
        matrix = _tridiagonal(torch.stack(self._diagonal, -1), torch.stack(self._beside[1:], -1))
        _, vectors = torch.linalg.eigh(matrix)
        last: Tensor = vectors[..., -1]
        return last

    def keep(self, blocks: Tensor, columns: Tensor) -> None:
        """Go on with some of the columns.

        Args:
            blocks: ``(kept,)``, their numbers.
            columns: ``(kept, width)``, the numbers of the columns that go on in each of them.
        """
        rows = blocks.unsqueeze(-1)
        self.vectors, self._before = self.vectors[rows, columns], self._before[rows, columns]
        self._limits, self._pivots, self._highest, self._scale = (
            each[rows, columns] for each in (self._limits, self._pivots, self._highest, self._scale)
        )
        if self._diagonal:  # none before the first step
            self._diagonal = list(torch.stack(self._diagonal)[:, rows, columns])
        self._beside = list(torch.stack(self._beside)[:, rows, columns])


def unit_vector(size: int) -> Tensor:
    """Return a random vector, always the same."""
    start = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.nn.functional.normalize(start, dim=0)


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Return ``(..., m, m)`` float64 of diagonals ``(..., m)`` and what is beside them, the last left out."""
    between = beside[..., :-1].double()
    matrix = torch.diag_embed(diagonal.double())
    return matrix + torch.diag_embed(between, 1) + torch.diag_embed(between, -1)
