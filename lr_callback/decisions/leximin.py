"""Leximin: the largest error smallest under several budgets, then the next largest, and so on.

No layer may have an error above a line: whether anything below it keeps the budgets is a question of costs alone. What
takes the least of one of them within the others answers it: of two budgets a knapsack, which is solved exactly. The
lowest line is found by halving; then each layer is pushed below its error, the largest first, and one that cannot be,
by the same question, stays where it is.

Source: as :mod:`lr_callback.decisions.minimax`, which does the same under one budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from lr_callback.decisions.candidates import Frontier
from lr_callback.decisions.choices import Choices
from lr_callback.decisions.knapsack import smallest_sum
from lr_callback.decisions.several import Problem, least_costs, smallest_within

_QUESTIONS = {2: 64}
"""Number of budgets -> questions that are answered exactly once the lowest line is known."""
_FEW_QUESTIONS = 12
"""The same of more budgets."""


def fitting(choices: Choices, budgets: Tensor, allowed: Tensor | None = None) -> tuple[Tensor | None, bool]:
    """Look for choices that keep all budgets.

    Args:
        choices: of all layers.
        budgets: ``(units,)`` int64, at least two.
        allowed: ``(n,)`` bool: which choices may be taken, at least one of each layer; None: all.

    Returns:
        The place of each layer's choice, None if none was found; and whether that is known for certain: always of what
        is found, and of two budgets as good as always.
    """
    places = torch.arange(len(choices.owners)) if allowed is None else torch.nonzero(allowed).flatten()
    # The smallest numbers first: their sums are told apart most surely.
    order = budgets.argsort(stable=True)
    owners, costs, limits = choices.owners[places], choices.costs[order][:, places], budgets[order]
    if bool((least_costs(owners, costs) > limits).any()):
        return None, True
    picked, least = _least_of_first(owners, costs, limits)
    if picked is not None and bool((costs[:, picked].sum(1) <= limits).all()):
        return places[picked], True
    return None, least > float(limits[0])


def _least_of_first(owners: Tensor, costs: Tensor, limits: Tensor) -> tuple[Tensor | None, float]:
    """Return what takes the least of the first cost within the others' limits, and what anything takes at least."""
    if len(limits) == 2:
        return _least_of_two(owners, costs, int(limits[1]))
    problem = Problem(owners, costs[0].double(), costs[1:], limits[1:])
    return smallest_within(problem, target=float(limits[0]) + 0.5)  # they are whole numbers


def _least_of_two(owners: Tensor, costs: Tensor, budget: int) -> tuple[Tensor, float]:
    """Return what takes the least of the first cost within the other's budget, and what anything takes at least."""
    edge = _edge(owners, costs[0], costs[1])
    sizes = torch.bincount(owners[edge]).tolist()
    parts = [costs[unit, edge].split_with_sizes(sizes) for unit in (1, 0)]
    frontiers = {
        f"{at:09}": Frontier(paid.tolist(), taken.double().tolist(), [])
        for at, (paid, taken) in enumerate(zip(*parts, strict=True))
    }
    chosen, gap = smallest_sum(frontiers, budget, power=1)
    indices = torch.tensor([chosen[name] for name in frontiers])
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    picked = edge[starts + indices]
    return picked, float(costs[0, picked].sum()) * (1 - gap)


def _edge(owners: Tensor, values: Tensor, costs: Tensor) -> Tensor:
    """Return the places of each layer's choices that no other beats in value and cost, by layer and cost."""
    order = values.sort(stable=True).indices
    order = order[costs[order].sort(stable=True).indices]
    order = order[owners[order].sort(stable=True).indices]
    # Of each layer all numbers are below those of the layers before it.
    fallen = values[order] - owners[order] * (int(values.max()) + 1)
    before = torch.cat([fallen.new_full((1,), int(fallen[0]) + 1), fallen.cummin(0).values[:-1]])
    return order[fallen < before]


@dataclass
class _Lines:
    """The errors of all layers, from the largest, and the choices below each.

    Args:
        choices: of all layers.
        budgets: of all units.
        heights: error of each line.
        layers: of each line, the place of the layer whose error it is.
        places: of each choice, its line.
        lowest: of each layer, its last line: the smallest error that it can have.
    """

    choices: Choices
    budgets: Tensor
    heights: list[float] = field(init=False)
    layers: list[int] = field(init=False)
    places: Tensor = field(init=False)
    lowest: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Sort the errors."""
        errors, owners = self.choices.errors, self.choices.owners
        order = errors.sort(stable=True, descending=True).indices
        fresh = torch.ones(len(order), dtype=torch.bool)
        fresh[1:] = (errors[order].diff() != 0) | (owners[order].diff() != 0)
        self.places = torch.empty_like(order)
        self.places[order] = fresh.cumsum(0) - 1
        self.heights, self.layers = errors[order[fresh]].tolist(), owners[order[fresh]].tolist()
        count = int(owners[-1]) + 1
        self.lowest = owners.new_zeros(count).scatter_reduce(0, owners, self.places, "amax")

    def below(self, lines: Tensor | int) -> tuple[Tensor | None, bool]:
        """Look for choices below a line, or one of each layer; what a layer has best it may always have."""
        limits = torch.minimum(self.lowest - 1, torch.as_tensor(lines))
        return fitting(self.choices, self.budgets, self.places > limits[self.choices.owners])


def smallest_errors(choices: Choices, budgets: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Choose so that the largest error is smallest, then the next largest, and so on.

    Args:
        choices: of all layers.
        budgets: ``(units,)`` int64, at least two.
        start: choices that keep them.

    Returns:
        The place of each layer's choice, and what the largest error is at least.
    """
    lines = _Lines(choices, budgets)
    answers: dict[int, tuple[Tensor | None, bool]] = {-1: (start, True)}

    def ask(line: int) -> tuple[Tensor | None, bool]:
        if line not in answers:
            answers[line] = lines.below(line)
        return answers[line]

    end = sum(height > 0 for height in lines.heights)
    line = _first(-1, end, lambda at: ask(at)[0] is None) - 1
    proven = _first(line, end, lambda at: ask(at)[0] is None and ask(at)[1])
    found, _ = ask(line)
    bound = lines.heights[proven] if proven < end else 0.0
    return _pushed(lines, line, start if found is None else found), bound


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the first after ``low`` at which it holds, ``high`` if it does nowhere."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _pushed(lines: _Lines, line: int, picked: Tensor) -> Tensor:
    """Push each layer below its error, the largest first, as far as the budgets allow."""
    limits, stopped = torch.minimum(lines.lowest - 1, torch.tensor(line)), set[int]()
    ends, at = lines.lowest.tolist(), lines.places[picked].tolist()
    questions = _QUESTIONS.get(len(lines.budgets), _FEW_QUESTIONS)
    for here in range(line + 1, len(lines.heights)):
        layer = lines.layers[here]
        if layer in stopped or here >= ends[layer]:
            continue
        limits[layer] = here
        if at[layer] > here:
            continue
        found = _replaced(lines, layer, here, picked)
        if found is None and questions > 0:
            questions, found = questions - 1, lines.below(limits)[0]
        if found is None:
            limits[layer] = here - 1
            stopped.add(layer)
        else:
            picked, at = found, lines.places[found].tolist()
    return picked


def _replaced(lines: _Lines, layer: int, line: int, picked: Tensor) -> Tensor | None:
    """Give one layer what is below a line, with the least of what is left of the budgets, if anything fits."""
    costs, own = lines.choices.costs, int(picked[layer])
    left = lines.budgets - costs[:, picked].sum(1) + costs[:, own]
    inside = torch.nonzero((lines.choices.owners == layer) & (lines.places > line)).flatten()
    shares = (costs[:, inside] / left.clamp(min=1)[:, None]).amax(0)
    shares = shares.where((costs[:, inside] <= left[:, None]).all(0), inf)
    best = int(shares.argmin())
    if shares[best] == inf:
        return None
    changed = picked.clone()
    changed[layer] = inside[best]
    return changed
