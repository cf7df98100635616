"""ALDS: one global problem over slices and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import median
from typing import Literal

from lr_callback.common.written import is_number
from lr_callback.decisions.candidates import Frontier, LayerCandidates, frontier
from lr_callback.decisions.knapsack import WORK, smallest_sum
from lr_callback.decisions.methods.base import Choice, Method, Solution, Terms, check_at_least_one
from lr_callback.decisions.minimax import minimax
from lr_callback.mathematics.folding import Geometry

Error = Literal["slice", "operator", "bound", "frobenius", "activation", "batchnorm", "fisher"]

Objective = Callable[[Mapping[str, Frontier], int, float, int], tuple[dict[str, int], float]]
"""From the frontiers of all layers, a budget, a power and the work to spend to the index of each layer's choice, and
the gap. The work is that of :func:`~lr_callback.decisions.knapsack.smallest_sum`."""


def _sum(edges: Mapping[str, Frontier], budget: int, power: float, work: int) -> tuple[dict[str, int], float]:
    return smallest_sum(edges, budget, work, power)


OBJECTIVES: Mapping[str, Objective] = {
    "minimax": lambda edges, budget, *_: (minimax(edges, budget), 0.0),
    "sum": _sum,
    "loss": _sum,
}
"""Ways to share a budget over frontiers, by name; for ``loss`` the frontiers are weighed."""

_SMALLEST = 1e-6
"""Weight of a layer without any effect, relative to the largest: of two choices the better one still counts."""

_SKETCHED = 2**11
"""Choices of all layers together, and combinations, that are looked at where a trade-off is only drawn."""
_FEWEST = 16
"""Of a layer."""


class ALDS(Method):
    """Automatic layer-wise decomposition selection: one global problem over slices and ranks, solved exactly.

    Args:
        error: measure of a layer's error. ``slice``: the worst slice's, what the paper's results were made with;
            ``operator``: exact operator norm of the residual; ``bound``: the paper's Theorem 1; ``frobenius``;
            and, of layers whose importance is known (:mod:`lr_callback.mathematics.importance`), Frobenius norms
            weighted by the second moments of each slice's inputs (``activation``; with kernel axes in the decoder as if
            its positions were uncorrelated), by what the BatchNorm after the layer multiplies its outputs with
            (``batchnorm``), or by mean squared gradients (``fisher``).
        objective: ``minimax``: the largest error is smallest, then the next largest (leximin); ``sum``: the sum of
            the errors, to the power ``power``, is smallest; ``loss``: the same sum with a weight for each layer, by
            what its error does to the outputs of the model (:mod:`lr_callback.calibration.effects`); meant for
            ``power=4``.
        foldings: which to try of ``kernel_in_encoder``, ``depth_in_decoder``, ``height_in_decoder``,
            ``width_in_decoder``, ``kernel_in_decoder``; a layer takes those that its kernel has the axes for.
        max_slices: largest number of slices to try; by default all that divide the input channels.
        rank_multiple: the rank must be a multiple of it, and so the width between the two factors, rank times slices;
            of several slices so must the input channels of each: what hardware multiplies in blocks of 8 or 16.
        power: of the errors in the sum, at least 1: squares by default; the higher it is, the less is a large error of
            one layer made up for by small ones of others.
        slices: the numbers of slices that may be tried, of those that divide the input channels; None: all.
        shrinkage: with ``activation``, how far the second moments are on the way from those that were seen to equal
            inputs, 0 to 1 (:meth:`Importance.shrunk`): training changes what layers see.

    Raises:
        ValueError: If an argument is not one of the above.

    Source: arXiv 2107.11442. Differences: the global optimum with a certificate in place of a local search from
    random seeds; the error at rank ``j`` is ``sigma_{j+1}``, as in the paper (its code takes ``sigma_j``); slices are
    of input channels in every folding.

    Example::

        >>> ALDS(error="operator", max_slices=8)  # doctest: +ELLIPSIS
        ALDS(error='operator', foldings=('kernel_in_encoder',), max_slices=8, objective='minimax', ...)
    """

    def __init__(
        self,
        error: Error = "slice",
        objective: Literal["minimax", "sum", "loss"] = "minimax",
        foldings: Sequence[str] = ("kernel_in_encoder",),
        max_slices: int | None = None,
        rank_multiple: int = 1,
        power: float = 2,
        shrinkage: float = 0.0,
        slices: Sequence[int] | None = None,
    ) -> None:
        super().__init__(error, foldings, max_slices)
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, got {objective!r}.")
        check_at_least_one("rank_multiple", rank_multiple)
        _check_power(power, objective)
        _check_shrinkage(shrinkage, error)
        self.objective = objective
        self.rank_multiple = rank_multiple
        self.power = power
        self.shrinkage = float(shrinkage)
        if slices is not None:  # what is not given is not written: methods of before are equal to those of now
            self.slices = _checked_slices(slices, max_slices)

    @property
    def takes_any_rank(self) -> bool:
        """Whether there is no ``rank_multiple``."""
        return self.rank_multiple == 1

    def terms(self, layers: Mapping[str, LayerCandidates]) -> Terms:
        """Return the largest error, or the sum that the objective is."""
        return Terms(self.objective != "minimax", self.power, _weights(layers) if self.needs_effects else {})

    def slice_counts(self, geometry: Geometry) -> list[int]:
        """Return the numbers of slices that it tries of a layer, ascending."""
        channels = geometry.in_channels // geometry.groups
        counts = super().slice_counts(geometry)
        return [count for count in counts if count == 1 or channels // count % self.rank_multiple == 0]

    def why_no_slices(self, geometry: Geometry) -> str:
        """Return why a layer can have none of the numbers of slices that are allowed."""
        dividing, channels = super().slice_counts(geometry), geometry.in_channels // geometry.groups
        if not dividing:
            return super().why_no_slices(geometry)
        told = ", ".join(f"{channels // count} with {count} slices" for count in dividing)
        return f"ranks cannot be multiples of {self.rank_multiple}: each slice's input channels must be, and are {told}"

    @property
    def needs_effects(self) -> bool:
        """Whether the objective is ``loss``."""
        return self.objective == "loss"

    def choose(self, layers: Mapping[str, LayerCandidates], budget: int) -> dict[str, Choice]:
        """Solve the global problem over all candidates of all layers."""
        return dict(self.solve(layers, budget).choices)

    def solve(self, layers: Mapping[str, LayerCandidates], budget: int) -> Solution:
        """Solve the global problem, and say how far from the optimum the solution can be."""
        edges, terms = self._frontiers(layers), self.terms(layers)
        charged = self._charged(edges, terms)
        chosen, gap = OBJECTIVES[self.objective](charged, budget, self.power, WORK)
        value = terms.value({name: edges[name].errors[index] for name, index in chosen.items()})
        choices = {name: edges[name].choices[index] for name, index in chosen.items()}
        return Solution(choices, gap, terms.weights, value)

    def sketch(self, layers: Mapping[str, LayerCandidates], budgets: Sequence[int]) -> list[dict[str, Choice]]:
        """Solve the global problem for several budgets, over some of the choices of each layer."""
        most = max(_FEWEST, _SKETCHED // max(1, len(layers)))
        edges = {name: edge.thinned(most) for name, edge in self._frontiers(layers).items()}
        charged = self._charged(edges, self.terms(layers))
        chosen = [OBJECTIVES[self.objective](charged, budget, self.power, _SKETCHED)[0] for budget in budgets]
        return [{name: edge.choices[found[name]] for name, edge in edges.items()} for found in chosen]

    def _charged(self, edges: Mapping[str, Frontier], terms: Terms) -> Mapping[str, Frontier]:
        """Return the frontiers with errors as the objective counts them."""
        if not terms.weights:
            return edges
        return {name: _weighed(edge, terms.factor(name)) for name, edge in edges.items()}

    def smallest_cost(self, layers: Mapping[str, LayerCandidates]) -> int:
        """Return the cost of every layer's cheapest choice."""
        return sum(edge.costs[0] for edge in self._frontiers(layers).values())

    def _frontiers(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Frontier]:
        return {name: frontier(layer, self.rank_multiple) for name, layer in layers.items()}


def _weights(layers: Mapping[str, LayerCandidates]) -> dict[str, float]:
    """Return the weight of each layer: one that is not known is the median of the others, and none is zero."""
    known = [layer.weight for layer in layers.values() if layer.weight is not None]
    largest, middle = max(known, default=0.0), median(known) if known else 1.0
    if largest == 0:
        return dict.fromkeys(layers, 1.0)
    given = {name: middle if layer.weight is None else layer.weight for name, layer in layers.items()}
    return {name: max(weight, _SMALLEST * largest) for name, weight in given.items()}


def _weighed(edge: Frontier, factor: float) -> Frontier:
    return replace(edge, errors=[factor * error for error in edge.errors])


def _check_power(power: object, objective: str) -> None:
    if not is_number(power) or not isfinite(power) or power < 1:
        raise ValueError(f"`power` must be a number of at least 1, got {power!r}.")
    if objective == "minimax" and power != 2:
        raise ValueError(
            "`power` is of the errors in a sum, and objective='minimax' adds none up: the largest error is the same "
            f"whatever the power. Leave it out, or choose objective='sum'; got {power!r}."
        )


def _checked_slices(slices: Sequence[int], most: int | None) -> tuple[int, ...]:
    listed = list(slices) if isinstance(slices, Sequence) and not isinstance(slices, str) else []
    if not listed or not all(type(count) is int and count >= 1 for count in listed):
        raise ValueError(f"`slices` must be a list of whole numbers from 1, such as [1, 2, 4], got {slices!r}.")
    if most is not None and min(listed) > most:
        raise ValueError(
            f"`slices` must have a number up to `max_slices`, got {listed} and {most}. Raise `max_slices` to "
            f"{min(listed)}, or leave it out."
        )
    return tuple(sorted(set(listed)))


def _check_shrinkage(shrinkage: object, error: str) -> None:
    if not is_number(shrinkage) or not 0 <= shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be a number from 0 to 1, got {shrinkage!r}.")
    if shrinkage and error != "activation":
        raise ValueError(
            "`shrinkage` is of the moments of the inputs, by which error='activation' weighs: leave it out, or choose "
            f"that; got {shrinkage!r} with error={error!r}."
        )


def best_method(effects: bool = True) -> ALDS:
    """Return what has cost the least accuracy of all that were measured, with a refit; it needs calibration batches.

    Args:
        effects: whether they can be measured: the model gives outputs that can be compared.

    ``benchmarks/results/resnet20_repair.md`` and its neighbours have the tables.
    """
    return ALDS("activation", "loss" if effects else "sum", power=4, shrinkage=0.5)


def check_method(method: Method | None) -> Method:
    """Return the method, for None the default one of the paper, which needs nothing but weights.

    Raises:
        TypeError: If it is no method.
    """
    if method is None:
        return ALDS()
    if isinstance(method, Method):
        return method
    raise TypeError(f"`method` must be a lr_callback.Method such as ALDS(error='slice'), got {method!r}.")
