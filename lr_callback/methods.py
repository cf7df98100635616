"""Methods: rules that choose, for every layer, what it becomes under one budget.

A method says which candidates it looks at and how it chooses among them. Another way to share a budget is one class
here; in YAML it is named by its ``class_path``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lr_callback.candidates import Candidate, Frontier, LayerCandidates, frontier, layer_candidates
from lr_callback.costs import LayerCost
from lr_callback.errors import find_measure, relative_errors
from lr_callback.folding import decoder_axes
from lr_callback.importance import Importance, weighted_fold
from lr_callback.minimax import minimax
from lr_callback.parallel import Workers

Choice = tuple[Candidate, int] | None
"""A candidate and its rank; None: the layer stays dense."""

OBJECTIVES: Mapping[str, Callable[[Mapping[str, Frontier], int], dict[str, int]]] = {"minimax": minimax}
"""Ways to share a budget over frontiers, by name."""


class Method(ABC):
    """A rule that chooses what every layer becomes.

    Args:
        error: name of the error measure of its candidates.
        foldings: names of the foldings that it tries.
        max_slices: largest number of slices that it tries; None: up to the input channels.
    """

    def __init__(
        self, error: str, foldings: Sequence[str] = ("kernel_in_encoder",), max_slices: int | None = None
    ) -> None:
        find_measure(error)
        _check_foldings(foldings)
        _check_at_least_one("max_slices", max_slices)
        self.error = error
        self.foldings = tuple(foldings)
        self.max_slices = max_slices

    @property
    def takes_any_rank(self) -> bool:
        """Whether every candidate may be chosen at every rank; then the hopeless ones need no error."""
        return True

    def candidates(
        self, weight: Tensor, cost: LayerCost, workers: Workers, importance: Importance | None = None
    ) -> LayerCandidates:
        """Compute the candidates of one layer; see :func:`lr_callback.candidates.layer_candidates`.

        Args:
            weight: dense, ``(F, C / g, *kernel)``.
            cost: of the layer.
            workers: where they are computed.
            importance: of the layer's inputs and outputs, for an error that is weighted; None: all count the same.
        """
        geometry, importance = cost.geometry, importance or Importance()
        importance.check_fits(geometry)

        def curves(folding: str, last: Mapping[int, int]) -> dict[int, Tensor]:
            prices = {count: cost.per_rank(folding, count) for count in last} if self.takes_any_rank else None
            matrix, moments = weighted_fold(weight, folding, geometry, importance)
            return relative_errors(matrix, self.error, last, workers, prices, moments)

        return layer_candidates(cost, self.foldings, self.max_slices, curves)

    def priced(self, cost: LayerCost) -> LayerCandidates:
        """Return the candidates of one layer with their costs right and errors that only fall, none computed."""

        def curves(folding: str, last: Mapping[int, int]) -> dict[int, Tensor]:
            return {count: torch.linspace(1, 0, rank + 1, dtype=torch.float64) for count, rank in last.items()}

        return layer_candidates(cost, self.foldings, self.max_slices, curves)

    @abstractmethod
    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Choose what every layer becomes, at no more than ``budget`` together.

        Raises:
            ValueError: If the budget is below :meth:`smallest_cost`.
        """

    @abstractmethod
    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the smallest cost of all layers together that the method can reach."""

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the arguments, as plain data."""
        arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {"name": type(self).__name__, **arguments}

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


class ALDS(Method):
    """Automatic layer-wise decomposition selection: one global problem over slices and ranks, solved exactly.

    Args:
        error: measure of a layer's error. ``slice``: the worst slice's, what the paper's results were made with;
            ``operator``: exact operator norm of the residual; ``bound``: the paper's Theorem 1; ``frobenius``;
            and, of layers whose importance is known (:mod:`lr_callback.importance`), Frobenius norms weighted by the
            second moments of each slice's inputs (``activation``), by what the BatchNorm after the layer multiplies
            its outputs with (``batchnorm``), or by mean squared gradients (``fisher``).
        objective: ``minimax``: the largest error is smallest, then the next largest (leximin).
        foldings: which to try of ``kernel_in_encoder``, ``depth_in_decoder``, ``height_in_decoder``,
            ``width_in_decoder``, ``kernel_in_decoder``; a layer takes those that its kernel has the axes for.
        max_slices: largest number of slices to try; by default all that divide the input channels.
        rank_multiple: rank times slices, the width between the two factors, must be a multiple of it.

    Raises:
        ValueError: If an argument is not one of the above.

    Source: arXiv 2107.11442. Differences: the global optimum with a certificate in place of a local search from
    random seeds; the error at rank ``j`` is ``sigma_{j+1}``, as in the paper (its code takes ``sigma_j``); slices are
    of input channels in every folding.

    Example::

        >>> ALDS(error="operator", max_slices=8)
        ALDS(error='operator', foldings=('kernel_in_encoder',), max_slices=8, objective='minimax', rank_multiple=1)
    """

    def __init__(
        self,
        error: Literal["slice", "operator", "bound", "frobenius", "activation", "batchnorm", "fisher"] = "slice",
        objective: Literal["minimax"] = "minimax",
        foldings: Sequence[str] = ("kernel_in_encoder",),
        max_slices: int | None = None,
        rank_multiple: int = 1,
    ) -> None:
        super().__init__(error, foldings, max_slices)
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, got {objective!r}.")
        _check_at_least_one("rank_multiple", rank_multiple)
        self.objective = objective
        self.rank_multiple = rank_multiple

    @property
    def takes_any_rank(self) -> bool:
        """Whether there is no ``rank_multiple``."""
        return self.rank_multiple == 1

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Solve the global problem over all candidates of all layers."""
        edges = self._frontiers(layers)
        chosen = OBJECTIVES[self.objective](edges, budget)
        return {name: edges[name].choices[index] for name, index in chosen.items()}

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost of every layer's cheapest choice."""
        return sum(edge.costs[0] for edge in self._frontiers(layers).values())

    def _frontiers(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Frontier]:
        return {name: frontier(layer, self.rank_multiple) for name, layer in layers.items()}


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


def cost_of(layer: LayerCandidates, choice: Choice) -> int:
    """Return the cost of a layer's choice."""
    return layer.dense_cost if choice is None else choice[0].cost(choice[1])


def _check_foldings(foldings: Sequence[str]) -> None:
    if isinstance(foldings, str) or not foldings:
        raise ValueError(f"`foldings` must be a non-empty list of names, got {foldings!r}.")
    for folding in foldings:
        decoder_axes(folding, 0)


def _check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def check_method(method: Method | None) -> Method:
    """Return the method, the default one for None.

    Raises:
        TypeError: If it is no method.
    """
    if method is None:
        return ALDS()
    if isinstance(method, Method):
        return method
    raise TypeError(f"`method` must be a lr_callback.Method such as ALDS(error='slice'), got {method!r}.")
