"""Residual norms: the exact operator norm of what truncation leaves over, at every rank at once.

With ``k`` slices truncated to rank ``j`` the residual of a layer is ``R_j = [R_1 ... R_k]``, and

    ``||R_j||_2^2 = lambda_max(R_j R_j^T) = lambda_max(sum_i sum_{l > j} (sigma_il u_il)(sigma_il u_il)^T)``.

The scaled left vectors of all ranks are rows of one matrix; rank ``j`` keeps those with ``l > j``. Consecutive ranks
make a *block*: what all of its ranks keep is one matrix that they share, what they do not share is a mask over few
rows. A *chunk* of blocks is solved side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lr_callback.lanczos import Lanczos
from lr_callback.parallel import Workers

_FIRST = 32  # Lanczos steps before the first look at convergence
_STEPS = 8  # between two looks
_STRIDE = 4  # between two questions which ranks are over
_MOST_STEPS = 160  # what has not converged by then is solved densely
_SMALL = 64  # up to this size a dense eigenvalue decomposition is cheaper than a recurrence
_COLUMNS = 32  # the most ranks of a block
_LEAST_COLUMNS = 8  # even where slices are many
_CHUNK = 2**19  # numbers in the shared matrices of a chunk


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
    chunks = _chunks(by_rank, solved, useless.to(scaled.device))
    sums = workers.map(_gram, [*(chunk.rows.flatten(0, 1) for chunk in chunks[1:]), by_rank[solved:].flatten(0, 1)])
    for index in range(len(sums) - 2, -1, -1):
        sums[index] += sums[index + 1]
    squared = torch.cat(workers.map(_solve, zip(chunks, sums, strict=True)))[:solved]
    norms = _never_rising(squared).clamp(min=0).sqrt()
    return torch.nn.functional.pad(norms, (0, last + 1 - solved))


def _never_rising(squared: Tensor) -> Tensor:
    """Lift each value to the largest after it: Lanczos approaches from below, and the norms never rise with rank."""
    known = torch.where(squared.isinf(), 0.0, squared)
    return torch.where(squared.isinf(), squared, known.flip(0).cummax(0).values.flip(0))


def _gram(rows: Tensor) -> Tensor:
    return rows.mT @ rows


@dataclass
class _Chunk:
    """Consecutive ranks, in blocks.

    Args:
        rows: ``(blocks, columns * k, n)``, rank by rank.
        useless: ``(blocks, columns)``, from this value on a rank is given up; 0 for one that fills up the last block.
        num_slices: ``k``, rows of a rank.
    """

    rows: Tensor
    useless: Tensor
    num_slices: int

    def shared(self, beyond: Tensor) -> Tensor:
        """Return ``(blocks, n, n)``, what all ranks of each block keep; ``beyond`` is kept by those of the last."""
        shared = torch.empty(len(self.rows), *beyond.shape, dtype=beyond.dtype, device=beyond.device)
        shared[-1] = beyond
        for block in range(len(shared) - 1, 0, -1):
            torch.addmm(shared[block], self.rows[block].mT, self.rows[block], out=shared[block - 1])
        return shared


def _chunks(by_rank: Tensor, solved: int, useless: Tensor) -> list[_Chunk]:
    """Cut the ranks to solve into chunks of equal blocks, the last one filled up with ranks of no use."""
    _, num_slices, size = by_rank.shape
    # A step costs 2 n^2 for what the ranks of a block share and 4 k columns n for what they do not: keep them even.
    blocks = -(-solved // min(_COLUMNS, max(_LEAST_COLUMNS, size // (2 * num_slices))))
    columns = -(-solved // blocks)
    blocks = min(max(1, _CHUNK // size**2), -(-blocks // 2))
    chunks = []
    for first in range(0, solved, blocks * columns):
        have = min(blocks, -(-(solved - first) // columns)) * columns
        rows = by_rank[first : min(first + have, solved)].flatten(0, 1)
        limits = useless[first : first + have]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, have * num_slices - len(rows))) if len(limits) < have else rows
        limits = torch.nn.functional.pad(limits, (0, have - len(limits)))
        chunks.append(_Chunk(rows.view(-1, columns * num_slices, size), limits.view(-1, columns), num_slices))
    return chunks


def _solve(task: tuple[_Chunk, Tensor]) -> Tensor:
    """Return the largest eigenvalues of a chunk's ranks, infinity for those that are of no use."""
    chunk, beyond = task
    shared = chunk.shared(beyond)
    found = torch.full_like(chunk.useless, torch.inf)
    pending = chunk.useless > 0
    if len(beyond) > _SMALL:
        pending = _Iteration(chunk, shared, found).run(pending)
    for block, column in pending.nonzero().tolist():
        rows = chunk.rows[block, column * chunk.num_slices :].double()
        value = torch.linalg.eigvalsh(shared[block].double() + rows.mT @ rows)[-1]
        found[block, column] = torch.where(value >= chunk.useless[block, column], torch.inf, value)
    return found.flatten()


class _Iteration:
    """A chunk on its way: which of its ranks are still going on, and where they stand.

    Args:
        chunk: to solve.
        shared: of its blocks.
        found: ``(blocks, columns)``, filled in as ranks settle.
    """

    def __init__(self, chunk: _Chunk, shared: Tensor, found: Tensor) -> None:
        self._rows, self._shared, self._num_slices = chunk.rows, shared, chunk.num_slices
        self._found, self._values = found.view(-1), torch.zeros_like(found).view(-1)
        self._places = torch.arange(found.numel(), device=found.device).view_as(found)
        self._width = found.shape[1]
        self._lanczos = Lanczos(shared.shape[-1], chunk.useless, chunk.rows)

    def run(self, going: Tensor) -> Tensor:
        """Advance the ranks of a mask ``(blocks, columns)`` until none is left; return which could not be settled."""
        shape, lanczos = going.shape, self._lanczos
        going = self._drop(going)
        while going.any() and lanczos.steps < _MOST_STEPS:
            mask = self._mask()
            for _ in range(_STRIDE):
                lanczos.advance(self._images(mask))
            going = going & ~lanczos.over
            if lanczos.steps >= _FIRST and lanczos.steps % _STEPS == 0 and going.any():
                going = going & ~self._look(going)
            going = self._drop(going)
        pending = torch.zeros(len(self._found), dtype=torch.bool, device=going.device)
        pending[self._places[going]] = True
        return pending.view(shape)

    def _images(self, mask: Tensor) -> Tensor:
        """Apply each rank's operator to its vector: what its block shares, and the rows that it keeps itself."""
        vectors = self._lanczos.vectors
        inner = self._rows @ vectors
        inner.view(len(inner), -1, self._num_slices, inner.shape[-1]).mul_(mask)
        return torch.baddbmm(self._shared @ vectors, self._rows.mT, inner)

    def _mask(self) -> Tensor:
        """Return ``(blocks, ranks, 1, columns)``: 1 where the column's rank keeps the rows of a rank of its block."""
        ranks = torch.arange(self._width, device=self._rows.device).view(-1, 1, 1)
        return (ranks >= (self._places % self._width)[:, None, None]).to(self._rows.dtype)

    def _look(self, going: Tensor) -> Tensor:
        """Return which of the ranks that are going on have settled, and note the values."""
        places, values = self._places[going], self._lanczos.largest(going)
        settled = values - self._values[places] <= 8 * torch.finfo(self._rows.dtype).eps * values
        self._values[places] = values
        self._found[places[settled]] = values[settled]
        return torch.zeros_like(going).masked_scatter(going, settled)

    def _drop(self, going: Tensor) -> Tensor:
        """Let what is not going on go, once that makes the products half as large."""
        counts = going.sum(1)
        blocks, width = counts.nonzero().flatten(), int(counts.max())
        if 2 * len(blocks) * width > going.numel() or not width:
            return going
        columns = (~going[blocks]).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self._lanczos.keep(blocks, columns)
        self._places = self._places[blocks].gather(1, columns)
        if len(blocks) < len(going):
            self._rows, self._shared = self._rows[blocks], self._shared[blocks]
        return going[blocks].gather(1, columns)
