"""Rules with one number for all layers: what ALDS is compared with."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lr_callback.decisions.candidates import Candidate, Frontier, LayerCandidates, frontier
from lr_callback.decisions.methods.base import Choice, Method, check_at_least_one, cost_of
from lr_callback.mathematics.folding import Geometry

Choices = dict[str, Choice]
"""Layer name -> its choice."""
_SKETCHED = 64
"""Numbers between 0 and 1 that are tried where a rule is only drawn."""


class _ScalarRule(Method):
    """A rule with one number for all layers, found by bisection."""

    @abstractmethod
    def rule(self, layers: Mapping[str, LayerCandidates]) -> Callable[[float], Choices]:
        """Return what the layers become at a generosity; no layer's cost falls as it rises from 0 to 1."""

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> Choices:
        """Find the most generous number that fits the budget."""
        at, low, high = self.rule(layers), 0.0, 1.0
        if self.smallest_cost(layers) > budget:
            raise ValueError(f"`budget` must be at least {self.smallest_cost(layers)}, got {budget}.")
        if _total(layers, at(high)) <= budget:
            return at(high)
        if _total(layers, at(low)) > budget:
            return dict.fromkeys(layers)
        while (middle := (low + high) / 2) not in (low, high):
            fits = _total(layers, at(middle)) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return at(low)

    def sketch(self, layers: Mapping[str, LayerCandidates], budgets: Sequence[int]) -> list[Choices]:
        """Choose for several budgets, of some numbers the most generous one that fits each."""
        at = self.rule(layers)
        made = [at(step / _SKETCHED) for step in range(_SKETCHED + 1)]
        costs = [_total(layers, choices) for choices in made]
        return [made[max(0, bisect_right(costs, budget) - 1)] for budget in budgets]

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost at the least generous number; of a unit in which factors cost more, that of dense layers."""
        return min(_total(layers, self.rule(layers)(0.0)), _total(layers, dict.fromkeys(layers)))


class _RankRule(_ScalarRule):
    """A rule for the rank of a layer, which has one number of slices."""

    @abstractmethod
    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the rank of a layer; it never falls as ``generosity`` rises from 0 to 1."""

    def rule(self, layers: Mapping[str, LayerCandidates]) -> Callable[[float], Choices]:
        """Take the rank of each layer, 1 at least; dense where that costs no less."""
        return lambda generosity: {name: self._choice(layer, generosity) for name, layer in layers.items()}

    def _choice(self, layer: LayerCandidates, generosity: float) -> Choice:
        if not layer.candidates:
            return None
        candidate = layer.candidates[0]
        rank = max(1, self.rank(candidate, generosity))
        if rank > candidate.last:
            return None
        # Where costs are measured some ranks cannot be chosen, and have no error: the next one below is, or the first.
        known = candidate.errors[1:].isfinite().nonzero().flatten() + 1
        below = known[known <= rank]
        return (candidate, int(below[-1] if len(below) else known[0])) if len(known) else None


class UniformRank(_RankRule):
    """The same fraction of the full rank in every layer: ``rank = round(t * full_rank)``; plain SVD, one slice.

    Source: the comparison method "SVD" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("operator", max_slices=1)

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the fraction of the full rank, rounded."""
        return _share_of_rank(candidate, generosity)


class SingularValueThreshold(_RankRule):
    """The same relative error in every layer: the smallest rank with ``sigma_{j+1} / sigma_1 <= e``; one slice.

    Source: the comparison method "SVD-Error" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("operator", max_slices=1)

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the smallest rank whose error is at most one minus the generosity."""
        return _first_at_most(candidate.errors, 1.0 - generosity)


class EnergyThreshold(_RankRule):
    """The same share of energy dropped in every layer: ``sum_{i > j} sigma_i^2 / sum sigma_i^2 <= t``; one slice.

    Source: the comparison method "SVD-Energy" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("frobenius", max_slices=1)

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the smallest rank that drops at most one minus the generosity of the energy."""
        return _first_at_most(candidate.errors.square(), 1.0 - generosity)


class _FixedSlices(_RankRule):
    """A rule for the rank where every layer has the number of slices nearest to one that is given.

    Args:
        num_slices: wanted; a layer takes the number nearest to it that divides its input channels, of two as near the
            larger.
    """

    def __init__(self, num_slices: int = 3) -> None:
        super().__init__("slice")
        check_at_least_one("num_slices", num_slices)
        self.num_slices = num_slices

    def slice_counts(self, geometry: Geometry) -> list[int]:
        """Return the one number of slices that the layer has."""
        return [min(geometry.slice_counts(), key=lambda count: (abs(count - self.num_slices), -count))]


class ALDSSimple(_FixedSlices):
    """The same number of slices and the same fraction of the full rank in every layer.

    ``rank = round(t * full_rank)``, where the full rank is that of a slice. With one slice it is :class:`UniformRank`.

    Args:
        num_slices: wanted; a layer takes the number nearest to it that divides its input channels, of two as near the
            larger.

    Raises:
        ValueError: If it is no whole number of at least 1.

    Source: the ablation "ALDS-Simple" of arXiv 2107.11442, which takes 3 slices, or 5. The fraction is one of
    the rank, as in its code.

    Example::

        >>> ALDSSimple().slice_counts(Geometry(64, 32)), ALDSSimple(num_slices=5).slice_counts(Geometry(64, 30))
        ([4], [5])
    """

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the fraction of the full rank, rounded."""
        return _share_of_rank(candidate, generosity)


class ALDSError(_FixedSlices):
    """The same number of slices and the same largest error in every layer: ALDS without the choice of slices.

    The smallest rank at which no slice has an error above ``e``: ``max_i sigma_{i,j+1} / sigma_1 <= e``. With one slice
    it is :class:`SingularValueThreshold`.

    Args:
        num_slices: see :class:`ALDSSimple`.

    Raises:
        ValueError: If it is no whole number of at least 1.

    Source: the ablation "ALDS-Error" of arXiv 2107.11442, the global step of its Algorithm 1 alone, with 3 slices.
    Differences: the error at rank ``j`` is ``sigma_{j+1}`` as in the paper (its code takes ``sigma_j``).

    Example::

        >>> ALDSError(num_slices=2).slice_counts(Geometry(64, 32))
        [2]
    """

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the smallest rank whose error is at most one minus the generosity."""
        return _first_at_most(candidate.errors, 1.0 - generosity)


class ALDSK(_ScalarRule):
    """The same fraction of the dense cost in every layer, with the best slices for it: ALDS without the global step.

    At a fraction ``t`` a layer takes the smallest error that costs no more than ``t`` times the dense layer, of all
    numbers of slices and ranks; where nothing is as cheap, the cheapest.

    Source: the ablation of arXiv 2107.11442 with the local step alone, "ALDS-K" in its code. Differences: a layer's
    cost stays within its share, where the code rounds its rank up or down; the best slices are found at the fraction
    that is used, where the code finds them at that of three slices each.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> from torch import nn
        >>> allocation = allocate(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), 0.5, method=ALDSK())
        >>> [0.2 < layer.cost / layer.dense_cost < 0.6 for layer in allocation.factorized.values()]
        [True, True]
    """

    def __init__(self) -> None:
        super().__init__("slice")

    def rule(self, layers: Mapping[str, LayerCandidates]) -> Callable[[float], Choices]:
        """Take the best choice of each layer that its share of the dense cost pays for."""
        edges = {name: frontier(layer) for name, layer in layers.items()}
        return lambda share: {name: _within(edge, share * layers[name].dense_cost) for name, edge in edges.items()}


def _within(edge: Frontier, cost: float) -> Choice:
    """Return the best choice of at most a cost; the cheapest, if none is as cheap."""
    return edge.choices[max(0, bisect_right(edge.costs, cost) - 1)]


def _share_of_rank(candidate: Candidate, share: float) -> int:
    return round(share * candidate.full_rank)


def _first_at_most(falling: Tensor, limit: float) -> int:
    """Return the index of the first entry at most ``limit``, the length if there is none."""
    return int((falling > limit).sum())


def _total(layers: Mapping[str, LayerCandidates], choices: Mapping[str, Choice]) -> int:
    return sum(cost_of(layers[name], choice) for name, choice in choices.items())
