"""Timed forms: what the forms of each factorized layer take, and the whole model in each way to run it, measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lr_callback.common.example import Example
from lr_callback.edits.surgery import standing_in
from lr_callback.layers import FactorizedLayer
from lr_callback.tuning.forms import forms_of, in_form
from lr_callback.tuning.pointwise import make_pointwise
from lr_callback.tuning.tuned import AS_BUILT, CHANNELS_LAST, POINTWISE, TUNED, LayerForms, is_faster
from lr_callback.units.latency import Bench, Doubt, LayerInput, Progress, Timing, compared, drift, excess, timed, told

_SECONDS = 1.0
"""How long the whole model is timed at most, where its runs differ."""

Found = tuple[dict[str, LayerForms], dict[str, Timing], list[Doubt]]
"""Times of the forms of layers, of the whole model, and reasons not to trust them."""


def timed_forms(
    model: nn.Module,
    place: str,
    example: Example,
    layers: Mapping[str, FactorizedLayer],
    inputs: Mapping[str, tuple[LayerInput, ...]],
    device: torch.device,
    progress: Progress | None,
) -> tuple[dict[str, LayerForms], dict[str, Timing]]:
    """Time the forms of layers, and the whole model as it is, with those that are faster, and in other ways.

    Args:
        model: as it is built.
        place: name of the module in it that is called.
        example: that it is called with.
        layers: name -> those to time.
        inputs: name -> of its calls in a run.
        device: that they are on.
        progress: told of each layer.

    Raises:
        NoisyClockError: If times differ too much, or contradict each other too much, to choose by them.
    """
    bench = Bench(device)

    def forget() -> None:
        bench.forget([name for of, layer in layers.items() for name in bench.suspects(layer, inputs[of])])

    def take() -> Found:
        bench.begin()
        forms = _timed_layers(bench, layers, inputs, progress)
        chosen = {layers[name]: of.chosen for name, of in forms.items()}
        whole, doubt = _timed_whole(bench, model, place, example, chosen)
        own = sum(of.times[AS_BUILT].nanoseconds for of in forms.values())
        calls = sum(len(inputs[name]) for name in forms)
        doubts = [excess(own, whole[AS_BUILT].nanoseconds, calls), doubt]
        return forms, whole, [one for one in doubts if one.is_one]

    try:
        found, whole, doubts = bench.patience.rounds(take, lambda one: bool(one[-1]), forget)
    finally:
        bench.known.save()
    told(doubts, bench.spread, bench.patience.note)
    return found, whole


def _timed_layers(
    bench: Bench,
    layers: Mapping[str, FactorizedLayer],
    inputs: Mapping[str, tuple[LayerInput, ...]],
    progress: Progress | None,
) -> dict[str, LayerForms]:
    found = {}
    for done, (name, layer) in enumerate(layers.items()):
        if progress is not None:
            progress(done, len(layers), name)
        times = {form: bench.timing(layer, inputs[name], made) for form, made in forms_of(layer).items()}
        found[name] = LayerForms(*layer.structure, times)
    return found


def _timed_whole(
    bench: Bench, model: nn.Module, place: str, example: Example, chosen: Mapping[FactorizedLayer, str]
) -> tuple[dict[str, Timing], Doubt]:
    """Time the model as it is, with the chosen forms, and so in each other way that makes a difference to it."""

    def time(example: Example = example) -> Timing:
        run = partial(example.call, model.get_submodule(place))
        return bench.note(bench.patience.timing(lambda: timed(run, bench.device, _SECONDS), bench.known.keeps))

    times = {AS_BUILT: time()}
    instead: dict[nn.Module, nn.Module] = {
        layer: in_form(layer, form) for layer, form in chosen.items() if form != AS_BUILT
    }
    if instead:
        with standing_in(model, instead):
            times[TUNED] = time()
        if is_faster(times[AS_BUILT], times[TUNED]):
            instead = {}
    if _is_to_lay_out(model):
        with standing_in(model, instead), ExitStack() as undo:
            lay_out(model, undo)
            times[CHANNELS_LAST] = time(_laid_out(example))
    with standing_in(model, instead), ExitStack() as undo:
        if make_pointwise(model, undo):
            times[POINTWISE] = time()
    first = then = times[AS_BUILT]
    if any(is_faster(one, first) for one in times.values()):
        then = time()
        times[AS_BUILT] = _of_both(first, then)
    return times, drift("the model as built takes {} at first, and {} at the end", first.nanoseconds, then.nanoseconds)


def _of_both(first: Timing, then: Timing) -> Timing:
    """Return the shorter of two times of the same, as uncertain as the two differ: others are faster than either."""
    shorter, longer = sorted((first.nanoseconds, then.nanoseconds))
    return Timing(shorter, max(first.spread, then.spread, compared(longer, shorter)))


def _is_to_lay_out(model: nn.Module) -> bool:
    """Return whether a model has convolutions of images whose weights are in another memory format."""
    convolutions = (one for one in model.modules() if isinstance(one, (nn.Conv2d, nn.ConvTranspose2d)))
    return any(not one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)


def lay_out(model: nn.Module, undo: ExitStack) -> None:
    """Give weights of four axes the memory format; what undoes it goes on the stack, and gives back the very memory."""
    for value in [*model.parameters(), *model.buffers()]:
        if value.dim() == 4 and value.layout == torch.strided:
            undo.callback(setattr, value, "data", value.data)
            value.data = value.data.contiguous(memory_format=torch.channels_last)


def _laid_out(example: Example) -> Example:
    def converted(leaf: object) -> object:
        is_image = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.layout == torch.strided
        return leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and is_image else leaf

    return Example(*tree_map(converted, (example.arguments, example.named)))
