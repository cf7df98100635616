"""Residual norms: the exact operator norm of what truncation leaves over, at every rank at once.

With ``k`` slices truncated to rank ``j`` the residual of a layer is ``R_j = [R_1 ... R_k]``, and

    ``||R_j||_2^2 = lambda_max(R_j R_j^T) = lambda_max(sum_i sum_{l > j} (sigma_il u_il)(sigma_il u_il)^T)``.

The scaled left vectors of all ranks are rows of one matrix ``A``; rank ``j`` keeps those with ``l > j``. So one product
with ``A`` and one with ``A^T`` advance a Lanczos recurrence for *all* ranks: each is a column with its own mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lr_callback.parallel import Workers

_STEPS = 10  # Lanczos steps between two looks at convergence
_MOST_STEPS = 120  # after these the columns that have not converged are solved densely
_COLUMNS = 64  # ranks of a task


def residual_norms(scaled: Tensor, last: int, workers: Workers) -> Tensor:
    """Return the operator norm of a sliced layer's residual at rank 0, 1, ..., ``last``.

    Args:
        scaled: ``(k, n, rows)``: ``sigma_il u_il`` of slice ``i``, ``l`` descending, in the working precision.
        last: the largest rank of interest, 0 to ``n``; at ``n`` the norm is 0.
        workers: where the products are computed.

    Returns:
        ``(last + 1,)`` float64, never rising.
    """
    by_rank = scaled.transpose(0, 1)  # rank first: what a rank keeps is a run of consecutive entries
    full = by_rank.shape[0]
    solved = min(last + 1, full)
    rest = by_rank[solved:].reshape(-1, scaled.shape[-1])
    common = rest.mT @ rest  # every rank of interest keeps these

    def task(start: int) -> Tensor:
        stop = min(start + _COLUMNS, solved)
        kept = by_rank[start:solved]
        return _largest_eigenvalues(kept.flatten(0, 1).contiguous(), common, kept.shape[1], stop - start)

    squared = torch.cat(workers.map(task, range(0, solved, _COLUMNS))).double()
    # Lanczos approaches from below, and a norm never rises with rank: a larger one further on is the better value.
    squared = squared.flip(0).cummax(0).values.flip(0)
    return torch.nn.functional.pad(squared.clamp(min=0).sqrt(), (0, last + 1 - solved))


@dataclass
class _Krylov:
    """The three-term recurrence of several symmetric operators side by side, one a column."""

    current: Tensor
    previous: Tensor
    diagonal: list[Tensor] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)

    def advance(self, image: Tensor) -> None:
        """Take the image of the current vectors, and make the next ones."""
        alpha = (self.current * image).sum(0)
        image = image - alpha * self.current
        if self.beside:
            image = image - self.beside[-1] * self.previous
        beta = image.norm(dim=0)
        scale = torch.stack([*self.diagonal, alpha]).abs().amax(0)
        # An invariant subspace ends the column: zero vectors add zeros to its tridiagonal matrix, which is harmless.
        alive = beta > scale * torch.finfo(image.dtype).eps
        beta = torch.where(alive, beta, 0.0)
        self.previous, self.current = self.current, torch.where(alive, image / beta, 0.0)
        self.diagonal.append(alpha)
        self.beside.append(beta)

    def largest(self) -> tuple[Tensor, Tensor]:
        """Return the largest Ritz value of each column, and a bound of what it may lack."""
        diagonal, beside = torch.stack(self.diagonal, -1).double(), torch.stack(self.beside, -1).double()
        matrix = torch.diag_embed(diagonal)
        matrix += torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
        values, vectors = torch.linalg.eigh(matrix)
        residual = beside[:, -1] * vectors[:, -1, -1].abs()
        gap = values[:, -1] - values[:, -2]
        return values[:, -1], torch.minimum(residual, residual**2 / gap.clamp(min=torch.finfo(torch.float64).tiny))


def _largest_eigenvalues(rows: Tensor, common: Tensor, num_slices: int, columns: int) -> Tensor:
    """Return ``lambda_max(common + A_c^T A_c)`` for each column ``c``, ``A_c`` being ``rows`` from rank ``c`` on.

    Args:
        rows: ``(ranks * k, n)``, rank by rank.
        common: ``(n, n)``.
        num_slices: ``k``, rows of a rank.
        columns: number of ranks solved, at most ``ranks``.
    """
    size = common.shape[0]
    seed = torch.Generator().manual_seed(size)
    start = torch.randn(size, 1, generator=seed, dtype=torch.float64).to(rows)
    krylov = _Krylov((start / start.norm()).expand(size, columns), torch.zeros_like(common[:, :1]))
    tolerance = torch.finfo(rows.dtype).eps
    while True:
        for _ in range(min(_STEPS, size)):
            krylov.advance(_image(rows, common, krylov.current, num_slices))
        values, lacking = krylov.largest()
        open_columns = lacking > tolerance * values
        if not open_columns.any():
            return values
        if len(krylov.diagonal) >= _MOST_STEPS:
            return _solve_densely(values, open_columns, rows, common, num_slices)


def _image(rows: Tensor, common: Tensor, vectors: Tensor, num_slices: int) -> Tensor:
    """Apply each column's operator to its vector: ``common v + A_c^T A_c v``."""
    columns = vectors.shape[1]
    inner = rows @ vectors
    masked = inner[: columns * num_slices].view(columns, num_slices, columns)
    masked *= torch.ones(columns, columns, dtype=vectors.dtype, device=vectors.device).tril().unsqueeze(1)
    return torch.addmm(common @ vectors, rows.mT, inner)


def _solve_densely(values: Tensor, which: Tensor, rows: Tensor, common: Tensor, num_slices: int) -> Tensor:
    """Replace the values of the named columns by those of a dense eigenvalue decomposition."""
    exact = values.clone()
    for column in which.nonzero().flatten().tolist():
        kept = rows[column * num_slices :].double()
        exact[column] = torch.linalg.eigvalsh(common.double() + kept.mT @ kept)[-1]
    return exact
