"""Residual norms: the exact operator norm of what truncation leaves over, at every rank at once.

With ``k`` slices truncated to rank ``j`` the residual of a layer is ``R_j = [R_1 ... R_k]``, and

    ``||R_j||_2^2 = lambda_max(R_j R_j^T) = lambda_max(sum_i sum_{l > j} (sigma_il u_il)(sigma_il u_il)^T)``.

The scaled left vectors of all ranks are rows of one matrix ``A``; rank ``j`` keeps those with ``l > j``. So one product
with ``A`` and one with ``A^T`` advance a Lanczos recurrence for *many* ranks: each is a column with its own mask. A
column is dropped when its value has settled, and earlier if it is already known to be too large to be of use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lr_callback.parallel import Workers

_STEPS = 8  # Lanczos steps between two looks at convergence
_MOST_STEPS = 160  # what has not converged by then is solved densely
_SMALL = 64  # up to this size a dense eigenvalue decomposition is cheaper than a recurrence
_COLUMNS = 64  # the most ranks that are solved side by side
_GROUPS = 4  # the most tasks of a slicing, whatever the number of workers
_LEAST = 16  # the fewest ranks of a task


def residual_norms(scaled: Tensor, last: int, workers: Workers, limit: Tensor | None = None) -> Tensor:
    """Return the operator norm of a sliced layer's residual at rank 0, 1, ..., ``last``.

    Args:
        scaled: ``(k, n, rows)``: ``sigma_il u_il`` of slice ``i``, ``l`` descending, in the working precision.
        last: the largest rank of interest, 0 to ``n``; at ``n`` the norm is 0.
        workers: where the products are computed.
        limit: ``(last + 1,)``, the norm from which on a rank is of no use. As soon as a norm is known to be at least
            that, it is given up and returned as infinity.

    Returns:
        ``(last + 1,)`` float64, never rising but for what was given up; relative precision about 1e-7 in float32.
    """
    by_rank = scaled.transpose(0, 1)  # rank first: what a rank keeps is a run of consecutive entries
    solved = min(last + 1, by_rank.shape[0])
    useless = torch.full((solved,), torch.inf, dtype=torch.float64) if limit is None else limit[:solved].square()
    groups = torch.arange(solved).tensor_split(max(1, min(_GROUPS, solved // _LEAST)))
    squared = torch.cat(workers.map(lambda ranks: _group(by_rank, ranks.tolist(), useless.to(scaled.device)), groups))
    norms = _never_rising(squared).clamp(min=0).sqrt()
    return torch.nn.functional.pad(norms, (0, last + 1 - solved))


def _never_rising(squared: Tensor) -> Tensor:
    """Lift each value to the largest after it: Lanczos approaches from below, and the norms never rise with rank."""
    known = torch.where(squared.isinf(), 0.0, squared)
    return torch.where(squared.isinf(), squared, known.flip(0).cummax(0).values.flip(0))


def _group(by_rank: Tensor, ranks: list[int], useless: Tensor) -> Tensor:
    """Return the largest eigenvalues for consecutive ranks, worked off from the last to the first."""
    _, num_slices, size = by_rank.shape
    start, stop = ranks[0], ranks[-1] + 1
    # A step costs 2 size^2 for what all columns share and 4 k columns size for what they do not: keep them even.
    columns = min(_COLUMNS, max(8, size // (2 * num_slices)))
    rest = by_rank[stop:].reshape(-1, size)
    common = rest.mT @ rest
    found: list[Tensor] = []
    for end in range(stop, start, -columns):
        first = max(start, end - columns)
        rows = by_rank[first:end].reshape(-1, size)
        found.append(_largest_eigenvalues(rows, common, num_slices, useless[first:end]))
        common.addmm_(rows.mT, rows)
    return torch.cat(found[::-1])


@dataclass
class _Krylov:
    """The three-term recurrence of several symmetric operators side by side, one a column."""

    current: Tensor
    previous: Tensor
    scale: Tensor
    diagonal: list[Tensor] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, size: int, columns: int, like: Tensor) -> _Krylov:
        """Begin every column with one random unit vector, always the same."""
        seed = torch.Generator().manual_seed(size)
        vector = torch.randn(size, 1, generator=seed, dtype=torch.float64).to(like)
        current = (vector / vector.norm()).expand(size, columns)
        return cls(current, torch.zeros_like(current), torch.zeros_like(current[0]))

    def advance(self, image: Tensor) -> None:
        """Take the image of the current vectors, and make the next ones."""
        alpha = (self.current * image).sum(0)
        image = image - alpha * self.current
        if self.beside:
            image -= self.beside[-1] * self.previous
        beta = image.norm(dim=0)
        self.scale = torch.maximum(self.scale, alpha.abs())
        # An invariant subspace ends the column: zero vectors add zeros to its tridiagonal matrix, which is harmless.
        alive = beta > self.scale * torch.finfo(image.dtype).eps
        beta = torch.where(alive, beta, 0.0)
        self.previous, self.current = self.current, torch.where(alive, image / beta, 0.0)
        self.diagonal.append(alpha)
        self.beside.append(beta)

    def largest(self) -> Tensor:
        """Return the largest Ritz value of each column, float64: at most its largest eigenvalue."""
        matrix = torch.diag_embed(torch.stack(self.diagonal, -1).double())
        beside = torch.stack(self.beside[:-1], -1).double()
        matrix += torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values[:, -1]

    def keep(self, columns: Tensor) -> None:
        """Drop all columns but the named ones."""
        self.current, self.previous = self.current[:, columns], self.previous[:, columns]
        self.scale = self.scale[columns]
        self.diagonal = [values[columns] for values in self.diagonal]
        self.beside = [values[columns] for values in self.beside]


def _largest_eigenvalues(rows: Tensor, common: Tensor, num_slices: int, useless: Tensor) -> Tensor:
    """Return ``lambda_max(common + A_c^T A_c)`` for each column ``c``, ``A_c`` being ``rows`` from rank ``c`` on.

    Args:
        rows: ``(columns * k, n)``, rank by rank.
        common: ``(n, n)``.
        num_slices: ``k``, rows of a rank.
        useless: ``(columns,)``: from this value on a column is given up and is infinity.
    """
    columns = torch.arange(len(useless), device=rows.device)
    size = common.shape[0]
    if size <= _SMALL:
        return _solve_densely(columns.tolist(), rows, common, num_slices)
    krylov = _Krylov.start(size, len(columns), rows)
    found, values = torch.zeros_like(useless), torch.zeros_like(useless)
    while len(columns) and len(krylov.diagonal) < _MOST_STEPS:
        for _ in range(_STEPS):
            krylov.advance(_image(rows, common, krylov.current, columns, num_slices))
        before, values = values, krylov.largest()
        hopeless = values >= useless[columns]
        found[columns] = torch.where(hopeless, torch.inf, values)
        moving = ~hopeless & (values - before > 8 * torch.finfo(rows.dtype).eps * values)
        if not moving.all():
            krylov.keep(moving)
            columns, values = columns[moving], values[moving]
    if len(columns):
        found[columns] = _solve_densely(columns.tolist(), rows, common, num_slices)
    return found


def _image(rows: Tensor, common: Tensor, vectors: Tensor, columns: Tensor, num_slices: int) -> Tensor:
    """Apply each column's operator to its vector: ``common v + A_c^T A_c v``."""
    inner = (rows @ vectors).view(-1, num_slices, len(columns))
    ranks = torch.arange(len(inner), device=rows.device).unsqueeze(1)
    inner *= (ranks >= columns).to(inner.dtype).unsqueeze(1)
    return torch.addmm(common @ vectors, rows.mT, inner.flatten(0, 1))


def _solve_densely(columns: Iterable[int], rows: Tensor, common: Tensor, num_slices: int) -> Tensor:
    """Return the largest eigenvalues of the named columns from dense decompositions, in float64."""
    kept = [rows[column * num_slices :].double() for column in columns]
    values: Tensor = torch.linalg.eigvalsh(torch.stack([common.double() + one.mT @ one for one in kept]))
    return values[:, -1]
