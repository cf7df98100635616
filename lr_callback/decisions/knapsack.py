"""Knapsack: share one budget so that the sum of the errors, squared or to another power, is smallest, exactly.

One choice of each layer, a budget for all: the multiple-choice knapsack problem. A price for a unit of cost gives a
lower bound of the sum, and for every choice its *excess*, how much more it is charged than the layer's best at that
price. An allocation's sum is the bound, plus the excess of its choices, plus the price of what it leaves of the budget.
So in one that is better than a known one no excess, and no sum of them, is larger than the distance of the known one
from the bound: of thousands of choices of a layer a few are left. Their combinations are listed layer by layer, without
those that another one beats in cost and in sum, and without those beyond the distance. First with a part of the
distance: if anything is found, it is the optimum.

Sources: Sinha, Zoltners, "The multiple-choice knapsack problem" (Operations Research, 1979), the bound; Nemhauser,
Ullmann, "Discrete dynamic programming and capital allocation" (Management Science, 1969), the lists; Pisinger, "A
minimal algorithm for the multiple-choice knapsack problem" (EJOR, 1995), few choices first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import frexp, fsum, inf

import torch
from torch import Tensor

from lr_callback.decisions.candidates import Frontier
from lr_callback.decisions.hull import Curve, steps

WORK = 2**18
"""Combinations that are looked at for one more layer, at most."""
_PARTS = tuple(0.125**power for power in (5, 4, 3, 2, 1, 0))
"""Of the distance from the bound, one after the other until something is found."""
_ROUNDING = 1e-12
"""Of a sum and what is paid for it: what floating point cannot tell apart."""


def smallest_sum(
    frontiers: Mapping[str, Frontier], budget: int, work: int = WORK, power: float = 2
) -> tuple[dict[str, int], float]:
    """Allocate a budget over layers so that the sum of their errors, to a power, is smallest.

    Args:
        frontiers: layer name -> its choices, cost ascending and error descending; errors may be of any size.
        budget: what all layers together may cost; at least the sum of their cheapest choices.
        work: combinations to look at for each layer. It is not reached on networks known; where it is, the most
            promising ones are looked at.
        power: that each error is raised to, at least 1.

    Returns:
        Layer name -> index of its choice, and the gap: the smallest sum possible is at least ``1 - gap`` times the sum
        of these choices. 0: they are the optimum. The result depends on names and values, not on the order of the
        layers; of equal sums it is the cheaper one.

    Raises:
        ValueError: If the cheapest choices do not fit the budget.

    Example::

        >>> one = Frontier([1, 2, 4], [0.9, 0.5, 0.0], [None] * 3)
        >>> two = Frontier([1, 3], [0.7, 0.0], [None] * 2)
        >>> smallest_sum({"one": one, "two": two}, budget=5)
        ({'one': 1, 'two': 1}, 0.0)
    """
    curves = _curves(frontiers, power)
    chosen, price = _greedy(curves, budget)
    if price == 0:
        return chosen, 0.0
    # By name: the order of the layers is to change no bit.
    layers = _priced(dict(sorted(curves.items())), price)
    bound = fsum(layers.floors) - price * budget
    best = _sum(curves, chosen)
    rounding = _ROUNDING * (best + price * budget)
    found, proven = _closest(layers, price, budget, max(best - bound, rounding), rounding, work)
    if found is not None and _sum(curves, found) <= best:
        chosen, best = {name: found[name] for name in frontiers}, _sum(curves, found)
    left = best - bound - proven
    return chosen, 0.0 if left <= 2 * rounding else min(1.0, left / best)


def _curves(frontiers: Mapping[str, Frontier], power: float) -> dict[str, Curve]:
    """Return the powers of the errors, all divided by one power of two: high powers of large ones must be finite."""
    largest = max((edge.errors[0] for edge in frontiers.values()), default=0.0)
    unit = 2.0 ** frexp(largest)[1]
    return {
        name: Curve(edge.costs, [(error / unit) ** power for error in edge.errors]) for name, edge in frontiers.items()
    }


def _closest(
    layers: _Layers, price: float, budget: int, distance: float, rounding: float, work: int
) -> tuple[dict[str, int] | None, float]:
    """Search within reach of a growing part of the distance until something is found.

    Returns:
        What is found, None if nothing is; and an excess below which there is nothing else.
    """
    proven = 0.0
    for part in _PARTS:
        found, passed_over = _search(layers, price, budget, part * distance + rounding, work)
        proven = max(proven, min(part * distance, passed_over))
        if found is not None:
            return found, proven
    return None, proven


def _sum(curves: Mapping[str, Curve], chosen: Mapping[str, int]) -> float:
    return fsum(curve.values[chosen[name]] for name, curve in curves.items())


def _greedy(curves: Mapping[str, Curve], budget: int) -> tuple[dict[str, int], float]:
    """Take the steps along the hulls in their order, of each layer until one does not fit.

    Returns:
        The choices, and the gain of the first step that did not fit: the price with the largest bound; 0 if all fit.
    """
    left = budget - sum(curve.costs[0] for curve in curves.values())
    if left < 0:
        raise ValueError(f"`budget` must be at least {budget - left}, the cheapest choices together, got {budget}.")
    chosen, stopped, price = dict.fromkeys(curves, 0), set[str](), 0.0
    for step in steps(curves):
        if step.name in stopped:
            continue
        if step.cost > left:
            price = price or step.gain
            stopped.add(step.name)
            continue
        left -= step.cost
        chosen[step.name] = step.index
    return chosen, price


@dataclass(frozen=True)
class _Layer:
    """The choices of a layer that an optimum may have.

    Args:
        name: of the layer.
        indices: of the choices.
        costs: of them.
        values: of them.
        excess: of value plus price over ``floor``.
        floor: the smallest value plus price of all choices.
    """

    name: str
    indices: Tensor
    costs: Tensor
    values: Tensor
    excess: Tensor
    floor: float


@dataclass(frozen=True)
class _Layers:
    """The choices of all layers, one layer after the other: of thousands of layers each alone would take long.

    Args:
        names: of the layers.
        floors: as of a layer.
        owners: of each choice, the place of its layer.
        parts: of each choice its index in its layer, its cost, value and excess.
    """

    names: Sequence[str]
    floors: Sequence[float]
    owners: Tensor
    parts: tuple[Tensor, Tensor, Tensor, Tensor]

    def within(self, reach: float) -> list[_Layer]:
        """Return the layers without the choices of a larger excess."""
        kept = torch.nonzero(self.parts[3] <= reach).flatten()
        counts = torch.bincount(self.owners[kept], minlength=len(self.names)).tolist()
        indices, costs, values, excess = (part[kept].split_with_sizes(counts) for part in self.parts)
        return list(map(_Layer, self.names, indices, costs, values, excess, self.floors))


def _priced(curves: Mapping[str, Curve], price: float) -> _Layers:
    sizes = torch.tensor([len(curve.costs) for curve in curves.values()])
    costs = torch.tensor([cost for curve in curves.values() for cost in curve.costs])
    values = torch.tensor([value for curve in curves.values() for value in curve.values], dtype=torch.float64)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    indices = torch.arange(len(costs)) - (sizes.cumsum(0) - sizes)[owners]
    charged = values + price * costs.double()
    floors = charged.new_full((len(sizes),), inf).scatter_reduce(0, owners, charged, "amin")
    return _Layers(list(curves), floors.tolist(), owners, (indices, costs, values, charged - floors[owners]))


def _search(priced: _Layers, price: float, budget: int, reach: float, work: int) -> tuple[dict[str, int] | None, float]:
    """List the combinations within reach of the bound, layer by layer, those with few choices first.

    Returns:
        The one of the smallest sum, None if there is none; and the smallest excess of those that were passed over
        because there were too many, infinity if none was.
    """
    layers = priced.within(reach)
    settled = [layer for layer in layers if len(layer.costs) == 1]
    open_ = sorted((one for one in layers if len(one.costs) > 1), key=lambda one: (len(one.costs), one.name))
    layers = [_together(settled), *open_]
    width = max(1, work // len(layers[-1].costs))
    least, most = (sum(int(layer.costs[end]) for layer in layers) for end in (0, -1))
    costs, values = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    floor, passed_over, trail = 0.0, inf, list[tuple[_Layer, Tensor]]()
    for layer in layers:
        least, most, floor = least - int(layer.costs[0]), most - int(layer.costs[-1]), floor + layer.floor
        costs, values = _outer_sum(costs, layer.costs), _outer_sum(values, layer.values)
        # What the layers to come cannot spend is lost, at the price.
        excess = values + price * costs.clamp(min=budget - most).double() - floor
        kept = torch.nonzero((excess <= reach) & (costs + least <= budget)).flatten()
        kept, lost = _most_promising(kept[_unbeaten(costs[kept], values[kept])], excess, width)
        costs, values, passed_over = costs[kept], values[kept], min(passed_over, lost)
        trail.append((layer, kept))
        if not len(kept):
            return None, passed_over
    return {**{layer.name: int(layer.indices) for layer in settled}, **_back(trail[1:])}, passed_over


def _together(layers: Sequence[_Layer]) -> _Layer:
    """Return layers of one choice each as one."""
    costs = torch.tensor([sum(int(layer.costs) for layer in layers)])
    values, excess = (
        torch.tensor([fsum(map(float, parts))], dtype=torch.float64)
        for parts in ([layer.values for layer in layers], [layer.excess for layer in layers])
    )
    return _Layer("", torch.zeros(1, dtype=torch.int64), costs, values, excess, fsum(layer.floor for layer in layers))


def _outer_sum(one: Tensor, other: Tensor) -> Tensor:
    return (one.unsqueeze(1) + other).flatten()


def _unbeaten(costs: Tensor, values: Tensor) -> Tensor:
    """Return the indices of those that no other beats in cost and value at once, by cost."""
    by_value = values.sort(stable=True).indices
    order = by_value[costs[by_value].sort(stable=True).indices]
    ordered = values[order]
    before = torch.cat([torch.full((1,), inf, dtype=values.dtype), ordered.cummin(0).values[:-1]])
    return order[ordered < before]


def _most_promising(kept: Tensor, excess: Tensor, width: int) -> tuple[Tensor, float]:
    """Keep about ``width``: half of them of the smallest excess, half spread evenly over the costs, in their order.

    Returns:
        What is kept, and the smallest excess of the others; infinity if there is none.
    """
    if len(kept) <= width:
        return kept, inf
    half = (width + 1) // 2
    taken = torch.zeros(len(kept), dtype=torch.bool)
    taken[excess[kept].sort(stable=True).indices[:half]] = True
    others = torch.nonzero(~taken).flatten()
    taken[others[:: 1 + len(others) // half]] = True
    return kept[taken], min(excess[kept[~taken]].tolist(), default=inf)


def _back(trail: Sequence[tuple[_Layer, Tensor]]) -> dict[str, int]:
    """Follow the last combination, the one of the smallest sum, back through the layers."""
    chosen, at = dict[str, int](), -1
    for layer, kept in reversed(trail):
        at, own = divmod(int(kept[at]), len(layer.costs))
        chosen[layer.name] = int(layer.indices[own])
    return chosen
