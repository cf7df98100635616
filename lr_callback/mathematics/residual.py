"""Residual norms: the exact operator norm of what truncation leaves over, at every rank at once.

With ``k`` slices truncated to rank ``j`` the residual of a layer is ``R_j = [R_1 ... R_k]``, and

    ``||R_j||_2^2 = lambda_max(R_j R_j^T) = lambda_max(sum_i sum_{l > j} (sigma_il u_il)(sigma_il u_il)^T)``.

The scaled left vectors of all ranks are rows of one matrix; rank ``j`` keeps those with ``l > j``.
Consecutive ranks make a *block*: what all of its ranks keep is one matrix that they share, what they do not share is a
mask over few rows. A *chunk* of blocks is solved side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.mathematics.lanczos import Lanczos
from lr_callback.mathematics.screening import screen

Result = TypeVar("Result")

_FIRST = 32  # Lanczos steps before the first look at convergence
_STEPS = 8  # between two looks: over fewer, a value that will rise again can seem to have settled
_STRIDE = 4  # between two questions which ranks are over
_MOST_STEPS = 160  # what has not converged by then is solved densely
_SMALL = 64  # up to this size a dense eigenvalue decomposition is cheaper than a recurrence
_COLUMNS = 32  # the most ranks of a block
_LEAST_COLUMNS = 8  # the fewest, unless slices are so many that each rank has a matrix of its own
_SCREENED = 256  # up to this size the matrices of all ranks cost less than to find out which are needed
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
    useless, columns = useless.to(scaled.device), _columns(by_rank, solved)
    squared = torch.full_like(useless, torch.inf)
    if columns == 1 and by_rank.shape[-1] > _SCREENED:
        useless = screen(by_rank, useless, workers)
    blocks = [max(solved - first, columns) - columns for first in range(0, solved, columns)]
    wanted = (useless > 0).tolist()
    ends = [first + columns - 1 for first in blocks[::-1] if any(wanted[first : first + columns])]
    for ranks, values in _over_tails(by_rank, ends, workers, partial(_solve, by_rank, useless, columns)):
        squared[ranks] = torch.minimum(squared[ranks], values)  # the first two blocks may overlap
    norms = _never_rising(squared).clamp(min=0).sqrt()
    return torch.nn.functional.pad(norms, (0, last + 1 - solved))


def _never_rising(squared: Tensor) -> Tensor:
    """Lift each value to the largest after it: Lanczos approaches from below, and the norms never rise with rank."""
    known = torch.where(squared.isinf(), 0.0, squared)
    return torch.where(squared.isinf(), squared, known.flip(0).cummax(0).values.flip(0))


def _columns(by_rank: Tensor, solved: int) -> int:
    """Return how many ranks a block has."""
    _, num_slices, size = by_rank.shape
    # A step costs 2 n^2 for what the ranks of a block share and 4 k columns n for what they do not: keep them even.
    most = 1 if 4 * num_slices >= size else min(_COLUMNS, max(_LEAST_COLUMNS, size // (2 * num_slices)))
    return -(-solved // -(-solved // most))


def _over_tails(
    by_rank: Tensor, ranks: list[int], workers: Workers, function: Callable[[tuple[list[int], Tensor]], Result]
) -> list[Result]:
    """Call a function with some ranks, ascending, and their matrices ``(ranks, n, n)``, until all had their turn.

    A matrix is that of a higher rank and a few products more: the highest ranks come first, and who is free makes the
    next ones while the others are at work. The results are in no order.
    """
    size = by_rank.shape[-1]
    together = max(1, _CHUNK // size**2)
    together = min(together, max(1, -(-len(ranks) // 2))) if size > 2 * _SMALL else together
    parts = [ranks[max(0, stop - together) : stop] for stop in range(len(ranks), 0, -together)]
    tails, turn = _tails(by_rank, parts), Lock()

    def task(_: int) -> Result:
        with turn:
            part, matrices = next(tails)
        return function((part, matrices))

    return workers.map(task, range(len(parts)))


def _tails(by_rank: Tensor, parts: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield parts of ranks, the highest first, and ``(ranks, n, n)``: the sums of what each of the ranks keeps."""
    stop, beyond = len(by_rank), by_rank.new_zeros(by_rank.shape[-1], by_rank.shape[-1])
    for ranks in parts:
        tails = beyond.new_empty(len(ranks), *beyond.shape)
        for index in range(len(ranks) - 1, -1, -1):
            rows = by_rank[ranks[index] : stop].flatten(0, 1)
            beyond, stop = torch.addmm(beyond, rows.mT, rows, out=tails[index]), ranks[index]
        yield ranks, tails


@dataclass
class _Chunk:
    """Blocks of ranks.

    Args:
        rows: ``(blocks, (columns - 1) * k, n)``, what not all ranks of a block keep, rank by rank.
        shared: ``(blocks, n, n)``, what all of them keep.
        useless: ``(blocks, columns)``, from this value on a rank is given up; 0 for one of which nothing is asked.
        num_slices: ``k``, rows of a rank.
    """

    rows: Tensor
    shared: Tensor
    useless: Tensor
    num_slices: int


def _solve(by_rank: Tensor, useless: Tensor, columns: int, task: tuple[list[int], Tensor]) -> tuple[Tensor, Tensor]:
    """Return ranks and their largest eigenvalues, infinity for those that are of no use."""
    ends, shared = task
    ranks = torch.tensor(ends, device=useless.device).unsqueeze(1) + torch.arange(1 - columns, 1, device=useless.device)
    rows = by_rank[ranks[:, :-1]].flatten(1, 2)
    chunk = _Chunk(rows, shared, useless[ranks], by_rank.shape[1])
    found = torch.full_like(chunk.useless, torch.inf)
    going = chunk.useless > 0
    if shared.shape[-1] > _SMALL:
        going = _Iteration(chunk, found).run(going)
    chosen = going.nonzero(as_tuple=True)
    if len(chosen[0]):
        found[chosen] = _dense(chunk, *chosen)
    return ranks, torch.where(found < chunk.useless, found, torch.inf)


def _dense(chunk: _Chunk, blocks: Tensor, columns: Tensor) -> Tensor:
    """Return the largest eigenvalues of some ranks of a chunk, by dense decompositions."""
    each = chunk.rows.view(len(chunk.shared), -1, chunk.num_slices, chunk.rows.shape[-1]).double()
    own = torch.nn.functional.pad((each.mT @ each).flip(1).cumsum(1).flip(1), (0, 0, 0, 0, 0, 1))
    values: Tensor = torch.linalg.eigvalsh(chunk.shared[blocks].double() + own[blocks, columns])
    return values[:, -1]


class _Iteration:
    """A chunk on its way: which of its ranks are still going on, and where they stand.

    Args:
        chunk: to solve.
        found: ``(blocks, columns)``, filled in as ranks settle.
    """

    def __init__(self, chunk: _Chunk, found: Tensor) -> None:
        self._rows, self._shared, self._num_slices = chunk.rows, chunk.shared, chunk.num_slices
        self._found, self._values = found.view(-1), torch.zeros_like(found).view(-1)
        self._places = torch.arange(found.numel(), device=found.device).view_as(found)
        self._width = found.shape[1]
        self._lanczos = Lanczos(chunk.rows.shape[-1], chunk.useless, chunk.rows)

    def run(self, going: Tensor) -> Tensor:
        """Advance the ranks of a mask ``(blocks, columns)`` until none is left; return which could not be settled."""
        shape, lanczos = going.shape, self._lanczos
        going, width = self._drop(going)
        while width and lanczos.steps < _MOST_STEPS:
            mask = self._mask()
            for _ in range(_STRIDE):
                lanczos.advance(self._images(mask))
            going = going & ~lanczos.over
            if lanczos.steps >= _FIRST and lanczos.steps % _STEPS == 0:
                going = going & ~self._look(going)
            going, width = self._drop(going)
        pending = torch.zeros(len(self._found), dtype=torch.bool, device=going.device)
        pending[self._places] = going
        return pending.view(shape)

    def _images(self, mask: Tensor) -> Tensor:
        """Apply each rank's operator to its vector: what its block shares, and the rows that it keeps itself."""
        vectors = self._lanczos.vectors
        images: Tensor = vectors @ self._shared
        if not self._rows.shape[1]:
            return images
        inner = vectors @ self._rows.mT
        inner.view(*inner.shape[:2], self._width - 1, self._num_slices).mul_(mask)
        return images.baddbmm_(inner, self._rows)

    def _mask(self) -> Tensor:
        """Return ``(blocks, columns, ranks - 1, 1)``: 1 where a column's rank keeps the rows of a rank of its block."""
        ranks = torch.arange(self._width - 1, device=self._rows.device).view(-1, 1)
        return (ranks >= (self._places % self._width)[..., None, None]).to(self._rows.dtype)

    def _look(self, going: Tensor) -> Tensor:
        """Return which of the ranks that are going on have settled, and note the values."""
        chosen = going.nonzero(as_tuple=True)
        places, values = self._places[chosen], self._lanczos.largest(chosen)
        settled = values - self._values[places] <= 8 * torch.finfo(self._rows.dtype).eps * values
        self._values[places] = values
        self._found[places] = torch.where(settled, values, self._found[places])
        return torch.zeros_like(going).index_put(chosen, settled)

    def _drop(self, going: Tensor) -> tuple[Tensor, int]:
        """Let what is not going on go, once that makes the products half as large.

        Returns what goes on, and how many of a block do at most: what the host must know, in one transfer.
        """
        counts = going.sum(1).tolist()
        left, width = [block for block, count in enumerate(counts) if count], max(counts)
        if 2 * len(left) * width > going.numel() or not width:
            return going, width
        blocks = torch.tensor(left, device=going.device)
        columns = (~going[blocks]).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self._lanczos.keep(blocks, columns)
        self._places = self._places[blocks].gather(1, columns)
        if len(blocks) < len(going):
            self._rows, self._shared = self._rows[blocks], self._shared[blocks]
        return going[blocks].gather(1, columns), width
