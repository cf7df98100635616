"""Measure: the times of all layers of a model, and of what is not in them.

Layers are measured one by one, each with the inputs that it has in a run of the model, in eval mode; the whole model in
the same way. What the whole takes beyond its layers is the rest, which no factorization changes. Layers and model have
their memory from what was freed before: what the system takes to give it anew is not a share of a layer's time, which
is smaller where the layer is, and comes and goes with what else a process has done.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lr_callback.common.written import check_fields
from lr_callback.decisions.methods import Method
from lr_callback.layers import any_weight
from lr_callback.layers.layer_types import layer_cost
from lr_callback.units.latency.bench import Bench, form_of
from lr_callback.units.latency.curves import Curve, Key, LayerTimes, measured_curve
from lr_callback.units.latency.files import Times, device_facts
from lr_callback.units.latency.inputs import LayerInput
from lr_callback.units.latency.memory import reused_memory, room_for
from lr_callback.units.latency.timing import Stopwatch, Timing, of_runs, timed

SPREAD_SAID, SPREAD_REFUSED = 0.15, 2.0
"""Spread of repeated runs that is warned of, and that is too much to decide by."""

_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 50, 1.0

Progress = Callable[[int, int, str], None]
"""Called before each layer with the number done, the number of all, and its name."""


@dataclass(frozen=True)
class Wanted:
    """What is to be known of a layer.

    Args:
        method: whose foldings and numbers of slices it may have.
        rank: that it will have, whatever is faster; None: any.
    """

    method: Method
    rank: int | None = None

    def keys(self, layer: nn.Module) -> Iterator[Key]:
        """Yield the foldings and numbers of slices of a layer that are to be measured."""
        cost = layer_cost(layer)
        counts = self.method.slice_counts(cost.geometry)
        for folding in cost.distinct_foldings(self.method.foldings):
            yield from ((folding, count) for count in counts)

    def is_known(self, times: LayerTimes) -> bool:
        """Return whether times tell of the rank, if one is given."""
        return self.rank is None or any(self.rank in curve.times for curve in times.curves.values())


@dataclass(frozen=True)
class Latencies:
    """What a model takes on a device.

    Args:
        rest: nanoseconds of what is not in its layers.
        layers: name -> times.
        spread: of repeated runs, see :class:`Timing`; the mean over all that was measured, weighted by time.
        device: what the times are of.
    """

    rest: int
    layers: Mapping[str, LayerTimes]
    spread: float
    device: Mapping[str, Any]

    @property
    def dense(self) -> int:
        """Nanoseconds of the whole model with all layers dense."""
        return self.rest + sum(layer.dense for layer in self.layers.values())

    def lacks(self, wanted: Mapping[str, Wanted]) -> list[str]:
        """Return the layers of which something is wanted that was not measured."""
        return [name for name, of in wanted.items() if name not in self.layers or not of.is_known(self.layers[name])]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        layers = {
            name: [of.dense, [[*key, one.step, one.misfit, list(one.times.items())] for key, one in of.curves.items()]]
            for name, of in self.layers.items()
        }
        return {"rest": self.rest, "layers": layers, "spread": self.spread, "device": dict(self.device)}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Latencies:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a part is missing.
        """
        parts = check_fields(
            written, {"rest": int, "layers": dict, "spread": (int, float), "device": dict}, "Latencies"
        )
        return cls(**{**parts, "layers": {name: _read_layer(*of) for name, of in parts["layers"].items()}})


def _read_layer(dense: int, curves: Sequence[Any]) -> LayerTimes:
    read = {(folding, count): Curve(step, dict(times), misfit) for folding, count, step, misfit, times in curves}
    return LayerTimes(dense, read)


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[LayerInput]],
    run: Callable[[], object],
    wanted: Mapping[str, Wanted],
    progress: Progress | None = None,
) -> Latencies:
    """Measure layers of a model, and the model; what its other layers take is a part of the rest.

    Args:
        model: as it stands.
        layers: name -> those to measure, dense or factorized; all on one device, one at least.
        inputs: name -> of its calls in a run.
        run: calls the model.
        wanted: name -> what is to be known of a layer; without it only what it takes dense.
        progress: told of each layer.

    Raises:
        ValueError: If there is a file of times of another device in the place of this one's.
        RuntimeError: If repeated runs differ so much that nothing can be told from them.
    """
    bench = Bench(any_weight(next(iter(layers.values()))).device)
    found: dict[str, LayerTimes] = {}
    room = room_for(call for calls in inputs.values() for call in calls)
    try:
        with torch.no_grad(), reused_memory(room, bench.device):
            for done, (name, layer) in enumerate(layers.items()):
                if progress is not None:
                    progress(done, len(layers), name)
                found[name] = _times(bench, layer, inputs.get(name, ()), wanted.get(name))
            whole, share = _model(bench, model, layers, inputs, run)
            before = sum(_standing(bench, layer, inputs.get(name, ())) for name, layer in layers.items())
    finally:
        bench.known.save()
    _check_spread(bench.spread)
    own = min(1.0, share) * whole
    scaled = {name: of.scaled(own / max(1, before)) for name, of in found.items()}
    return Latencies(round(whole - own), scaled, bench.spread, device_facts(bench.device))


def check_clock(device: torch.device) -> None:
    """Refuse to measure on a device where that is no use, before anything waits for it.

    Raises:
        ValueError: If there is a file of times of another device in the place of this one's.
        RuntimeError: If repeated runs of one product differ so much that nothing can be told from them.
    """
    Times(device)
    numbers = torch.ones(256, 256, device=device)
    _check_spread(timed(lambda: numbers @ numbers, device).spread)


def _times(bench: Bench, layer: nn.Module, calls: Sequence[LayerInput], wanted: Wanted | None) -> LayerTimes:
    """Return what a layer takes in all of its calls, dense and in each form that it may have."""
    dense = sum(bench.time(layer, call, None) for call in calls)
    curves: dict[Key, Curve] = {}
    if wanted is not None:
        found = {key: _curve(bench, layer, calls, key, dense, wanted) for key in wanted.keys(layer)}
        curves = {key: curve for key, curve in found.items() if curve is not None}
    return LayerTimes(dense, curves)


def _curve(
    bench: Bench, layer: nn.Module, calls: Sequence[LayerInput], key: Key, dense: int, wanted: Wanted
) -> Curve | None:
    def time(rank: int) -> int:
        return sum(bench.time(layer, call, (*key, rank)) for call in calls)

    geometry = layer_cost(layer).geometry
    if wanted.rank is not None:
        return Curve(1, {wanted.rank: time(wanted.rank)}) if wanted.rank <= geometry.full_rank(*key) else None
    # A form with as many parameters as the dense layer has as much to read and, two calls being slower than one, more
    # to do: it is not faster.
    last = layer_cost(layer).last_rank(*key)
    if last < 1:
        return None
    return measured_curve(time, last, dense, key[1] * geometry.groups, wanted.method.rank_multiple)


def _standing(bench: Bench, layer: nn.Module, calls: Sequence[LayerInput]) -> int:
    return sum(bench.time(layer, call, form_of(layer)) for call in calls)


def _model(
    bench: Bench,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[LayerInput]],
    run: Callable[[], object],
) -> tuple[int, float]:
    """Return the nanoseconds of the model, and which share of that its layers take as they stand.

    Known from an earlier run, if that was of a model of the same class whose parts have the same names and settings,
    and whose layers were called alike.
    """
    counts = Counter((bench.name(layer, call), name, call) for name, layer in layers.items() for call in inputs[name])
    forms = [f"{text} as {form_of(layers[name])}: {count}" for (text, name, _), count in counts.items()]
    described = "\n".join([*forms, type(model).__module__, type(model).__qualname__, repr(model)])
    signature = f"model {hashlib.sha256(described.encode()).hexdigest()}"
    whole, share = (bench.known.get(signature, form) for form in ("whole", "share of the layers"))
    if whole is None or share is None:
        whole, share = _in_turns(bench, layers, counts, run)
        bench.known.put(signature, "whole", whole)
        bench.known.put(signature, "share of the layers", share)
    bench.note(Timing(whole.nanoseconds, share.spread))
    return whole.nanoseconds, share.nanoseconds / 1e9


def _in_turns(
    bench: Bench,
    layers: Mapping[str, nn.Module],
    counts: Mapping[tuple[str, str, LayerInput], int],
    run: Callable[[], object],
) -> tuple[Timing, Timing]:
    """Time the model in turns with its layers: a machine that others use is slower at times.

    Returns:
        The nanoseconds of the model, and the share of its layers in it, in billionths.
    """
    watches: dict[str, tuple[Stopwatch, int]] = {}
    for (text, name, call), count in counts.items():
        form = form_of(layers[name])
        watch, before = watches.get(f"{text} as {form}") or (bench.stopwatch(layers[name], call, form), 0)
        watches[f"{text} as {form}"] = watch, before + count

    def all_layers() -> float:
        return sum(watch.block() * count for watch, count in watches.values())

    model = Stopwatch(run, bench.device)
    rounds: list[tuple[float, float]] = []
    while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _MOST_ROUNDS and sum(map(sum, rounds)) < 1e9 * _SECONDS):
        rounds.append((model.block(), all_layers()))
    return of_runs([whole for whole, _ in rounds]), of_runs([1e9 * own / whole for whole, own in rounds])


class NoisyClockError(RuntimeError):
    """Repeated runs differ too much to choose by their times."""


def _check_spread(spread: float) -> None:
    """Warn of runs that differ, and refuse such that differ too much.

    Raises:
        NoisyClockError: If they do.
    """
    text = f"repeated runs differ by {spread:.0%} of their median (quartiles, the mean over all that was measured)"
    if spread > SPREAD_REFUSED:
        raise NoisyClockError(
            f"Latency: the clock is too noisy to choose by: {text}. Measure while nothing else runs on this machine, "
            "or keep multiply-adds instead."
        )
    if spread > SPREAD_SAID:
        warnings.warn(
            f"Latency: {text}; times and what is chosen by them are as uncertain. Measure while nothing else runs on "
            "this machine.",
            stacklevel=2,
        )
