"""Analysed: what is known of a model's layers, and what they become to meet a goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import floor

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.budgets import solve_budgets
from lr_callback.decisions.candidates import LayerCandidates, cost_in, paid_in
from lr_callback.decisions.costs import LATENCY, amount, spoken
from lr_callback.decisions.curves import Curves, Point
from lr_callback.decisions.factorization import Factorization, Spending
from lr_callback.decisions.goals import MAX_ACCURACY_DROP, MAX_ERROR, Goal, check_goal, drop_of
from lr_callback.decisions.methods import Choice, Method, Solution
from lr_callback.decisions.sampling import can_become, layer_curves, point, spread_budgets
from lr_callback.decisions.surrogate import ContradictoryError


@dataclass(frozen=True)
class Analysis:
    """Everything that is needed to allocate any budget, in milliseconds.

    Args:
        method: chooses among the candidates.
        unit: of all costs.
        layers: layer name -> its candidates.
        shapes: layer name -> shape of its dense weight.
        skipped: name of a layer that is left out -> why.
        stay_dense: name of a layer that is left out but is factorized now -> shape of its dense weight; an allocation
            makes it dense again.
        dense_cost: of the whole model with all layers dense.
        pinned: layer name -> its choice, of those that an override is for.
        others: unit -> dense cost of the whole model in it, where there are budgets in several.
    """

    method: Method
    unit: str
    layers: Mapping[str, LayerCandidates]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]
    stay_dense: Mapping[str, tuple[int, ...]]
    dense_cost: int
    pinned: Mapping[str, Choice] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def free(self) -> dict[str, LayerCandidates]:
        """The layers among which the method chooses."""
        return {name: layer for name, layer in self.layers.items() if name not in self.pinned}

    @property
    def fixed_cost(self) -> int:
        """Cost of what the method has no choice of: what is not a layer here, and the layers that are overridden."""
        return self._fixed(self.unit)

    @property
    def dense_costs(self) -> dict[str, int]:
        """Cost of the whole model with all layers dense, in each unit, the first one first."""
        return {self.unit: self.dense_cost, **self.others}

    def _dense(self, unit: str) -> int:
        return self.dense_costs[unit]

    def _cost(self, unit: str, name: str, choice: Choice) -> int:
        return cost_in(unit, self.layers[name], choice, unit == self.unit)

    def _fixed(self, unit: str) -> int:
        overridden = sum(self._cost(unit, name, choice) for name, choice in self.pinned.items())
        return self._dense(unit) - sum(self._cost(unit, name, None) for name in self.layers) + overridden

    @cached_property
    def smallest_cost(self) -> int:
        """Smallest cost of the whole model that the method can reach; the same for every budget."""
        return self.fixed_cost + self.method.smallest_cost(self.free)

    def smallest_in(self, unit: str) -> int:
        """Return the smallest cost of the whole model in one of the units."""
        if unit == self.unit:
            return self.smallest_cost
        return self._fixed(unit) + self.method.smallest_cost(
            {name: paid_in(unit, one) for name, one in self.free.items()}
        )

    @property
    def reachable(self) -> tuple[float, float]:
        """Smallest and largest ``keep_ratio`` that can be met."""
        return self.smallest_cost / self.dense_cost, 1.0

    def allocate(self, goal: Goal) -> Allocation:
        """Choose what every layer becomes.

        Args:
            goal: fraction of the whole model's dense cost to keep, in (0, 1]; or such fractions by unit, of the units
                that were analysed, the first one first; or ``{"max_error": e}``.

        Raises:
            ValueError: If a number is out of range, or a budget below what can be reached; or if the goal is an
                accuracy, which only a run can measure.
        """
        goal = check_goal(goal)
        if drop_of(goal) is not None:
            raise ValueError(
                f"`{MAX_ACCURACY_DROP}` must be asked of LowRankCompression in a Trainer, whose validation measures "
                f"it; an analysis knows no accuracy, got {goal}. Ask for a `keep_ratio`, a `budget` or a `max_error`."
            )
        if isinstance(goal, Mapping) and MAX_ERROR in goal:
            return self._within(goal[MAX_ERROR])
        ratios = goal if isinstance(goal, Mapping) else {self.unit: goal}
        units = [self.unit, *self.others]
        if set(ratios) != set(units):
            raise ValueError(f"`budget` must be in the units that were analysed, {units}, got {goal}.")
        ratios = {unit: ratios[unit] for unit in units}
        # The epsilon keeps a ratio that was made by division (cost / dense_cost) from losing its last unit.
        budgets = {unit: floor(ratio * self._dense(unit) * (1 + 1e-12)) for unit, ratio in ratios.items()}
        if budgets[self.unit] < self.smallest_cost:
            raise ValueError(self._out_of_reach(ratios[self.unit], budgets[self.unit], isinstance(goal, Mapping)))
        solution = self._solve(ratios, budgets)
        return self._allocation(solution, ratios, budgets)

    def curves(self, allocation: Allocation) -> Curves:
        """Return what figures draw of the layers and of an allocation that was made of this analysis.

        At most 64 ranks of a layer, at most 200 layers, the largest; no weights.

        Args:
            allocation: of :meth:`allocate`, or of :func:`lr_callback.allocate` with the same model and method.

        Raises:
            ValueError: If it is of other layers, of another unit, or of a method with other errors or slices.
        """
        made, own = (allocation.unit, allocation.error), (self.unit, self.method.error)
        if {*self.layers, *self.stay_dense} != set(allocation.layers) or made != own or not self._knows(allocation):
            raise ValueError(
                "`allocation` must be made of this analysis, by `analysis.allocate(goal)`, or of the same model with "
                f"the same method; its layers, its unit, its error or its slices are others: {made} of the allocation, "
                f"{own} of the analysis. Analyse the model as it was before, by `lr_callback.analyze(model, method)`."
            )
        layers, left_out = layer_curves(self.layers, allocation.layers, self.method.error)
        budgets = spread_budgets(self.smallest_cost, self.dense_cost, len(self.layers))
        return Curves(
            layers=layers,
            tradeoff=self._tradeoff(budgets, len(allocation.layers)),
            chosen=Point(allocation.cost, allocation.worst_error, allocation.mean_error),
            dense_cost=self.dense_cost,
            unit=self.unit,
            error=self.method.error,
            left_out=left_out,
        )

    def _knows(self, allocation: Allocation) -> bool:
        """Return whether every choice is one of a candidate here."""
        made = ((layer, chosen) for name, layer in self.layers.items() if (chosen := allocation.layers[name]))
        return all(can_become(layer, chosen) for layer, chosen in made)

    def _tradeoff(self, budgets: Sequence[int], layers: int) -> tuple[Point, ...]:
        """Return what the method makes of some budgets in the first unit, ascending in cost."""
        found: dict[int, Point] = {}
        for choices in self.method.sketch(self.free, [budget - self.fixed_cost for budget in budgets]):
            made = [choice for choice in {**choices, **self.pinned}.values() if choice is not None]
            cost = self.fixed_cost + sum(self._cost(self.unit, name, choice) for name, choice in choices.items())
            found[cost] = point(cost, (float(one.errors[rank]) for one, rank in made), layers)
        return tuple(found[cost] for cost in sorted(found))

    def _solve(self, ratios: Mapping[str, float], budgets: Mapping[str, int]) -> Solution:
        left = {unit: budget - self._fixed(unit) for unit, budget in budgets.items()}
        short = [unit for unit in self.others if left[unit] < 0]
        try:
            if short:
                raise ContradictoryError(f"the {spoken(short[0])} that is not in these layers is more than that")
            return solve_budgets(self.method, self.free, left)
        except ContradictoryError as error:
            asked = ", ".join(f"{ratio:g} of {spoken(unit)}" for unit, ratio in ratios.items())
            raise ValueError(f"`budget`: {asked}: {error}. Raise one of them; {self._reach()}") from error

    def _reach(self) -> str:
        """Return the end of a sentence: how far down each of several budgets can go."""
        costs = self.dense_costs.items()
        least = ", ".join(f"{self.smallest_in(unit) / dense:.4f} of {spoken(unit)}" for unit, dense in costs)
        why = " Layers of which no form was measured to be faster stay dense." if LATENCY in self.dense_costs else ""
        return f"with the same layers each alone can go down to {least}.{why}"

    def _within(self, max_error: float) -> Allocation:
        solution = Solution(self.method.within(self.free, max_error))
        return self._allocation(solution, {self.unit: 1.0}, {self.unit: self.dense_cost}, max_error)

    def _allocation(
        self,
        solution: Solution,
        ratios: Mapping[str, float],
        budgets: Mapping[str, int],
        max_error: float | None = None,
    ) -> Allocation:
        choices = {**solution.choices, **self.pinned}
        chosen = {name: _factorization(self.layers[name], choices[name]) for name in self.layers}
        costs = {
            unit: self._fixed(unit) + sum(self._cost(unit, name, solution.choices[name]) for name in self.free)
            for unit in budgets
        }
        return Allocation(
            layers={**chosen, **dict.fromkeys(self.stay_dense)},
            skipped=dict(self.skipped),
            shapes={**self.shapes, **self.stay_dense},
            cost=costs[self.unit],
            dense_cost=self.dense_cost,
            budget=costs[self.unit] if max_error is not None else budgets[self.unit],
            keep_ratio=costs[self.unit] / self.dense_cost if max_error is not None else ratios[self.unit],
            unit=self.unit,
            error=self.method.error,
            method=self.method.to_dict(),
            gap=solution.gap,
            weights=dict(solution.weights),
            others={unit: Spending(costs[unit], self._dense(unit), budgets[unit]) for unit in self.others},
            max_error=max_error,
            overridden=tuple(self.pinned),
            sampled=self.curves,
        )

    def _out_of_reach(self, keep_ratio: float, budget: int, by_unit: bool) -> str:
        overridden = " or that `overrides` are for" if self.pinned else ""
        asked = f"`budget`: {keep_ratio:g} of {spoken(self.unit)}" if by_unit else f"`keep_ratio`={keep_ratio}"
        least, got, fixed = (amount(self.unit, cost) for cost in (self.smallest_cost, budget, self.fixed_cost))
        reach = f"Reachable: {'a fraction' if by_unit else 'keep_ratio'} from {self.reachable[0]:.4f} to 1."
        return (
            f"{asked}: the budget must be at least {least}, got {got}. {fixed} are in layers that are not factorized"
            f"{overridden}, and the cheapest form of the others takes "
            f"{amount(self.unit, self.smallest_cost - self.fixed_cost)}. "
            f"{f'Raise it; {self._reach()}' if self.others else reach}"
        )


def _factorization(layer: LayerCandidates, choice: Choice) -> Factorization | None:
    if choice is None:
        return None
    candidate, rank = choice
    error = float(candidate.errors[rank])
    cost = candidate.cost(rank)
    return Factorization(candidate.folding, candidate.num_slices, rank, error, cost, layer.dense_cost)
