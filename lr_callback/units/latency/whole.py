"""Whole: the time of a whole model, and the share that its layers have in it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lr_callback.units.latency.bench import Bench, form_of
from lr_callback.units.latency.inputs import LayerInput
from lr_callback.units.latency.timing import Stopwatch, Timing, of_runs

_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 50, 1.0
_WHOLE, _SHARE = "whole", "share of the layers"

Counts = Mapping[tuple[str, str, LayerInput], int]
"""Name of a layer's times, the layer's own and its input -> how often it is called so in a run."""


def timed_whole(
    bench: Bench,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[LayerInput]],
    run: Callable[[], object],
) -> tuple[int, float]:
    """Return the nanoseconds of the model, and which share of that its layers take as they stand.

    Known from an earlier run, if that was of a model of the same class whose parts have the same names and settings,
    and whose layers were called alike.

    Args:
        bench: where its layers are timed.
        model: as it stands.
        layers: name -> those of whose times it is made, and a rest.
        inputs: name -> of its calls in a run.
        run: calls the model.
    """
    name = signature(bench, model, layers, inputs)
    whole, share = (bench.known.get(name, form) for form in (_WHOLE, _SHARE))
    if whole is None or share is None:
        whole, share = _undisturbed(bench, layers, _counts(bench, layers, inputs), run)
        bench.known.put(name, _WHOLE, whole)
        bench.known.put(name, _SHARE, share)
    bench.note(Timing(whole.nanoseconds, share.spread))
    return whole.nanoseconds, share.nanoseconds / 1e9


def signature(
    bench: Bench, model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[LayerInput]]
) -> str:
    """Return what the time of a model depends on, as text; for the arguments see :func:`timed_whole`."""
    counts = _counts(bench, layers, inputs)
    forms = [f"{text} as {form_of(layers[name])}: {count}" for (text, name, _), count in counts.items()]
    described = "\n".join([*forms, type(model).__module__, type(model).__qualname__, repr(model)])
    return f"model {hashlib.sha256(described.encode()).hexdigest()}"


def _counts(bench: Bench, layers: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[LayerInput]]) -> Counts:
    return Counter((bench.name(layer, call), name, call) for name, layer in layers.items() for call in inputs[name])


def _undisturbed(
    bench: Bench, layers: Mapping[str, nn.Module], counts: Counts, run: Callable[[], object]
) -> tuple[Timing, Timing]:
    """Return what :func:`_in_turns` does; the share is what decides, so that it is what is to be steady."""
    taken: dict[int, tuple[Timing, Timing]] = {}

    def take() -> Timing:
        whole, share = _in_turns(bench, layers, counts, run)
        taken[whole.nanoseconds] = whole, share
        return Timing(whole.nanoseconds, share.spread)

    best = bench.patience.timing(take, bench.known.keeps)
    whole, share = taken[best.nanoseconds]
    return Timing(whole.nanoseconds, max(whole.spread, best.spread)), Timing(share.nanoseconds, best.spread)


def _in_turns(
    bench: Bench, layers: Mapping[str, nn.Module], counts: Counts, run: Callable[[], object]
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
