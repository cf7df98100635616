"""Analysis: read a model, compute every layer's candidates, choose under one budget. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor
from typing import Any

from torch import nn

from lr_callback.allocation import Allocation, Factorization
from lr_callback.candidates import LayerCandidates
from lr_callback.costs import OBSERVED, LayerCost, check_cost
from lr_callback.find import Found, find_layers
from lr_callback.folding import Geometry
from lr_callback.importance import Importance, checked_importance, warn_of_unknown
from lr_callback.layerwise import Progress, candidates_of
from lr_callback.methods import Choice, Method, check_method
from lr_callback.observe import Observation, observe
from lr_callback.pricing import Prices, dense_again, layer_costs, leave_out_unused, no_gain
from lr_callback.processes import Processes
from lr_callback.written import is_number


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
    """

    method: Method
    unit: str
    layers: Mapping[str, LayerCandidates]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]
    stay_dense: Mapping[str, tuple[int, ...]]
    dense_cost: int

    @property
    def fixed_cost(self) -> int:
        """Cost of what is not a layer here: it is paid whatever is chosen."""
        return self.dense_cost - sum(layer.dense_cost for layer in self.layers.values())

    @cached_property
    def smallest_cost(self) -> int:
        """Smallest cost of the whole model that the method can reach; the same for every budget."""
        return self.fixed_cost + self.method.smallest_cost(self.layers)

    @property
    def reachable(self) -> tuple[float, float]:
        """Smallest and largest ``keep_ratio`` that can be met."""
        return self.smallest_cost / self.dense_cost, 1.0

    def allocate(self, keep_ratio: float) -> Allocation:
        """Choose what every layer becomes.

        Args:
            keep_ratio: fraction of the whole model's dense cost to keep, in (0, 1].

        Raises:
            ValueError: If the ratio is out of range, or below what can be reached.
        """
        check_keep_ratio(keep_ratio)
        # The epsilon keeps a ratio that was made by division (cost / dense_cost) from losing its last unit.
        budget = floor(keep_ratio * self.dense_cost * (1 + 1e-12))
        if budget < self.smallest_cost:
            raise ValueError(self._out_of_reach(keep_ratio, budget))
        solution = self.method.solve(self.layers, budget - self.fixed_cost)
        chosen = {name: _factorization(self.layers[name], solution.choices[name]) for name in self.layers}
        saved = sum(one.dense_cost - one.cost for one in chosen.values() if one is not None)
        return Allocation(
            layers={**chosen, **dict.fromkeys(self.stay_dense)},
            skipped=dict(self.skipped),
            shapes={**self.shapes, **self.stay_dense},
            cost=self.dense_cost - saved,
            dense_cost=self.dense_cost,
            budget=budget,
            keep_ratio=float(keep_ratio),
            unit=self.unit,
            error=self.method.error,
            method=self.method.to_dict(),
            gap=solution.gap,
            weights=dict(solution.weights),
        )

    def _out_of_reach(self, keep_ratio: float, budget: int) -> str:
        unit = self.unit.replace("_", "-")
        return (
            f"`keep_ratio`={keep_ratio}: the budget must be at least {self.smallest_cost:,} {unit}, got {budget:,}. "
            f"{self.fixed_cost:,} are in layers that are not factorized, and the cheapest form of the others takes "
            f"{self.smallest_cost - self.fixed_cost:,}. Reachable: keep_ratio from {self.reachable[0]:.4f} to 1."
        )


def _factorization(layer: LayerCandidates, choice: Choice) -> Factorization | None:
    if choice is None:
        return None
    candidate, rank = choice
    error = float(candidate.errors[rank])
    cost = candidate.cost(rank)
    return Factorization(candidate.folding, candidate.num_slices, rank, error, cost, layer.dense_cost)


def check_keep_ratio(keep_ratio: object) -> float:
    """Return the ratio as a float.

    Raises:
        ValueError: If it is not a number in (0, 1].
    """
    if is_number(keep_ratio) and 0 < float(keep_ratio) <= 1:
        return float(keep_ratio)
    raise ValueError(f"`keep_ratio` must be a number in (0, 1], the fraction of the model to keep, got {keep_ratio!r}.")


def allocate(
    model: nn.Module,
    keep_ratio: float = 0.5,
    *,
    method: Method | None = None,
    cost: str = "parameters",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    example_input: object = None,
    importance: Mapping[str, Importance] | None = None,
) -> Allocation:
    """Choose, for every layer, what it becomes under one budget. Changes nothing.

    Args:
        model: layers that are factorized already are analysed as the dense layers that they came from.
        keep_ratio: fraction of the whole model's cost to keep, in (0, 1]; what cannot be factorized counts too.
        method: how to choose; None: :class:`~lr_callback.methods.ALDS`.
        cost: ``"parameters"``, ``"bytes"`` of the state dict's tensors, or ``"multiply_adds"``.
        include: glob patterns of layer names, only these are factorized; None: all.
        exclude: glob patterns of layer names that stay dense.
        embeddings: whether ``nn.Embedding`` layers are factorized, too.
        example_input: a tensor, or a tuple of positional or dict of named arguments of ``model``. Multiply-adds are
            counted on it; with another cost the layers that it does not use are left alone.
        importance: layer name -> of its inputs and outputs, for an ``error`` that is weighted by it, or of the layer,
            for the objective ``loss``; of a layer without one, all inputs count the same, and a warning tells of it.

    Returns:
        The allocation; ``print`` shows it as a table, :func:`~lr_callback.surgery.factorize_` carries it out.

    Raises:
        TypeError: If ``model`` is no module, or ``method`` no method.
        ValueError: If an argument is out of range, a pattern matches nothing, there is nothing to factorize, a weight
            is not finite, or the budget cannot be met (the message states the reachable range).

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> allocation = allocate(model, keep_ratio=0.5)
        >>> allocation.cost <= allocation.budget == 2405
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    check_keep_ratio(keep_ratio)
    check_cost(cost)
    seen = observe(model, example_input) if cost in OBSERVED or example_input is not None else None
    used = None if cost in OBSERVED else seen
    layers: dict[str, Any] = {"include": include, "exclude": exclude, "embeddings": embeddings}
    analysis = analyze(model, method, prices=Prices(cost, seen), used=used, importance=importance, **layers)
    return analysis.allocate(keep_ratio)


def analyze(
    model: nn.Module,
    method: Method | None = None,
    *,
    prices: Prices | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
    used: Observation | None = None,
    importance: Mapping[str, Importance] | None = None,
) -> Analysis:
    """Compute every layer's candidates, for any budget afterwards.

    Args:
        model: see :func:`allocate`.
        method: see :func:`allocate`.
        prices: the unit of all costs; None: parameters.
        include: see :func:`allocate`.
        exclude: see :func:`allocate`.
        embeddings: see :func:`allocate`.
        progress: told of each layer that this process computes.
        processes: each computes a part of the layers, and all return all of them; None: this one alone. The model must
            be the same on every process.
        used: of one run of the model; layers that it neither calls nor reads are left out, whatever the unit.
        importance: see :func:`allocate`; the same on every process.

    Raises:
        ValueError: See :func:`allocate`.
        RuntimeError: If another process failed.
    """
    method, processes, paid = check_method(method), processes or Processes(), prices or Prices()

    def priced() -> tuple[Found, dict[str, LayerCost]]:
        checked_importance(method.error, importance, method.needs_effects)
        found = find_layers(model, include, exclude)
        leave_out_unused(found, used)
        return found, layer_costs(found, paid, embeddings=embeddings)

    found, costs = processes.agree(priced)
    owners = dict(zip(costs, processes.owners(_work(cost.geometry, method) for cost in costs.values()), strict=True))
    own = {name: found.layers[name] for name, owner in owners.items() if owner == processes.rank}
    known = importance or {}
    if processes.rank == 0:
        warn_of_unknown(list(costs), known)
    parts = processes.gather(lambda: candidates_of(own, costs, method, progress, known), long=True)
    layers = {name: parts[owner][name] for name, owner in owners.items()}
    return _analysis(model, method, paid, found, costs, layers)


def _work(geometry: Geometry, method: Method) -> float:
    return geometry.work(method.slice_counts(geometry))


def survey(
    model: nn.Module,
    method: Method | None = None,
    *,
    prices: Prices | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
) -> Analysis:
    """Find the layers and their prices without computing an error: enough for the reachable range.

    Takes what :func:`analyze` takes and raises what it raises; the errors in the result have no meaning. A layer whose
    weights are all zero counts as one that can be factorized: it will have been trained by the time it matters.
    """
    method, paid = check_method(method), prices or Prices()
    found = find_layers(model, include, exclude)
    costs = layer_costs(found, paid, skip_zero=False, embeddings=embeddings)
    layers = {name: method.priced(layer_cost) for name, layer_cost in costs.items()}
    return _analysis(model, method, paid, found, costs, layers)


def _analysis(
    model: nn.Module,
    method: Method,
    prices: Prices,
    found: Found,
    costs: Mapping[str, LayerCost],
    layers: dict[str, LayerCandidates],
) -> Analysis:
    """Put an analysis together; layers without a candidate are skipped."""
    useless = {name for name, layer in layers.items() if not layer.candidates}
    found.skipped.update({name: no_gain(costs[name].geometry) for name in useless})
    layers = {name: layer for name, layer in layers.items() if name not in useless}
    if not layers:
        raise ValueError(_nothing(found))
    return Analysis(
        method=method,
        unit=prices.unit,
        layers=layers,
        shapes={name: costs[name].geometry.weight_shape for name in layers},
        stay_dense=dense_again(model, found.skipped),
        skipped=found.skipped,
        dense_cost=prices.of_model(model),
    )


def _nothing(found: Found) -> str:
    reasons = "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in found.skipped.items())
    return (
        "Nothing to factorize: the model must have a Linear, convolution or Conv1D layer that is worth it. "
        f"Skipped: {reasons or 'no layer with a weight was found'}."
    )
