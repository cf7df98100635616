"""Curves: what a layer takes at each rank, from measurements at some, and when these are enough.

Hardware multiplies in blocks. A width of 18 takes as long as one of 32, or longer, where the block is 16; from block to
block time is close to a line. So the ranks that may be chosen are those at which the width is a multiple of the block,
where time is measured at some and interpolated between them, and those that were measured; nothing is said of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

import torch
from torch import Tensor

from lr_callback.decisions.costs import CountedCost, LayerCost
from lr_callback.mathematics.folding import Geometry

BLOCK = 16
"""Entries of a width that are worked on together: float32 in a register of AVX-512, or half of a tensor core's tile."""
_CLOSE = 0.05
"""Relative misfit of an interpolated time that is let pass."""
_FINER = 0.9
"""Share of the next block's time below which a rank between two blocks shows that the blocks are smaller."""

Key = tuple[str, int]
"""Folding and number of slices."""


@dataclass(frozen=True)
class Curve:
    """Times of the forms of a layer with one folding and number of slices.

    Args:
        step: ranks that are multiples of it are those to choose, beside the measured ones.
        times: rank -> nanoseconds, as measured; ascending.
        misfit: largest relative difference of a time that was interpolated and then measured.

    Example::

        >>> Curve(16, {8: 60, 16: 100, 48: 300}).at_ranks(60, unknown=999).tolist()[8:49:4]
        [60, 999, 100, 999, 999, 999, 200, 999, 999, 999, 300]
    """

    step: int
    times: Mapping[int, int]
    misfit: float = 0.0

    def scaled(self, factor: float) -> Curve:
        """Return the times on a machine that is slower by a factor."""
        return replace(self, times={rank: round(time * factor) for rank, time in self.times.items()})

    @property
    def last(self) -> int:
        """Largest rank that was measured."""
        return max(self.times)

    def at_ranks(self, last: int, unknown: int) -> Tensor:
        """Return the nanoseconds at rank 0 to ``last``, int64; ``unknown`` at those of which nothing is said."""
        ranks, known = torch.arange(last + 1), torch.tensor(list(self.times))
        told = torch.isin(ranks, known) | ((ranks % self.step == 0) & (ranks >= known[0]) & (ranks <= self.last))
        return torch.where(told, self._between(ranks).round().long(), unknown)

    def at(self, rank: int) -> float:
        """Return the nanoseconds at a rank to choose."""
        return float(self._between(torch.tensor(rank)))

    def _between(self, ranks: Tensor) -> Tensor:
        known, times = torch.tensor(list(self.times)), torch.tensor(list(self.times.values()), dtype=torch.float64)
        upper = torch.searchsorted(known, ranks).clamp_max(len(known) - 1)
        lower = (upper - 1).clamp_min(0)
        width = (known[upper] - known[lower]).clamp_min(1)
        share = ((ranks - known[lower]) / width).clamp(0, 1)
        return times[lower] + share * (times[upper] - times[lower])


def measured_curve(
    time: Callable[[int], int], last: int, dense: int, width: int, rank_multiple: int = 1
) -> Curve | None:
    """Measure a curve: its ends, and what is between them as finely as the line through two points does not tell.

    Args:
        time: measures the nanoseconds at a rank.
        last: largest rank.
        dense: nanoseconds of the dense layer.
        width: by how much a rank widens what is between the factors.
        rank_multiple: that ranks must be a multiple of; with one above 1 these are the ranks to choose.

    Returns:
        The curve; None if no rank is faster than the dense layer, as far as the first block tells.
    """
    times: dict[int, int] = {}

    def at(rank: int) -> int:
        times[rank] = times[rank] if rank in times else time(rank)
        return times[rank]

    step = rank_multiple if rank_multiple > 1 else BLOCK // gcd(BLOCK, width)
    first = min(step, last)
    if last < rank_multiple or (at(first) >= dense and at(1) >= dense):
        return None
    if rank_multiple == 1 and at(1) < _FINER * at(first):
        for rank in _powers(2, first):
            at(rank)
    misfit = _refine(at, step, last // step * step, step, dense) if last > step else 0.0
    finer = _finer(at, step, last) if rank_multiple == 1 else step
    if finer < step:
        misfit = _refine(at, finer, last // finer * finer, finer, dense)
    return Curve(finer, dict(sorted(times.items())), misfit)


def _powers(first: int, last: int) -> Iterable[int]:
    return (first * 2**power for power in range(max(0, (last // first).bit_length())))


def _refine(at: Callable[[int], int], low: int, high: int, step: int, dense: int) -> float:
    """Measure in the middle of two ranks, and on both sides of it where a line does not fit; return the misfit."""
    if at(low) >= dense:
        return 0.0  # what is slower than the dense layer is not chosen, and need not be known
    middle = (low + high) // 2 // step * step
    if middle <= low:
        at(high)
        return 0.0
    guess = Curve(step, {low: at(low), high: at(high)}).at(middle)
    misfit = abs(guess - at(middle)) / at(middle)
    if misfit <= _CLOSE:
        return misfit
    return max(_refine(at, low, middle, step, dense), _refine(at, middle, high, step, dense))


def _finer(at: Callable[[int], int], step: int, last: int) -> int:
    """Return the step, halved for as long as a rank between two multiples is clearly faster than the upper one."""
    while step > 1 and 2 * step <= last and at(2 * step - step // 2) < _FINER * at(2 * step):
        step //= 2
    return step


@dataclass(frozen=True)
class LayerTimes:
    """What a layer takes in one run of the model, all of its calls together.

    Args:
        dense: nanoseconds of the dense layer.
        curves: (folding, number of slices) -> times; those without a rank that is faster are left out.
    """

    dense: int
    curves: Mapping[Key, Curve] = field(default_factory=dict)

    def scaled(self, factor: float) -> LayerTimes:
        """Return the times on a machine that is slower by a factor."""
        return LayerTimes(round(self.dense * factor), {key: one.scaled(factor) for key, one in self.curves.items()})


@dataclass(frozen=True)
class MeasuredCost(LayerCost):
    """Nanoseconds of one layer, as measured; a form that is not faster than the dense layer is never chosen.

    Args:
        geometry: sizes of the weight.
        times: of the layer.
        counted: parameters of the layer, by which equal foldings are told apart.
    """

    gates = True
    geometry: Geometry
    times: LayerTimes
    counted: CountedCost

    @property
    def dense(self) -> int:
        """Nanoseconds of the dense layer."""
        return self.times.dense

    def at_ranks(self, folding: str, num_slices: int, last: int) -> Tensor:
        """Return the nanoseconds at rank 0 to ``last``, int64; those of the dense layer where nothing is known."""
        curve = self.times.curves.get((folding, num_slices))
        return torch.full((last + 1,), self.dense) if curve is None else curve.at_ranks(last, self.dense)

    def last_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank that is faster than the dense layer; 0 if none is."""
        curve = self.times.curves.get((folding, num_slices))
        if curve is None:
            return 0
        faster = (self.at_ranks(folding, num_slices, curve.last) < self.dense).nonzero().flatten().tolist()
        return max(faster, default=0)

    def distinct_foldings(self, foldings: Iterable[str]) -> tuple[str, ...]:
        """Drop foldings that give the same matrices as another; the one with the fewest parameters stays."""
        return self.counted.distinct_foldings(foldings)
