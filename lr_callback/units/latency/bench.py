"""Bench: the forms of layers, built and timed one by one, each once for a device.

A machine that others use is slower at times. So each form takes turns with the dense layer, and what it takes is told
as the median share of that, times what the dense layer took at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn

from lr_callback.layers import FactorizedLayer, any_weight, channels_last, dense_bias
from lr_callback.layers.layer_types import build_form, layer_type
from lr_callback.units.latency.files import Times
from lr_callback.units.latency.inputs import LayerInput, dtype_name
from lr_callback.units.latency.timing import Stopwatch, Timing, timed, timed_beside
from lr_callback.units.latency.trust import Patience, drift

_LOOKS = 3
"""Runs of a layer, the fastest of which is compared with what it was said to take."""

Form = tuple[str, int, int] | None
"""Folding, number of slices and rank of a factorized layer; None: the dense one."""


def form_of(layer: nn.Module) -> Form:
    """Return the form that a layer has."""
    return layer.structure if isinstance(layer, FactorizedLayer) else None


class Bench:
    """Where the forms of layers are timed.

    Args:
        device: that they are on.

    Attributes:
        known: the times of this device, those of earlier runs among them.
        patience: with which times are taken that are not known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.known, self.patience = device, Times(device), Patience(device)
        self._weighted = self._total = 0.0
        self._dense_watch: tuple[str, Stopwatch] | None = None

    @property
    def spread(self) -> float:
        """Mean spread of the times that were asked for, weighted by time."""
        return self._weighted / self._total if self._total else 0.0

    def name(self, layer: nn.Module, call: LayerInput) -> str:
        """Return what the time of a layer depends on, dense and factorized alike, as text."""
        kind, weight = layer_type(layer), any_weight(layer)
        assert kind is not None
        facts = [f"{name}={getattr(layer, name)}" for name in kind.attributes]
        facts += [f"bias={dense_bias(layer) is not None}", dtype_name(weight.dtype)]
        held = layer.factors if isinstance(layer, FactorizedLayer) else (weight,)
        facts += ["channels_last"] if channels_last(held) is not None else []
        return f"{kind.__name__}({', '.join(facts)}) | {call}"

    def timing(self, layer: nn.Module, calls: Sequence[LayerInput], form: Form) -> Timing:
        """Return what a form of a layer takes in all of its calls, one at least."""
        found = [self._timing(layer, call, form) for call in calls]
        total = sum(one.nanoseconds for one in found)
        return Timing(total, sum(one.spread * one.nanoseconds for one in found) / total)

    def time(self, layer: nn.Module, call: LayerInput, form: Form) -> int:
        """Return the nanoseconds of one form of a layer, with an input; measured if it is not known."""
        return self._timing(layer, call, form).nanoseconds

    def _timing(self, layer: nn.Module, call: LayerInput, form: Form) -> Timing:
        name, text = self.name(layer, call), "dense" if form is None else "/".join(map(str, form))
        timing = self.known.get(name, text)
        if timing is None:
            take = partial(self._dense, layer, call) if form is None else partial(self._beside, name, layer, call, form)
            timing = self.patience.timing(take, self.known.keeps)
            self.known.put(name, text, timing)
        return self.note(timing)

    def note(self, timing: Timing) -> Timing:
        """Let a time count in the spread."""
        self._weighted += timing.spread * timing.nanoseconds
        self._total += timing.nanoseconds
        return timing

    def stopwatch(self, layer: nn.Module, call: LayerInput, form: Form) -> Stopwatch:
        """Return what times a form of a layer, now."""
        return Stopwatch(self._run(layer, call, form), self.device)

    def _dense(self, layer: nn.Module, call: LayerInput) -> Timing:
        return timed(self._run(layer, call, None), self.device)

    def forget(self, names: Sequence[str]) -> None:
        """Let the times of some layers be unknown."""
        self._dense_watch = None
        for name in names:
            self.known.forget(name)

    def begin(self) -> None:
        """Let only what is asked for from now on count in the spread."""
        self._weighted = self._total = 0.0
        self.patience.wait = 0

    def suspects(self, layer: nn.Module, calls: Iterable[LayerInput]) -> list[str]:
        """Return the names of a layer's times that are of another machine than this one now, so to speak."""
        found = []
        for call in calls:
            watch = self.stopwatch(layer, call, form_of(layer))
            now = min(watch.block() for _ in range(_LOOKS))
            if drift("", self.time(layer, call, form_of(layer)), now).is_one:
                found.append(self.name(layer, call))
        return found

    def _beside(self, name: str, layer: nn.Module, call: LayerInput, form: Form) -> Timing:
        first = self.time(layer, call, None)
        if self._dense_watch is None or self._dense_watch[0] != name:
            self._dense_watch = name, self.stopwatch(layer, call, None)
        share = timed_beside(self._run(layer, call, form), self._dense_watch[1], self.device)
        return Timing(max(1, round(share.nanoseconds * first / 1e9)), share.spread)

    def _run(self, layer: nn.Module, call: LayerInput, form: Form) -> Callable[[], object]:
        """Return a call of a form of a layer, its weights and its input made up: no time depends on them."""
        made, given = _built(layer, form), call.made(any_weight(layer).device, int(getattr(layer, "num_embeddings", 1)))

        def run() -> object:
            with torch.autocast(self.device.type, dtype=call.autocast, enabled=call.autocast is not None):
                return made(given)

        return run


def _built(layer: nn.Module, form: Form) -> nn.Module:
    with torch.inference_mode(False):
        if form is not None:
            made: nn.Module = build_form(layer, *form)
        else:
            # A dense layer is made anew, too, without the user's hooks: any form of it knows how.
            any_form = layer if isinstance(layer, FactorizedLayer) else build_form(layer, "kernel_in_encoder", 1, 1)
            made = any_form.dense_skeleton()
    for parameter in made.parameters():
        parameter.requires_grad_(False).fill_(0.01)
    return made.eval()
