"""Analysis: read a model, compute every layer's candidates, choose under one budget. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lr_callback.analysis.layerwise import candidates_of
from lr_callback.common.processes import Processes
from lr_callback.common.table import listed, printable, readable
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.analysed import Analysis
from lr_callback.decisions.candidates import LayerCandidates
from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, LayerCost, Unit
from lr_callback.decisions.goals import Goal, check_goal, one_goal, units_of
from lr_callback.decisions.methods import Method, check_method
from lr_callback.mathematics.folding import Geometry
from lr_callback.mathematics.importance import Importance, checked_importance, warn_of_unknown
from lr_callback.model.find import Found, find_layers
from lr_callback.model.observe import Observation, observe
from lr_callback.model.overrides import Override, overridden, pinned, read_overrides
from lr_callback.model.pricing import (
    Prices,
    dense_again,
    first_costs,
    layer_costs,
    leave_out_unused,
    listed_prices,
    model_costs,
    no_gain,
    wanted_times,
)
from lr_callback.units.latency import Progress, Wanted
from lr_callback.units.own_cost import read_cost


class NothingToFactorizeError(ValueError):
    """No layer of a model is worth factorizing."""


def allocate(
    model: nn.Module,
    keep_ratio: float | None = None,
    *,
    budget: Mapping[str, float] | None = None,
    max_error: float | None = None,
    method: Method | None = None,
    cost: Unit = "parameters",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    overrides: Mapping[str, object] | None = None,
    example_input: object = None,
    importance: Mapping[str, Importance] | None = None,
) -> Allocation:
    """Choose, for every layer, what it becomes, under one budget for the whole model. Changes nothing.

    Args:
        model: layers that are factorized already are analysed as the dense layers that they came from.
        keep_ratio: fraction of the whole model's cost to keep, in (0, 1]; what cannot be factorized counts too. None:
            0.5, unless one of the next two is given in its place.
        budget: unit -> fraction to keep, several at once: ``{"parameters": 0.3, "multiply_adds": 0.6}``. All hold; the
            allocation tells how far from the best it may be (``gap``).
        max_error: the smallest model in which no layer errs by more than this, in (0, 1].
        method: how to choose; None: :class:`~lr_callback.ALDS`.
        cost: ``"parameters"``, ``"bytes"`` of the state dict's tensors, ``"multiply_adds"``, or ``"latency"``: the time
            of a run on this device, measured layer by layer (:mod:`lr_callback.units.latency`); or your own: a
            function, or the path to import one by, that says what any module costs (:mod:`lr_callback.units.own_cost`).
            A ``budget`` may have ``"activation_memory"``, too: bytes that a run keeps for its backward pass.
        include: patterns of layers, only these are factorized; None: all. Glob patterns of names, ``type:Linear``,
            ``place:first`` (:mod:`lr_callback.model.patterns`).
        exclude: patterns of layers that stay dense.
        embeddings: whether ``nn.Embedding`` layers are factorized, too.
        overrides: pattern of layers -> what each becomes, whatever the others do (:mod:`lr_callback.model.overrides`).
        example_input: a tensor, or a tuple of positional or dict of named arguments of ``model``. Multiply-adds are
            counted, and times measured, on it; with another cost the layers that it does not use are left alone.
        importance: layer name -> of its inputs and outputs, for an ``error`` that is weighted by it, or of the layer,
            for the objective ``loss``; of a layer without one, all inputs count the same, and a warning tells of it.

    Returns:
        The allocation; ``print`` shows it as a table, :func:`~lr_callback.factorize_` carries it out.

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
    cost = read_cost(cost)
    goal = check_goal(one_goal(keep_ratio, budget, max_error, cost))
    layers: dict[str, Any] = {"include": include, "exclude": exclude, "embeddings": embeddings, "overrides": overrides}
    found = analyze_for(
        goal, model, method, cost=cost, example_input=example_input, importance=importance, layers=layers
    )
    return found.allocate(goal)


def analyze_for(
    goal: Goal,
    model: nn.Module,
    method: Method | None = None,
    *,
    cost: Unit = "parameters",
    example_input: object = None,
    importance: Mapping[str, Importance] | None = None,
    layers: Mapping[str, Any],
) -> Analysis:
    """Compute every layer's candidates in the units of a goal, on one run of the model where they take one.

    Args:
        goal: see :mod:`lr_callback.decisions.goals`.
        model: see :func:`allocate`.
        method: see :func:`allocate`.
        cost: the unit of a goal that names none.
        example_input: see :func:`allocate`.
        importance: see :func:`allocate`.
        layers: ``include``, ``exclude``, ``embeddings`` and ``overrides``, see :func:`allocate`.

    Raises:
        ValueError: See :func:`allocate`.
    """
    units = units_of(goal, cost)
    is_counted = not OBSERVED.isdisjoint(units)
    timed_for = to_time(model, method, **layers) if LATENCY in units else None
    is_observed, kept = is_counted or example_input is not None, ACTIVATION_MEMORY in units
    seen = observe(model, example_input, timed_for, activations=kept) if is_observed else None
    used = None if is_counted else seen
    prices = [Prices(unit, seen) for unit in units]
    return analyze(model, method, prices=prices, used=used, importance=importance, **layers)


def to_time(
    model: nn.Module,
    method: Method | None = None,
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    overrides: Mapping[str, object] | None = None,
) -> dict[str, Wanted]:
    """Return what is to be measured of each layer for a budget in time; arguments as of :func:`allocate`.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    found = find_layers(model, include, exclude)
    return wanted_times(found, overridden(read_overrides(overrides), model, found), check_method(method), embeddings)


def analyze(
    model: nn.Module,
    method: Method | None = None,
    *,
    prices: Prices | Sequence[Prices] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    overrides: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
    used: Observation | None = None,
    importance: Mapping[str, Importance] | None = None,
) -> Analysis:
    """Compute every layer's candidates, for any budget afterwards.

    Args:
        model: see :func:`allocate`.
        method: see :func:`allocate`.
        prices: the unit of all costs, or several; None: parameters.
        include: see :func:`allocate`.
        exclude: see :func:`allocate`.
        embeddings: see :func:`allocate`.
        overrides: see :func:`allocate`.
        progress: told of each layer that this process computes.
        processes: each computes a part of the layers, and all return all of them; None: this one alone. The model must
            be the same on every process.
        used: of one run of the model; layers that it neither calls nor reads are left out, whatever the unit.
        importance: see :func:`allocate`; the same on every process.

    Raises:
        ValueError: See :func:`allocate`.
        RuntimeError: If another process failed.
    """
    method, processes, paid = check_method(method), processes or Processes(), listed_prices(prices)

    def priced() -> tuple[Found, Mapping[str, Units], dict[str, Override], dict[str, int]]:
        checked_importance(method.error, importance, method.needs_effects)
        found = find_layers(model, include, exclude)
        leave_out_unused(found, used)
        own = overridden(read_overrides(overrides), model, found)
        return found, layer_costs(found, paid, True, embeddings), own, model_costs(model, paid)

    found, units, pins, totals = processes.agree(priced)
    costs, others = first_costs(units), _others(units)
    methods = _methods(method, costs, pins)
    owners = dict(zip(costs, processes.owners(_work(cost.geometry, method) for cost in costs.values()), strict=True))
    own = {name: found.layers[name] for name, owner in owners.items() if owner == processes.rank}
    known = importance or {}
    if processes.rank == 0:
        warn_of_unknown(list(costs), known)
    parts = processes.gather(lambda: candidates_of(own, costs, methods, progress, known, others), long=True)
    layers = {name: parts[owner][name] for name, owner in owners.items()}
    return _analysis(model, method, totals, found, costs, layers, pins)


Units = Mapping[str, LayerCost]
"""Unit -> the costs of a layer in it, the first one first."""


def _others(units: Mapping[str, Units]) -> dict[str, Units]:
    return {name: dict(list(own.items())[1:]) for name, own in units.items()}


def _methods(method: Method, costs: Mapping[str, LayerCost], pins: Mapping[str, Override]) -> dict[str, Method]:
    """Return what computes the candidates of each layer."""
    return {name: pins[name].method(method) if name in pins else method for name in costs}


def _work(geometry: Geometry, method: Method) -> float:
    return geometry.work(method.slice_counts(geometry))


def survey(
    model: nn.Module,
    method: Method | None = None,
    *,
    prices: Prices | Sequence[Prices] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    overrides: Mapping[str, object] | None = None,
) -> Analysis:
    """Find the layers and their prices without computing an error: enough for the reachable range.

    Takes what :func:`analyze` takes and raises what it raises; the errors in the result have no meaning. A layer whose
    weights are all zero counts as one that can be factorized: it will have been trained by the time it matters.
    """
    method, paid = check_method(method), listed_prices(prices)
    found = find_layers(model, include, exclude)
    pins = overridden(read_overrides(overrides), model, found)
    units = layer_costs(found, paid, False, embeddings)
    costs, others = first_costs(units), _others(units)
    methods = _methods(method, costs, pins)
    layers = {name: methods[name].priced(own, others[name]) for name, own in costs.items()}
    return _analysis(model, method, model_costs(model, paid), found, costs, layers, pins, known=False)


def _analysis(
    model: nn.Module,
    method: Method,
    totals: Mapping[str, int],
    found: Found,
    costs: Mapping[str, LayerCost],
    layers: dict[str, LayerCandidates],
    pins: Mapping[str, Override],
    known: bool = True,
) -> Analysis:
    """Put an analysis together; layers without a candidate are skipped."""
    chosen = pinned(pins, layers, costs, found.skipped, method.rank_multiple, known)
    useless = [name for name, layer in layers.items() if not layer.candidates]
    found.skipped.update({name: no_gain(costs[name].geometry, method, LATENCY in totals) for name in useless})
    layers = {name: layer for name, layer in layers.items() if name not in useless}
    if not layers:
        raise NothingToFactorizeError(_nothing(found.skipped, is_timed=LATENCY in totals))
    (unit, dense), *others = totals.items()
    return Analysis(
        method=method,
        unit=unit,
        layers=layers,
        shapes={name: costs[name].geometry.weight_shape for name in layers},
        stay_dense=dense_again(model, found.skipped),
        skipped=found.skipped,
        dense_cost=dense,
        pinned=chosen,
        others=dict(others),
    )


def _nothing(skipped: Mapping[str, str], is_timed: bool) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(printable(readable(name)) or "(the model)")
    told = "; ".join(f"{listed(those, 5)}: {reason}" for reason, those in names.items())
    way_out = " Ask for a budget in another unit, or measure on a larger batch." if is_timed else ""
    return (
        "Nothing to factorize: the model must have a Linear, convolution or Conv1D layer that is worth it. "
        f"Skipped: {told or 'no layer with a weight was found'}.{way_out}"
    )
