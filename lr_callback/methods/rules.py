"""Rules with one number for all layers: what ALDS is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lr_callback.candidates import Candidate, LayerCandidates
from lr_callback.methods.base import Choice, Method, cost_of


class _ScalarRule(Method):
    """A rule with one number for all layers, found by bisection; plain SVD, one slice."""

    def __init__(self, error: str) -> None:
        super().__init__(error, max_slices=1)

    @abstractmethod
    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the rank of a layer; it never falls as ``generosity`` rises from 0 to 1."""

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Find the most generous number that fits the budget."""
        low, high = 0.0, 1.0
        if _total(layers, self._at(layers, low)) > budget:
            raise ValueError(f"`budget` must be at least {self.smallest_cost(layers)}, got {budget}.")
        if _total(layers, self._at(layers, high)) <= budget:
            return self._at(layers, high)
        while (middle := (low + high) / 2) not in (low, high):
            fits = _total(layers, self._at(layers, middle)) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return self._at(layers, low)

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost at the least generous number."""
        return _total(layers, self._at(layers, 0.0))

    def _at(self, layers: Mapping[str, LayerCandidates], generosity: float) -> dict[str, Choice]:
        return {name: self._choice(layer, generosity) for name, layer in layers.items()}

    def _choice(self, layer: LayerCandidates, generosity: float) -> Choice:
        if not layer.candidates:
            return None
        candidate = layer.candidates[0]
        rank = max(1, self.rank(candidate, generosity))
        return (candidate, rank) if rank <= candidate.last else None


class UniformRank(_ScalarRule):
    """The same fraction of the full rank in every layer: ``rank = round(t * full_rank)``; plain SVD, one slice.

    Source: the comparison method "SVD" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("operator")

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the fraction of the full rank, rounded."""
        return round(generosity * candidate.full_rank)


class SingularValueThreshold(_ScalarRule):
    """The same relative error in every layer: the smallest rank with ``sigma_{j+1} / sigma_1 <= e``; one slice.

    Source: the comparison method "SVD-Error" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("operator")

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the smallest rank whose error is at most one minus the generosity."""
        return _first_at_most(candidate.errors, 1.0 - generosity)


class EnergyThreshold(_ScalarRule):
    """The same share of energy dropped in every layer: ``sum_{i > j} sigma_i^2 / sum sigma_i^2 <= t``; one slice.

    Source: the comparison method "SVD-Energy" of arXiv 2107.11442.
    """

    def __init__(self) -> None:
        super().__init__("frobenius")

    def rank(self, candidate: Candidate, generosity: float) -> int:
        """Return the smallest rank that drops at most one minus the generosity of the energy."""
        return _first_at_most(candidate.errors.square(), 1.0 - generosity)


def _first_at_most(falling: Tensor, limit: float) -> int:
    """Return the index of the first entry at most ``limit``, the length if there is none."""
    return int((falling > limit).sum())


def _total(layers: Mapping[str, LayerCandidates], choices: Mapping[str, Choice]) -> int:
    return sum(cost_of(layers[name], choice) for name, choice in choices.items())
