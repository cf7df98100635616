"""Measure: the times of all layers of a model, and of what is not in them.

Layers are measured one by one, each with the inputs that it has in a run of the model, in eval mode; the whole model in
the same way. What the whole takes beyond its layers is the rest, which no factorization changes. Layers and model have
their memory from what was freed before: what the system takes to give it anew is not a share of a layer's time, which
is smaller where the layer is, and comes and goes with what else a process has done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
from lr_callback.units.latency.timing import timed
from lr_callback.units.latency.trust import BY_COUNT, SPREAD_SAID, Doubt, Patience, drift, excess, once, told
from lr_callback.units.latency.whole import signature, timed_whole

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
        RuntimeError: If repeated runs differ so much, or times contradict each other so much, that nothing can be told
            from them.
    """
    bench = Bench(any_weight(next(iter(layers.values()))).device)
    room = room_for(call for calls in inputs.values() for call in calls)
    try:
        with torch.no_grad(), reused_memory(room, bench.device):
            taken = bench.patience.rounds(
                lambda: _round(bench, model, layers, inputs, run, wanted, progress),
                lambda found: bool(found.doubts),
                lambda: _forget(bench, model, layers, inputs),
            )
    finally:
        bench.known.save()
    told(taken.doubts, taken.spread, bench.patience.note, BY_COUNT)
    own = min(1.0, taken.share) * taken.whole
    scaled = {name: of.scaled(own / max(1, taken.before)) for name, of in taken.layers.items()}
    return Latencies(round(taken.whole - own), scaled, taken.spread, device_facts(bench.device))


@dataclass(frozen=True)
class _Taken:
    """What was measured of a model, in one round.

    Args:
        layers: name -> times, each measured by itself.
        before: nanoseconds of the layers as they stand, by these times.
        whole: nanoseconds of the model.
        share: of the layers in them, as they stand, measured in turns.
        now: nanoseconds of one run at the end.
        spread: of repeated runs.
        calls: of the layers in a run.
    """

    layers: Mapping[str, LayerTimes]
    before: int
    whole: int
    share: float
    now: int
    spread: float
    calls: int

    @property
    def doubts(self) -> list[Doubt]:
        """Reasons not to trust it."""
        own = self.share * self.whole
        alone = drift("the layers take {} one by one, and {} in turns with the model", self.before, own)
        # One run may be slow by chance, but none is twice as fast as the model is.
        later = drift("the model takes {} at first, and {} at the end", self.whole, min(self.now, self.whole))
        return [one for one in (excess(own, self.whole, self.calls), alone, later) if one.is_one]


def _forget(
    bench: Bench, model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[LayerInput]]
) -> None:
    """Let the time of the model be unknown, and those of its layers which are not what they take now."""
    suspects = [bench.suspects(layer, inputs.get(name, ())) for name, layer in layers.items()]
    bench.forget([signature(bench, model, layers, inputs), *chain(*suspects)])


def _round(
    bench: Bench,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[LayerInput]],
    run: Callable[[], object],
    wanted: Mapping[str, Wanted],
    progress: Progress | None,
) -> _Taken:
    """Measure what is not known."""
    bench.begin()
    found: dict[str, LayerTimes] = {}
    for done, (name, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(done, len(layers), name)
        found[name] = _times(bench, layer, inputs.get(name, ()), wanted.get(name))
    whole, share = timed_whole(bench, model, layers, inputs, run)
    before = sum(_standing(bench, layer, inputs.get(name, ())) for name, layer in layers.items())
    calls = sum(len(inputs.get(name, ())) for name in layers)
    return _Taken(found, before, whole, share, once(run, bench.device), bench.spread, calls)


def check_clock(device: torch.device) -> None:
    """Refuse to measure on a device where that is no use, before anything waits for it.

    Raises:
        ValueError: If there is a file of times of another device in the place of this one's.
        RuntimeError: If repeated runs of one product differ so much that nothing can be told from them.
    """
    Times(device)
    numbers = torch.ones(256, 256, device=device)
    patience = Patience(device)
    time = patience.timing(lambda: timed(lambda: numbers @ numbers, device), lambda found: found.spread <= SPREAD_SAID)
    told([], time.spread, patience.note, BY_COUNT)


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
