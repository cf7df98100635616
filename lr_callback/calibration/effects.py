"""Effects: what the error of each layer does to the outputs of the model, measured layer by layer.

Two layers with the same relative error need not do the same harm. With one layer alone in its factorized form and all
others as they are, ``effect = Var(change of the outputs) / Var(outputs)``, and ``w = effect / relative_error^power`` is
what the layer's error must be weighed with in a sum of such powers to give that effect. Variances are over all entries
of an output: what is added to all of them alike, as to the scores of all classes, is no change.

The weight of a layer is ``sqrt(w)``, half way between ``w``, the effect of layers that are cut alone, and no weight at
all: what was measured to be best for residual networks, whose layers are cut together, in a sum of fourth powers
(``power=4``); ``benchmarks/results/resnet20_repair.md`` has the sum with and without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from math import fsum, sqrt
from typing import TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from lr_callback.calibration.outputs import Outputs, add, changes, outputs_of, summed
from lr_callback.common.parallel import Workers, workers
from lr_callback.common.processes import Processes, by_name
from lr_callback.common.table import listed
from lr_callback.common.untouched import as_written, untouched
from lr_callback.common.written import is_number
from lr_callback.decisions.candidates import LayerCandidates, frontier
from lr_callback.decisions.costs import LayerCost
from lr_callback.decisions.factorization import Factorization
from lr_callback.decisions.methods import Choice, Method, check_method
from lr_callback.edits.build import factors, skeleton
from lr_callback.edits.surgery import places_of, standing_in
from lr_callback.layers import dense_bias
from lr_callback.layers.layer_types import dense_weight
from lr_callback.mathematics.importance import Importance, checked_importance
from lr_callback.model.find import find_layers
from lr_callback.model.pricing import Prices, first_costs, layer_costs
from lr_callback.model.running import runner, watching
from lr_callback.units.latency import Progress

Batch = TypeVar("Batch")

SHARE = 0.3
"""Of the dense layer's cost, what the form costs whose effect is measured."""

MOST_MEASURED = 500
"""Layers that are measured, of more the largest: each takes a run of the whole model on every batch."""

_LEAST_ERROR = 1e-3
"""Relative error below which an effect is rounding."""


def measure_effects(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Method | None = None,
    importance: Mapping[str, Importance] | None = None,
    *,
    share: float = SHARE,
    forward: Callable[[Batch], object] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    embeddings: bool = False,
    gentle: bool = False,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> dict[str, Importance]:
    """Measure what the error of each layer does to the outputs of a model, for ``objective="loss"``.

    Args:
        model: on the device of the batches; is not changed.
        batches: of the training; a few are enough.
        method: whose measure of errors, power and foldings are taken; None: :class:`~lr_callback.ALDS`.
        importance: layer name -> of its inputs and outputs, if the error is weighted by it.
        share: the layer costs this part of the dense one while its effect is measured, in (0, 1); one slice.
        forward: runs the model on a batch and returns its outputs: all floating tensors in them count, but for scalars.
            None: as for :func:`~lr_callback.collect_moments`.
        include: glob patterns of layer names; only these are measured. None: all.
        exclude: glob patterns of layer names that are left out.
        embeddings: whether ``nn.Embedding`` layers are measured, too.
        gentle: do not warn of layers that are not called.
        processes: of a distributed run, each with batches of its own; all get the effects on all batches.
        progress: told of each layer that is decomposed, and that is run on a batch.

    Returns:
        The importance with the weights of the layers that were measured, which are the roots of their effects for an
        error of one, to the method's power. Layers that were not called have none, nor have those that are of a low
        rank already and do not err, nor others than the :data:`MOST_MEASURED` largest; an allocation gives them the
        median.

    Time: one forward pass for each layer that is measured and each batch, and one decomposition for each such layer.
    Memory: ``share`` of the model beside it, and its outputs on one batch.

    Raises:
        ValueError: If there are no batches, an argument is out of range, or the outputs cannot be compared: they hold
            no floating tensor, are not finite, do not vary, or are of other shapes once a layer is cut.
        RuntimeError: If another process failed.

    Example::

        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> effects = measure_effects(model, [torch.randn(64, 16)])
        >>> effects["0"].weight > 0 and effects["2"].weight > 0
        True
    """
    method, processes = check_method(method), processes or Processes()
    _check_share(share)
    known = checked_importance(method.error, importance)
    found = find_layers(model, include, exclude)
    costs = first_costs(layer_costs(found, [Prices()], embeddings=embeddings))
    layers = {name: found.layers[name] for name in _largest(costs)}

    def measure() -> _Measured:
        rounds = 1 + (max(1, len(batches)) if isinstance(batches, Sized) else 1)
        told = [_round(progress, number, rounds) for number in range(rounds)]
        made = _stand_ins(layers, costs, method, known, share, told[0])
        return _measure(model, batches, runner(model, forward), layers, made, told[1:])

    whole = _merged(processes.gather(measure, long=True))
    weights = _weights(whole, method.power)
    if processes.rank == 0 and not gentle:
        _warn_of_unmeasured([name for name in whole.errors if name not in weights])
    measured = {name: replace(known.get(name, Importance()), weight=weight) for name, weight in weights.items()}
    exact = {name: Importance() for name in costs if name not in whole.errors}
    return {**exact, **known, **measured}


def _largest(costs: Mapping[str, LayerCost]) -> list[str]:
    """Return the names of the layers that are measured, in the model's order."""
    most = set(sorted(costs, key=lambda name: -costs[name].dense)[:MOST_MEASURED])
    return [name for name in costs if name in most]


def _round(progress: Progress | None, number: int, rounds: int) -> Progress:
    """Return what is told of the layers in one of several rounds through all of them."""

    def tell(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(number * total + done, rounds * total, name)

    return tell


def _check_share(share: object) -> None:
    if not is_number(share) or not 0 < float(share) < 1:
        raise ValueError(f"`share` must be a number in (0, 1), the part of a layer's cost to keep, got {share!r}.")


@dataclass(frozen=True)
class _Measured:
    """What one process has measured.

    Args:
        dense: the outputs of the model as it is.
        changes: name of a layer that was called -> the changes of the outputs with this layer cut alone.
        errors: name of a layer that can be cut -> its relative error then.
    """

    dense: Outputs
    changes: dict[str, Outputs]
    errors: dict[str, float]


_StandIns = dict[str, tuple[nn.Module, float]]
"""Layer name -> what stands in for it, and its relative error."""


def _stand_ins(
    layers: Mapping[str, nn.Module],
    costs: Mapping[str, LayerCost],
    method: Method,
    importance: Mapping[str, Importance],
    share: float,
    progress: Progress,
) -> _StandIns:
    """Build the form of each layer whose effect is measured; layers that have none are left out.

    One slice: its factors are the best of their rank for the inputs that are known, so that there is no decoder to
    refit, and it takes one decomposition.
    """
    alone = copy.copy(method)
    alone.max_slices = 1
    made: _StandIns = {}
    with workers() as crew:
        for done, (name, layer) in enumerate(layers.items()):
            progress(done, len(layers), name)
            known = importance.get(name)
            candidates = alone.candidates(dense_weight(layer), costs[name], crew, known)
            choice = _about(candidates, share)
            if choice is not None:
                form = _stand_in(layer, costs[name], choice, crew, known, method.shrinkage)
                made[name] = form, float(choice[0].errors[choice[1]])
    return made


def _about(layer: LayerCandidates, share: float) -> Choice:
    """Return the best choice within a share of the dense cost that errs at all, or else the cheapest; None: neither."""
    edge = frontier(layer)
    listed = list(zip(edge.choices, edge.errors, edge.costs, strict=True))
    wrong = [(choice, cost) for choice, error, cost in listed if choice is not None and error >= _LEAST_ERROR]
    within = [choice for choice, cost in wrong if cost <= share * layer.dense_cost]
    return within[-1] if within else wrong[0][0] if wrong else None


def _stand_in(
    layer: nn.Module,
    cost: LayerCost,
    choice: Choice,
    crew: Workers,
    importance: Importance | None,
    shrinkage: float,
) -> nn.Module:
    assert choice is not None
    candidate, rank = choice
    form = Factorization(candidate.folding, candidate.num_slices, rank, 0.0, candidate.cost(rank), cost.dense)
    made, weight = skeleton(layer, form), dense_weight(layer)
    made.set_factors(*factors(weight, cost.geometry, form, crew, importance, shrinkage))
    shift = None if importance is None else importance.shift(weight.double() - dense_weight(made).double())
    if shift is not None:  # a constant that is made up for after a cut is no effect of it
        bias = dense_bias(layer)
        mended = shift if bias is None else shift + bias.double()
        made.decoder._parameters["bias"] = nn.Parameter(mended.to(weight.dtype), requires_grad=False)
    return made.eval()


def _measure(
    model: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[Batch], object],
    layers: Mapping[str, nn.Module],
    made: _StandIns,
    told: Sequence[Progress],
) -> _Measured:
    """Run every batch through the model as it is, and once more for each layer that it calls."""
    names = {layers[name]: name for name in made}
    measured = _Measured({}, {}, {name: error for name, (_, error) in made.items()})
    called, places = list[nn.Module](), places_of(model, names)
    with untouched(model), as_written():
        for index, batch in enumerate(batches):
            progress = told[min(index, len(told) - 1)]
            called.clear()
            with watching(names, lambda layer, inputs, outputs: called.append(layer)):
                wanted = _again(run, batch)
            add(measured.dense, wanted, "")
            for done, layer in enumerate(dict.fromkeys(called)):
                name = names[layer]
                progress(done, len(layers), name)
                with standing_in(model, {layer: made[name][0]}, places):
                    found = changes(name, wanted, _again(run, batch))
                add(measured.changes.setdefault(name, {}), found, f" with {name} cut")
    if not measured.dense:
        raise ValueError("`batches` must hold at least one calibration batch, got none.")
    return measured


def _again(run: Callable[[Batch], object], batch: Batch) -> list[Tensor]:
    """Run a model, which draws the same random numbers each time, and return its outputs."""
    torch.manual_seed(0)
    return outputs_of(run(batch))


def _merged(parts: Sequence[_Measured]) -> _Measured:
    """Add up what several processes measured, in the order of their ranks."""
    changed = {name: summed(held) for name, held in by_name(one.changes for one in parts).items()}
    return _Measured(summed([one.dense for one in parts]), changed, parts[0].errors)


def _weights(measured: _Measured, power: float) -> dict[str, float]:
    """Return the weights of the layers that were called; of several outputs each counts the same."""
    variances = {place: one.variance(one.count) for place, one in measured.dense.items()}
    varying = [place for place, variance in variances.items() if variance > 0]
    if not varying:
        raise ValueError(
            "The outputs of the model on the calibration batches must vary, they are all the same: what a layer does "
            "to them cannot be told. Give other batches, or a `forward` that returns what counts."
        )
    weights: dict[str, float] = {}
    for name, found in measured.changes.items():
        parts = [
            found[place].variance(measured.dense[place].count) / variances[place] for place in varying if place in found
        ]
        weights[name] = sqrt(fsum(parts) / len(varying) / measured.errors[name] ** power)
    return weights


def _warn_of_unmeasured(names: Sequence[str]) -> None:
    if names:
        warn(
            f"The effects of {len(names)} layer(s) are not measured, they are not called on the calibration batches: "
            f"{listed(names, 5)}. They count as much as the median of the others.",
            stacklevel=3,
        )
