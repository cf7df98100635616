"""Surrogate: one budget that stands for several, in different units.

A surrogate charges a choice for the weighted sum of the shares that it takes of each budget, ``sum_u w_u cost_u /
budget_u``, with weights that add up to 1: what keeps every budget costs at most 1, so the best for the surrogate is at
least as good as the best for all budgets together. If it keeps them all, it is that. Otherwise the weights move towards
the budgets that are exceeded, and what is then found that keeps all is told with its gap, the distance from the largest
bound that was met on the way.

Source: surrogate relaxation, Glover, "Surrogate constraints" (Operations Research, 1968); the weights are moved by
multiplication, as in Plotkin, Shmoys, Tardos (1995).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lr_callback.decisions.candidates import Candidate, LayerCandidates, cost_in
from lr_callback.decisions.methods import Choice, Method, Solution

_SCALE = 2**40
"""Of the surrogate: costs are whole numbers."""
_ROUNDS = 24
_HALVINGS = 24
_STEP = 4.0
"""Power of what a budget is exceeded by that its weight is multiplied with."""
NONE_KEEPS = "no allocation keeps all of them"
NOT_FOUND = "no allocation was found that keeps all of them"

Layers = Mapping[str, LayerCandidates]


class ContradictoryError(ValueError):
    """No allocation keeps all budgets, or none was found that does."""


@dataclass(frozen=True)
class _Kept:
    """An allocation that keeps all budgets.

    Args:
        solution: of a surrogate.
        spent: largest share of a budget that it takes.
    """

    solution: Solution
    spent: float

    def better(self, other: _Kept | None) -> bool:
        """Return whether it is preferred: a smaller objective, or else more of the budgets spent."""
        if other is None:
            return True
        if self.solution.value is None or other.solution.value is None:
            return self.spent > other.spent
        return self.solution.value < other.solution.value


def by_surrogate(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution:
    """Choose what every layer becomes under several budgets at once, by one that stands for all of them.

    Args:
        method: that chooses.
        layers: name -> candidates; their ``costs`` are in the first unit, ``others`` in the other ones.
        budgets: unit -> what all layers together may cost in it; none negative.

    Returns:
        A solution that keeps every budget; its gap is 0 where it is the best there is, and for a method without an
        objective. What a survey of the candidates accepts (:meth:`Method.priced`) is not refused once their errors are
        known.

    Raises:
        ContradictoryError: If none is found.
    """
    found = _searched(method, layers, budgets) or by_survey(method, layers, budgets)
    if found is None:
        raise ContradictoryError(NOT_FOUND)
    return found


def _searched(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution | None:
    """Return the best that was found to keep all budgets, None if nothing was.

    Raises:
        ContradictoryError: If nothing does.
    """
    best, bound = None, 0.0
    weights: dict[str, float] = {}
    for weights in _weights(budgets):
        charged = _charged(layers, budgets, weights)
        if method.smallest_cost(charged) > _SCALE + len(layers):
            raise ContradictoryError(NONE_KEEPS)
        found = translated(method.solve(charged, _SCALE + len(layers)), layers)
        shares = shares_of(layers, budgets, found)
        if found.value is not None:
            bound = max(bound, found.value * (1 - found.gap))
        best = _preferred(best, found, shares)
        if best is not None and _is_best(best.solution, bound, found, shares):
            return replace(best.solution, gap=_gap(best.solution, bound))
        _move(weights, shares)
    best = _tightened(method, layers, budgets, weights, best)
    return None if best is None else replace(best.solution, gap=_gap(best.solution, bound))


def by_survey(method: Method, layers: Layers, budgets: Mapping[str, int]) -> Solution | None:
    """Return what is found for the layers before their errors are known, None if nothing is."""
    found = _searched(method, {name: surveyed(layer) for name, layer in layers.items()}, budgets)
    return None if found is None else replace(translated(found, layers), gap=1.0, weights={}, value=None)


def surveyed(layer: LayerCandidates) -> LayerCandidates:
    """Return a layer as it is before its errors are known."""

    def falling(candidate: Candidate) -> Candidate:
        errors = torch.linspace(1, 0, candidate.last + 1, dtype=torch.float64)
        return replace(candidate, errors=errors.where(candidate.errors.isfinite(), torch.inf))

    return replace(layer, candidates=tuple(map(falling, layer.candidates)), norm=1.0, weight=None)


def _weights(budgets: Mapping[str, int]) -> Iterator[dict[str, float]]:
    """Yield weights: each budget alone, then one set for as many rounds, which is changed in between."""
    for unit in budgets:
        yield {other: float(other == unit) for other in budgets}
    moving = dict.fromkeys(budgets, 1 / len(budgets))
    for _ in range(_ROUNDS):
        yield moving


def _move(weights: dict[str, float], shares: Mapping[str, float]) -> None:
    moved = {unit: weight * shares[unit] ** _STEP for unit, weight in weights.items()}
    total = sum(moved.values())
    if total > 0:
        weights.update({unit: weight / total for unit, weight in moved.items()})


def _is_best(best: Solution, bound: float, found: Solution, shares: Mapping[str, float]) -> bool:
    """Return whether nothing better can be found; of a method without an objective: the first that keeps all."""
    return keeps(shares) if best.value is None else best.value * (1 - 1e-12) <= bound


def _gap(solution: Solution, bound: float) -> float:
    if not solution.value:
        return 0.0
    return max(0.0, 1 - bound / solution.value) if bound < solution.value * (1 - 1e-12) else 0.0


def keeps(shares: Mapping[str, float]) -> bool:
    """Return whether no more than all of any budget is taken."""
    return all(share <= 1 for share in shares.values())


def _preferred(best: _Kept | None, found: Solution, shares: Mapping[str, float]) -> _Kept | None:
    if not keeps(shares):
        return best
    kept = _Kept(found, max(shares.values()))
    return kept if kept.better(best) else best


def _tightened(
    method: Method, layers: Layers, budgets: Mapping[str, int], weights: Mapping[str, float], best: _Kept | None
) -> _Kept | None:
    """Lower the surrogate's budget until all others are kept: as little as possible."""
    charged = _charged(layers, budgets, weights)
    low, high = method.smallest_cost(charged), _SCALE + len(layers)
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        found = translated(method.solve(charged, middle), layers)
        shares = shares_of(layers, budgets, found)
        best = _preferred(best, found, shares)
        low, high = (middle, high) if keeps(shares) else (low, middle)
    return _preferred(best, found := translated(method.solve(charged, low), layers), shares_of(layers, budgets, found))


def _charged(layers: Layers, budgets: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, LayerCandidates]:
    """Return the layers with the surrogate's costs; rounding takes at most one of its units from each."""
    first, *others = budgets
    factors = {unit: _SCALE * weights[unit] / _positive(budgets[unit]) for unit in budgets}

    def charge(own: Tensor, rest: Mapping[str, Tensor]) -> Tensor:
        total = factors[first] * own.double()
        for unit in others:
            total = total + factors[unit] * rest[unit].double()
        return total.floor().long()

    def charged(candidate: Candidate) -> Candidate:
        return replace(candidate, costs=charge(candidate.costs, candidate.others))

    made: dict[str, LayerCandidates] = {}
    for name, layer in layers.items():
        dense = charge(torch.tensor(layer.dense_cost), {unit: torch.tensor(layer.others[unit]) for unit in others})
        made[name] = replace(layer, dense_cost=int(dense), candidates=tuple(map(charged, layer.candidates)))
    return made


def translated(solution: Solution, layers: Layers) -> Solution:
    """Return a surrogate's solution with the candidates that its own stand for."""

    def own(name: str, choice: Choice) -> Choice:
        if choice is None:
            return None
        asked = choice[0]
        same = (
            one for one in layers[name].candidates if (one.folding, one.num_slices) == (asked.folding, asked.num_slices)
        )
        return next(same), choice[1]

    return replace(solution, choices={name: own(name, choice) for name, choice in solution.choices.items()})


def shares_of(layers: Layers, budgets: Mapping[str, int], solution: Solution) -> dict[str, float]:
    """Return what a solution takes of each budget."""
    shares: dict[str, float] = {}
    for position, (unit, budget) in enumerate(budgets.items()):
        spent = sum(cost_in(unit, layer, solution.choices[name], position == 0) for name, layer in layers.items())
        shares[unit] = spent / _positive(budget)
    return shares


def _positive(budget: int) -> float:
    """Return a budget to divide by: of none at all every unit of cost is twice too much."""
    return max(budget, 0.5)
