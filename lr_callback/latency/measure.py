"""Measure: the times of all layers of a model, and of what is not in them.

Layers are measured one by one, each with the inputs that it has in a run of the model, in eval mode; the whole model in
the same way. What the whole takes beyond its layers is the rest, which no factorization changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lr_callback.factorization import Factorization
from lr_callback.latency.curves import Curve, Key, LayerTimes, measured_curve
from lr_callback.latency.files import Times, device_facts
from lr_callback.latency.inputs import LayerInput
from lr_callback.latency.timing import Timing, timed
from lr_callback.layer_types import build, layer_cost, layer_type
from lr_callback.layers import FactorizedLayer, any_weight, dense_bias
from lr_callback.methods import Method
from lr_callback.written import check_fields

SPREAD_SAID, SPREAD_REFUSED = 0.15, 0.6
"""Spread of repeated runs that is warned of, and that is too much to decide by."""

Progress = Callable[[int, int, str], None]
"""Called before each layer with the number done, the number of all, and its name."""


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

    @property
    def misfit(self) -> float:
        """Largest relative difference of a time that was interpolated and then measured."""
        return max((one.misfit for layer in self.layers.values() for one in layer.curves.values()), default=0.0)

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
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[LayerInput]],
    run: Callable[[], object],
    method: Method,
    progress: Progress | None = None,
) -> Latencies:
    """Measure the layers of a model, and the model.

    Args:
        layers: name -> dense or factorized layer; all on one device.
        inputs: name -> of its calls in a run.
        run: of the model, as it stands.
        method: whose foldings and numbers of slices are measured.
        progress: told of each layer.

    Raises:
        ValueError: If there is a file of times of another device in the place of this one's.
        RuntimeError: If repeated runs differ so much that nothing can be told from them.
    """
    device = any_weight(next(iter(layers.values()))).device
    bench = Bench(device)
    found, now = {}, 0
    with torch.no_grad():
        for done, (name, layer) in enumerate(layers.items()):
            if progress is not None:
                progress(done, len(layers), name)
            calls = inputs.get(name, ())
            found[name] = bench.times(layer, calls, method)
            now += bench.standing(layer, calls)
        whole = bench.noted(timed(run, device, seconds=2.0))
    bench.known.save()
    _check_spread(bench.spread)
    return Latencies(max(0, whole.nanoseconds - now), found, bench.spread, device_facts(device))


class Bench:
    """Where the forms of layers are built and timed, each once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, Times(device)
        self._weighted = self._total = 0.0

    @property
    def spread(self) -> float:
        """Mean spread of what was measured, weighted by time."""
        return self._weighted / self._total if self._total else 0.0

    def noted(self, timing: Timing) -> Timing:
        """Count a time in the spread."""
        self._weighted += timing.spread * timing.nanoseconds
        self._total += timing.nanoseconds
        return timing

    def standing(self, layer: nn.Module, calls: Sequence[LayerInput]) -> int:
        """Return what a layer takes as it is."""
        form = (layer.folding, layer.num_slices, layer.rank) if isinstance(layer, FactorizedLayer) else None
        return sum(self._time(layer, call, form) for call in calls)

    def times(self, layer: nn.Module, calls: Sequence[LayerInput], method: Method) -> LayerTimes:
        """Return what a layer takes in all of its calls, dense and in each form that a method may choose."""
        dense = sum(self._time(layer, call, None) for call in calls)
        cost = layer_cost(layer)
        curves: dict[Key, Curve] = {}
        if not calls:
            return LayerTimes(dense)
        for folding in cost.distinct_foldings(method.foldings):
            for count in method.slice_counts(cost.geometry):
                found = self._curve(layer, calls, (folding, count), dense)
                if found is not None:
                    curves[folding, count] = found
        return LayerTimes(dense, curves)

    def _curve(self, layer: nn.Module, calls: Sequence[LayerInput], key: Key, dense: int) -> Curve | None:
        # A form with as many parameters as the dense layer has as much to read and, two calls being slower than one,
        # more to do: it is not faster.
        last = layer_cost(layer).last_rank(*key)
        if last < 1:
            return None

        def time(rank: int) -> int:
            return sum(self._time(layer, call, (*key, rank)) for call in calls)

        return measured_curve(time, last, dense, key[1] * layer_cost(layer).geometry.groups)

    def timing(self, layer: nn.Module, calls: Sequence[LayerInput], form: tuple[str, int, int] | None) -> Timing:
        """Return what a form of a layer takes in all of its calls; None: dense."""
        found = [self._timing(layer, call, form) for call in calls]
        total = sum(one.nanoseconds for one in found)
        return Timing(total, sum(one.spread * one.nanoseconds for one in found) / total)

    def _time(self, layer: nn.Module, call: LayerInput, form: tuple[str, int, int] | None) -> int:
        return self._timing(layer, call, form).nanoseconds

    def _timing(self, layer: nn.Module, call: LayerInput, form: tuple[str, int, int] | None) -> Timing:
        named, text = f"{_described(layer)} | {call}", "dense" if form is None else "/".join(map(str, form))
        timing = self.known.get(named, text)
        if timing is None:
            timing = self._measured(layer, call, form)
            self.known.put(named, text, timing)
        return self.noted(timing)

    def _measured(self, layer: nn.Module, call: LayerInput, form: tuple[str, int, int] | None) -> Timing:
        made = _built(layer, form)
        given = call.made(self.device, int(getattr(layer, "num_embeddings", 1)))
        with torch.autocast(self.device.type, dtype=call.autocast, enabled=call.autocast is not None):
            return timed(lambda: made(given), self.device)


def _built(layer: nn.Module, form: tuple[str, int, int] | None) -> nn.Module:
    """Return a form of a layer on its device, its weights made up: no time depends on them."""
    with torch.inference_mode(False):
        if form is not None:
            folding, count, rank = form
            made: nn.Module = build(layer, Factorization(folding, count, rank, 0.0, 0, 0))
        else:
            made = (layer if isinstance(layer, FactorizedLayer) else _as_factorized(layer)).dense_skeleton()
    for parameter in made.parameters():
        parameter.requires_grad_(False).fill_(0.01)
    return made.eval()


def _as_factorized(layer: nn.Module) -> FactorizedLayer:
    return build(layer, Factorization("kernel_in_encoder", 1, 1, 0.0, 0, 0))


def _described(layer: nn.Module) -> str:
    """Return what the time of a layer depends on, dense or factorized alike."""
    kind, weight = layer_type(layer), any_weight(layer)
    assert kind is not None
    facts = [f"{name}={getattr(layer, name)}" for name in kind.attributes]
    facts += [f"bias={dense_bias(layer) is not None}", str(weight.dtype).removeprefix("torch.")]
    facts += ["channels_last"] if weight.dim() == 4 and _is_last(layer) else []
    return f"{kind.__name__}({', '.join(facts)})"


def _is_last(layer: nn.Module) -> bool:
    dense = (layer if isinstance(layer, FactorizedLayer) else _as_factorized(layer)).dense_skeleton()
    weight = any_weight(dense)
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _check_spread(spread: float) -> None:
    """Warn of runs that differ, and refuse such that differ too much.

    Raises:
        RuntimeError: If they do.
    """
    text = f"repeated runs differ by {spread:.0%} of their median (quartiles, the mean over all that was measured)"
    if spread > SPREAD_REFUSED:
        raise RuntimeError(
            f"Latency: the clock is too noisy to choose by: {text}. Measure while nothing else runs on this machine, "
            "or keep multiply-adds instead."
        )
    if spread > SPREAD_SAID:
        warnings.warn(
            f"Latency: {text}; times and what is chosen by them are as uncertain. Measure while nothing else runs on "
            "this machine.",
            stacklevel=2,
        )
