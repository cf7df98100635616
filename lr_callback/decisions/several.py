"""Several budgets: the sum of what all layers choose smallest, each budget kept.

A price for a unit of each cost gives a lower bound of the sum, and for every choice its *excess*, as under one budget
(:mod:`lr_callback.decisions.knapsack`). The prices whose bound is largest are looked for by ellipsoids
(:mod:`lr_callback.decisions.ellipsoid`). What no known sum allows by its excess is left out, and of the rest
combinations are listed layer by layer, without those that another one beats in sum and in every cost. Where there are
too many the most promising ones are looked at, and the smallest excess of the others says what was not looked at.

Sources: as for one budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lr_callback.decisions.choices import unbeaten
from lr_callback.decisions.ellipsoid import Ellipsoid

_WORK = 2**19
"""Combinations that are looked at for one more layer, at most."""
_WIDTH = 2**12
"""Combinations that are kept of them, at most."""
_ROUNDS = 160
"""Bounds that are looked at for each unit."""
_PRICIEST = 2.0**10
"""What all there is of a budget may cost, of the largest sum."""
_PARTS = tuple(0.5**power for power in range(15, -1, -1))
"""Of the distance from the bound, one after the other until something is found."""
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Problem:
    """A value and costs of every choice, and a budget for each cost; of every layer one is to be chosen.

    Args:
        owners: ``(n,)`` int64: of each choice, the place of its layer; ascending, each layer has one.
        values: ``(n,)`` float64, not negative.
        costs: ``(units, n)`` int64, not negative.
        budgets: ``(units,)`` int64, not negative.
    """

    owners: Tensor
    values: Tensor
    costs: Tensor
    budgets: Tensor

    def keeps(self, picked: Tensor) -> bool:
        """Return whether choices, one of each layer by their places, keep all budgets."""
        return bool((self.costs[:, picked].sum(1) <= self.budgets).all())

    def sum(self, picked: Tensor) -> float:
        """Return the sum of their values."""
        return float(self.values[picked].sum())


def smallest_within(problem: Problem, target: float = inf, known: Tensor | None = None) -> tuple[Tensor | None, float]:
    """Choose one of every layer so that the sum of the values is smallest and every budget is kept.

    Args:
        problem: at least two budgets.
        target: a sum that will do: nothing better is looked for.
        known: choices that keep the budgets.

    Returns:
        The place of each layer's choice, None if none was found with a sum up to the target; and what the sum is at
        least. They are equal where the choices are the optimum; infinite if nothing keeps the budgets.
    """
    if bool((least_costs(problem.owners, problem.costs) > problem.budgets).any()):
        return None, inf
    prices, bound, best = _best_prices(problem, target, known)
    if bound > target:
        return None, bound
    if best is not None and target < inf and problem.sum(best) <= target:
        return best, bound
    best = None if best is None or target < inf else improved(problem, best)
    highest = _highest(problem) if best is None else problem.sum(best)
    found, proven = _closest(problem, prices, bound, min(highest, target), (1.0,) if target < inf else _PARTS)
    found = None if found is None else improved(problem, found)
    if found is None or (best is not None and problem.sum(best) <= problem.sum(found)):
        found = best
    return found, _settled(max(bound, proven), highest if found is None else problem.sum(found), found is None)


def _settled(bound: float, most: float, nothing: bool) -> float:
    """Return the bound: if it reaches the most that is possible it is that, or if nothing was found infinite."""
    reached = bound >= most * (1 - _ROUNDING)
    return (inf if nothing else most) if reached else bound


def improved(problem: Problem, picked: Tensor) -> Tensor:
    """Change one layer's choice after the other, what gains most first, as long as the budgets allow it."""
    picked = picked.clone()
    while True:
        left = problem.budgets - problem.costs[:, picked].sum(1)
        before = picked[problem.owners]
        fits = (problem.costs - problem.costs[:, before] <= left[:, None]).all(0)
        gains = (problem.values[before] - problem.values).where(fits, 0.0)
        at = int(gains.argmax())
        if gains[at] <= _ROUNDING * problem.values[before[at]]:
            return picked
        picked[problem.owners[at]] = at


def least_costs(owners: Tensor, costs: Tensor) -> Tensor:
    """Return what all layers together cost at least in each unit, the owners and costs as of a problem."""
    return _ends(owners, costs, "amin").sum(1)


def _ends(owners: Tensor, rows: Tensor, end: str) -> Tensor:
    """Return the smallest or largest number of every layer, ``(rows, layers)``."""
    layers = int(owners[-1]) + 1
    return rows.new_zeros(len(rows), layers).scatter_reduce(
        1, owners.expand(len(rows), -1), rows, end, include_self=False
    )


def _highest(problem: Problem) -> float:
    """Return the largest sum that there is, whatever the budgets."""
    return float(_ends(problem.owners, problem.values[None], "amax").sum())


class _Table:
    """Values and shares of the budgets, a row for every layer.

    Args:
        problem: whose choices they are of.
    """

    def __init__(self, problem: Problem) -> None:
        counts = torch.bincount(problem.owners)
        starts = counts.cumsum(0) - counts
        columns = torch.arange(int(counts.max()))
        inside = columns < counts[:, None]
        self.places = (starts[:, None] + columns).where(inside, starts[:, None])
        self.values = problem.values[self.places].where(inside, inf)
        scale = problem.budgets.clamp(min=1).double()
        self.shares = problem.costs.double()[:, self.places] / scale[:, None, None]
        self.scale, self.limits = scale, problem.budgets / scale

    def bound(self, prices: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the bound at these prices of a budget, where it rises to, and what the layers choose."""
        charged, at = (self.values + torch.tensordot(prices, self.shares, 1)).min(1)
        taken = self.shares[:, torch.arange(len(at)), at].sum(1)
        picked = self.places[torch.arange(len(at)), at]
        return float(charged.sum() - prices @ self.limits), taken - self.limits, picked


def _best_prices(problem: Problem, target: float, best: Tensor | None) -> tuple[Tensor, float, Tensor | None]:
    """Look for the prices of a unit of each cost that give the largest bound.

    Returns:
        The prices, the bound, and the best choices met that keep the budgets, or those known.
    """
    table, units = _Table(problem), len(problem.budgets)
    ellipsoid = Ellipsoid(units, units**0.5 * _PRICIEST * (_highest(problem) or 1.0))
    largest, prices = -inf, torch.zeros(units, dtype=torch.float64)
    for _ in range(_ROUNDS * units):
        if not ellipsoid.cut_to_positive():
            continue
        here = ellipsoid.centre
        bound, rise, picked = table.bound(here)
        if bound > largest:
            largest, prices = bound, here
        if problem.keeps(picked) and (best is None or problem.sum(picked) < problem.sum(best)):
            best = picked
        enough = largest > target or (best is not None and problem.sum(best) <= (target if target < inf else 0.0))
        if enough or not ellipsoid.cut(rise, largest - bound, 1e-9 * abs(largest)):
            break
    # Sums in another order differ in their last bits: the bound gives them up.
    return prices / table.scale, largest - _ROUNDING * (abs(largest) + float(prices.sum())), best


@dataclass(frozen=True)
class _Layer:
    """The choices of a layer that an optimum may have; ``floor`` is the smallest charge of all of them."""

    places: Tensor
    values: Tensor
    costs: Tensor
    floor: float


def _closest(
    problem: Problem, prices: Tensor, bound: float, highest: float, parts: Sequence[float]
) -> tuple[Tensor | None, float]:
    """Search within a growing part of the distance from the bound to the highest sum, until something is found.

    Returns:
        What is found, None if nothing is; and what any sum is at least.
    """
    proven, rounding = bound, _ROUNDING * (highest + float(prices @ problem.budgets.double()))
    charged = problem.values + prices @ problem.costs.double()
    floors = _ends(problem.owners, charged[None], "amin")[0]
    excess = charged - floors[problem.owners]
    for part in parts:
        reach = part * max(highest - bound, 0.0) + 2 * rounding
        kept = torch.nonzero(excess <= reach).flatten()
        pieces = kept.split_with_sizes(torch.bincount(problem.owners[kept], minlength=len(floors)).tolist())
        layers = [
            _Layer(piece, problem.values[piece], problem.costs[:, piece], float(floor))
            for piece, floor in zip(pieces, floors, strict=True)
        ]
        found, lost = _listed(layers, problem.budgets, prices, reach)
        if found is not None:  # what is not within reach is larger than it
            return found, max(proven, min(problem.sum(found), bound + lost - 2 * rounding))
        proven = max(proven, bound + min(reach, lost) - 2 * rounding)
    return None, proven


def _listed(layers: Sequence[_Layer], budgets: Tensor, prices: Tensor, reach: float) -> tuple[Tensor | None, float]:
    """List the combinations within reach of the bound, layer by layer, those with few choices first.

    Returns:
        Each layer's choice in the smallest sum, None if there is none; and the smallest excess that was passed over.
    """
    order = sorted(range(len(layers)), key=lambda at: len(layers[at].places))
    least, most = (sum(end(one.costs) for one in layers) for end in (_low, _high))
    costs, values = torch.zeros(len(budgets), 1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    floor, lost, trail = 0.0, inf, list[Tensor]()
    for step, layer in enumerate(layers[at] for at in order):
        least, most, floor = least - _low(layer.costs), most - _high(layer.costs), floor + layer.floor
        costs = (costs[:, :, None] + layer.costs[:, None, :]).flatten(1)
        values = (values[:, None] + layer.values).flatten()
        # What the layers to come cannot spend is lost, at the prices.
        excess = values + prices @ costs.maximum((budgets - most)[:, None]).double() - floor
        kept = torch.nonzero((excess <= reach) & (costs <= (budgets - least)[:, None]).all(0)).flatten()
        following = len(layers[order[step + 1]].places) if step + 1 < len(order) else _WORK
        kept, passed = _most_promising(kept, excess, costs, values, min(_WIDTH, max(1, _WORK // following)))
        costs, values, lost = costs[:, kept], values[kept], min(lost, passed)
        trail.append(kept)
        if not len(kept):
            return None, lost
    return _back([layers[at] for at in order], order, trail, int(values.argmin())), lost


def _low(costs: Tensor) -> Tensor:
    return costs.amin(1)


def _high(costs: Tensor) -> Tensor:
    return costs.amax(1)


def _most_promising(kept: Tensor, excess: Tensor, costs: Tensor, values: Tensor, width: int) -> tuple[Tensor, float]:
    """Keep ``width`` of those that no other beats: half of the smallest excess, half spread evenly over a cost.

    Returns:
        What is kept, and the smallest excess of the others; infinity if there is none.
    """
    kept = kept[excess[kept].sort(stable=True).indices]
    kept = kept[unbeaten(torch.cat([values[None, kept], costs[:, kept].double()]))]
    if len(kept) <= width:
        return kept, inf
    half = (width + 1) // 2
    others = kept[half:]
    spread = others[costs[0, others].sort(stable=True).indices][:: 1 + len(others) // half]
    left_out = torch.ones_like(excess, dtype=torch.bool)
    left_out[spread] = False
    left_out = left_out[others]
    return torch.cat([kept[:half], spread]), float(excess[others[left_out]].min()) if left_out.any() else inf


def _back(layers: Sequence[_Layer], order: Sequence[int], trail: Sequence[Tensor], at: int) -> Tensor:
    """Follow a combination back through the layers."""
    picked = torch.zeros(len(layers), dtype=torch.int64)
    for layer, own, kept in zip(reversed(layers), reversed(order), reversed(trail), strict=True):
        at, place = divmod(int(kept[at]), len(layer.places))
        picked[own] = layer.places[place]
    return picked
