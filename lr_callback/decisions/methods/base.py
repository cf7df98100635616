"""Methods: rules that choose, for every layer, what it becomes under one budget.

A method says which candidates it looks at and how it chooses among them. Another way to share a budget is one class
here; in YAML it is named by its ``class_path``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any

import torch
from torch import Tensor

from lr_callback.common.parallel import Workers
from lr_callback.decisions.candidates import Candidate, LayerCandidates, frontier, layer_candidates
from lr_callback.decisions.costs import LayerCost
from lr_callback.mathematics.errors import find_measure, relative_errors
from lr_callback.mathematics.folding import Geometry, decoder_axes
from lr_callback.mathematics.importance import Importance, weighted_fold

Choice = tuple[Candidate, int] | None
"""A candidate and its rank; None: the layer stays dense."""


@dataclass(frozen=True)
class Solution:
    """What every layer becomes, and how good that is.

    Args:
        choices: layer name -> its choice.
        gap: what the objective would be at its smallest is at least ``1 - gap`` times what it is; 0: it is exact, or
            the method has no objective.
        weights: layer name -> what its error was multiplied with among the others; empty: all count the same.
        value: of the objective; None: the method has none.
    """

    choices: Mapping[str, Choice]
    gap: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None


@dataclass(frozen=True)
class Terms:
    """What the errors of layers are to an objective.

    Args:
        adds_up: whether they are added up; otherwise the largest counts, then the next largest, and so on.
        power: that each is raised to in the sum.
        weights: layer name -> what its error, to the power, is multiplied with in the sum; empty: all count the same.
    """

    adds_up: bool
    power: float = 2
    weights: Mapping[str, float] = field(default_factory=dict)

    def factor(self, name: str) -> float:
        """Return what a layer's error is multiplied with before it is raised to the power."""
        return float(self.weights.get(name, 1.0) ** (1 / self.power))

    def value(self, errors: Mapping[str, float]) -> float:
        """Return the objective of the errors of layers."""
        if not self.adds_up:
            return max(errors.values(), default=0.0)
        return fsum((self.factor(name) * error) ** self.power for name, error in errors.items())


class Method(ABC):
    """A rule that chooses what every layer becomes.

    Args:
        error: name of the error measure of its candidates.
        foldings: names of the foldings that it tries.
        max_slices: largest number of slices that it tries; None: up to the input channels.

    Attributes:
        power: to which the errors of layers are added up, if they are.
        shrinkage: of the inputs' moments that errors are weighted by, see :meth:`Importance.shrunk`.
        slices: the numbers of slices that it may try; None: all.
        rank_multiple: that ranks must be a multiple of.
    """

    power: float = 2
    shrinkage: float = 0.0
    slices: tuple[int, ...] | None = None
    rank_multiple: int = 1

    def __init__(
        self, error: str, foldings: Sequence[str] = ("kernel_in_encoder",), max_slices: int | None = None
    ) -> None:
        find_measure(error)
        _check_foldings(foldings)
        check_at_least_one("max_slices", max_slices)
        self.error = error
        self.foldings = tuple(foldings)
        self.max_slices = max_slices

    @property
    def takes_any_rank(self) -> bool:
        """Whether every candidate may be chosen at every rank; then the hopeless ones need no error."""
        return True

    def terms(self, layers: Mapping[str, LayerCandidates]) -> Terms | None:
        """Return what is made as small as possible, if each layer may have any choice whatever the others have.

        Args:
            layers: name -> candidates.

        Returns:
            None, which is the default: a rule ties the choices of layers together, or has no objective.
        """
        return None

    @property
    def needs_effects(self) -> bool:
        """Whether it must know what the layers' errors do to the outputs of the model."""
        return False

    def slice_counts(self, geometry: Geometry) -> list[int]:
        """Return the numbers of slices that it tries of a layer, ascending."""
        counts = geometry.slice_counts(self.max_slices)
        return counts if self.slices is None else [count for count in counts if count in self.slices]

    def why_no_slices(self, geometry: Geometry) -> str:
        """Return why a layer can have none of the numbers of slices that are allowed."""
        return f"none of the numbers of slices that are allowed divides its {geometry.weight_shape[1]} input channels"

    def candidates(
        self,
        weight: Tensor,
        cost: LayerCost,
        workers: Workers,
        importance: Importance | None = None,
        others: Mapping[str, LayerCost] | None = None,
    ) -> LayerCandidates:
        """Compute the candidates of one layer; see :func:`lr_callback.decisions.candidates.layer_candidates`.

        Args:
            weight: dense, ``(F, C / g, *kernel)``.
            cost: of the layer.
            workers: where they are computed.
            importance: of the layer's inputs and outputs, for an error that is weighted; None: all count the same.
            others: unit -> cost of the layer in it, where there are budgets in several units.
        """
        geometry, known = cost.geometry, importance or Importance()
        known.check_fits(geometry)
        known = known.shrunk(self.shrinkage)

        def curves(folding: str, last: Mapping[int, int]) -> dict[int, Tensor]:
            # What is of no use in one unit may be so in another.
            screens = self.takes_any_rank and not others
            prices = cost.slopes(folding, last) if screens else None
            matrix, moments = weighted_fold(weight, folding, geometry, known)
            return relative_errors(matrix, self.error, last, workers, prices, moments)

        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        found = layer_candidates(cost, self.foldings, self.slice_counts(cost.geometry), curves, others)
        return replace(found, norm=norm, weight=known.weight)

    def priced(self, cost: LayerCost, others: Mapping[str, LayerCost] | None = None) -> LayerCandidates:
        """Return the candidates of one layer with their costs right and errors that only fall, none computed."""

        def curves(folding: str, last: Mapping[int, int]) -> dict[int, Tensor]:
            return {count: torch.linspace(1, 0, rank + 1, dtype=torch.float64) for count, rank in last.items()}

        return layer_candidates(cost, self.foldings, self.slice_counts(cost.geometry), curves, others)

    def within(self, layers: Mapping[str, LayerCandidates], max_error: float) -> dict[str, Choice]:
        """Choose, of every layer, the cheapest form whose error is at most this."""
        edges = {name: frontier(layer, self.rank_multiple) for name, layer in layers.items()}
        first = {
            name: next(i for i, error in enumerate(edge.errors) if error <= max_error) for name, edge in edges.items()
        }
        return {name: edges[name].choices[index] for name, index in first.items()}

    def solve(self, layers: Mapping[str, LayerCandidates], budget: int) -> Solution:
        """Choose what every layer becomes, as :meth:`choose` does, and say how good that is."""
        return Solution(self.choose(layers, budget))

    def sketch(self, layers: Mapping[str, LayerCandidates], budgets: Sequence[int]) -> list[dict[str, Choice]]:
        """Choose for several budgets, as :meth:`choose` does or nearly so, to be drawn and not to be carried out.

        It must be quick; a method that cannot do it quickly has none, which is the default.

        Args:
            layers: name -> candidates.
            budgets: none below :meth:`smallest_cost`.

        Returns:
            The choices for each budget, or nothing.
        """
        return []

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


def cost_of(layer: LayerCandidates, choice: Choice) -> int:
    """Return the cost of a layer's choice."""
    return layer.dense_cost if choice is None else choice[0].cost(choice[1])


def _check_foldings(foldings: Sequence[str]) -> None:
    if isinstance(foldings, str) or not foldings:
        raise ValueError(f"`foldings` must be a non-empty list of names, got {foldings!r}.")
    for folding in foldings:
        decoder_axes(folding, 0)


def check_at_least_one(name: str, value: int | None) -> None:
    """Refuse a number that is none, or below 1; None passes.

    Raises:
        ValueError: If it is.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
