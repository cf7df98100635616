"""Screening: the ranks of a slicing that are of no use, found many at a time.

For every unit vector ``x`` the residual at rank ``j`` has ``||R_j||_2^2 >= x^T R_j R_j^T x``, and that is
``sum_{l > j} sum_i (sigma_il u_il . x)^2``: one product with all scaled left vectors bounds every rank from below. Good
vectors are the leading Ritz vectors of some of the ranks, after a few Lanczos steps; those of a rank do for its
neighbours. Ranks that stay below their limit get better vectors in another round, as long as that is worth it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.lanczos import Lanczos

_STEPS = 6  # Lanczos steps of a round
_MOST = 32  # vectors of a round
_ROUNDS = 4
_WORTH = 0.75  # another round is worth it if no more than so many of the ranks were left by the one before


def screen(by_rank: Tensor, useless: Tensor, workers: Workers) -> Tensor:
    """Return the limits of ranks, 0 in place of those that are shown to be reached.

    Args:
        by_rank: ``(ranks, k, n)``, the scaled left vectors; what rank ``j`` keeps starts at entry ``j``.
        useless: ``(solved,)`` float64, limits on the squared norms; 0 for a rank of which nothing is asked.
        workers: where the products are computed.
    """
    rows, num_slices = by_rank.flatten(0, 1), by_rank.shape[1]
    left, starts, going = useless, None, useless.nonzero().flatten()
    for _ in range(_ROUNDS):
        if not len(going):
            break
        halves = _spread(going).chunk(2)  # whatever the number of workers: fixed parts have fixed bits
        tasks = [(half, None if starts is None else starts[half]) for half in halves]
        vectors = torch.cat(workers.map(partial(_ritz_vectors, rows, num_slices), tasks))
        bounds, best = _bounds(rows, num_slices, vectors)[: len(left)].max(dim=1)
        # Products in working precision: a bound must be above its limit by more than their rounding.
        left = torch.where(bounds * (1 - 32 * torch.finfo(rows.dtype).eps) >= left, 0.0, left)
        starts = vectors[best]
        before, going = going, left.nonzero().flatten()
        if len(going) > _WORTH * len(before):
            break
    return left


def _spread(ranks: Tensor) -> Tensor:
    """Return some of the ranks, evenly spread."""
    count = min(len(ranks), _MOST)
    return ranks[torch.arange(count, device=ranks.device) * len(ranks) // count]


def _ritz_vectors(rows: Tensor, num_slices: int, task: tuple[Tensor, Tensor | None]) -> Tensor:
    """Return a unit vector ``(chosen, n)`` near the leading eigenvector of each of some ranks.

    Args:
        rows: ``(ranks * k, n)``.
        num_slices: ``k``.
        task: the ranks, ascending, and the vectors to start with.
    """
    chosen, start = task
    first = int(chosen[0])
    rows = rows[first * num_slices :]
    ranks = torch.arange(first, first + len(rows) // num_slices, device=rows.device)
    mask = (ranks.unsqueeze(1) >= chosen).to(rows.dtype).unsqueeze(1)
    limits = torch.full((1, len(chosen)), torch.inf, dtype=torch.float64, device=rows.device)
    lanczos, basis = Lanczos(rows.shape[1], limits, rows, start), []
    for _ in range(_STEPS):
        basis.append(lanczos.vectors[0])
        inner = rows @ basis[-1].mT
        inner.view(len(ranks), num_slices, -1).mul_(mask)
        lanczos.advance((inner.mT @ rows).unsqueeze(0))
    vectors = torch.einsum("sni,ns->ni", torch.stack(basis), lanczos.leading()[0].to(rows))
    return torch.nn.functional.normalize(vectors, dim=-1)


def _bounds(rows: Tensor, num_slices: int, vectors: Tensor) -> Tensor:
    """Return ``(ranks, vectors)`` float64: ``x^T R_j R_j^T x`` for each rank and each unit vector."""
    each = (rows @ vectors.mT).square_().view(-1, num_slices, len(vectors)).sum(1, dtype=torch.float64)
    return each.flip(0).cumsum(0).flip(0)
