"""Tuning: the layers of a compressed model in the forms that are fastest on a device, measured.

A factorized layer computes the same in several forms (:mod:`lr_callback.tuning.forms`), and which is fastest depends on
the device, the dtype and the size of the batch. It is for a model whose training is over: in one block what is zero
would be trained, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from lr_callback.common.example import Example
from lr_callback.common.table import listed, on_one_line
from lr_callback.common.untouched import as_written, untouched
from lr_callback.edits.surgery import SurgeryReport, replace_layers
from lr_callback.files.values import check_has_values
from lr_callback.layers import FactorizedLayer, any_weight
from lr_callback.model.find import factorized_in, find_layers
from lr_callback.model.observe import observe_inputs
from lr_callback.tuning.forms import in_form
from lr_callback.tuning.pointwise import make_pointwise
from lr_callback.tuning.timed_forms import lay_out, timed_forms
from lr_callback.tuning.tuned import AS_BUILT, Tuning
from lr_callback.units.latency import LayerInput, Progress, device_facts


def tune(
    model: nn.Module, example_input: object, *, called: nn.Module | None = None, progress: Progress | None = None
) -> Tuning:
    """Measure which form of each factorized layer is fastest, and the whole model with them; change nothing.

    Every layer is timed with inputs like those of its calls in a run, in eval mode, on the device, in the dtype and in
    the memory format that it has; times that the device's file has already are taken from there.

    Args:
        model: has factorized layers, all on one device.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of named ones, of the batch size
            that is to be fast.
        called: the module in the model that is called with it; None: the model itself.
        progress: told of each layer.

    Returns:
        The times, and what is chosen by them, for :func:`tune_`.

    Raises:
        ValueError: If there is no factorized layer, or none that can be replaced or is called, or they are on several
            devices; if there is no example, or the model does not take it.
        RuntimeError: If times differ so much, or contradict each other so much, that nothing can be told from them.

    Example::

        >>> import lr_callback as lrc
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.5))
        >>> tuning = tune(model, torch.zeros(8, 64))
        >>> list(tuning.layers), tuning.inputs, tuning.layers["0"].chosen in tuning.layers["0"].times
        (['0'], ('8x64 float32',), True)
    """
    layers, skipped = _tunable(model)
    check_has_values(model, "load its weights first.")
    device, example = _device(layers), Example.of(example_input)
    place = _place(model, model if called is None else called)
    inputs, reasons = _called(model, place, example, layers)
    measured = {name: layer for name, layer in layers.items() if name not in reasons}
    with untouched(model), as_written():
        forms, whole = timed_forms(model, place, example, measured, inputs, device, progress)
    given = tuple(str(LayerInput.of(tensor)) for tensor in example.tensors)
    return Tuning(forms, whole, {**skipped, **reasons}, given, device_facts(device))


def tune_(model: nn.Module, tuning: Tuning, *, channels_last: bool = False, pointwise: bool = False) -> SurgeryReport:
    """Give layers the forms that were found to be faster, in place; done twice it is done once.

    The model computes the same, up to rounding. A state dict or checkpoint of it restores as any other
    (:func:`~lr_callback.restore_`).

    Args:
        model: that was measured, or one of the same layers.
        tuning: from :func:`tune`.
        channels_last: whether weights of four axes get this memory format, too, which no file keeps.
        pointwise: whether Linear layers become convolutions of one pixel, too, which no file keeps either; see
            :func:`~lr_callback.pointwise_`.

    Returns:
        What was done.

    Raises:
        TypeError: If ``tuning`` is no :class:`~lr_callback.Tuning`.
        ValueError: If a layer is missing, or is not as it was measured. Nothing was changed.

    Example::

        >>> import lr_callback as lrc
        >>> from lr_callback.tuning.tuned import LayerForms
        >>> from lr_callback.units.latency import Timing
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = lrc.factorize_(model, lrc.allocate(model, keep_ratio=0.5))
        >>> built = LayerForms("kernel_in_encoder", model[0].num_slices, model[0].rank,
        ...     {"as built": Timing(9, 0.0), "dense": Timing(5, 0.0)})
        >>> whole = {"as built": Timing(9, 0.0), "tuned": Timing(5, 0.0)}
        >>> tune_(model, Tuning({"0": built}, whole)).densified
        ('0',)
    """
    if not isinstance(tuning, Tuning):
        raise TypeError(f"`tuning` must be a Tuning, as `tune` returns it, got {type(tuning).__name__}.")
    made = {name: in_form(layer, tuning.changed[name]) for name, layer in _pending(model, tuning).items()}
    with ExitStack() as undo:
        report = replace_layers(model, made, undo=undo)
        if channels_last:
            lay_out(model, undo)
        if pointwise:
            make_pointwise(model, undo)
        undo.pop_all()
    return report


def _tunable(model: nn.Module) -> tuple[dict[str, FactorizedLayer], dict[str, str]]:
    """Return the factorized layers that can be replaced, and why others cannot.

    Raises:
        ValueError: If there is none that can.
    """
    named = factorized_in(model)
    if not named:
        raise ValueError(
            f"`model`: must have a factorized layer, found none in {type(model).__name__}. Compress it first, or "
            "restore the weights of a compressed one into it."
        )
    found = find_layers(model)
    layers = {name: layer for name, layer in found.layers.items() if isinstance(layer, FactorizedLayer)}
    skipped = {name: reason for name, reason in found.skipped.items() if name in named}
    if not layers:
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"`model`: must have a factorized layer that can be replaced, found none; {name or 'the model'}: {reason}."
        )
    return layers, skipped


def _device(layers: Mapping[str, nn.Module]) -> torch.device:
    devices = {str(any_weight(layer).device): name for name, layer in layers.items()}
    if len(devices) > 1:
        told = listed([f"{name} on {device}" for device, name in devices.items()])
        raise ValueError(f"`model`: its factorized layers must be on one device, found {told}; move the model to one.")
    return torch.device(next(iter(devices)))


def _place(model: nn.Module, called: nn.Module) -> str:
    """Return the name of the module that is called: what stands in its place may be another while it is timed."""
    names: list[str] = [name for name, module in model.named_modules() if module is called]
    if names:
        return names[0]
    raise ValueError(f"`called`: must be a module of {type(model).__name__}, found another {type(called).__name__}.")


def _called(
    model: nn.Module, place: str, example: Example, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, tuple[LayerInput, ...]], dict[str, str]]:
    """Return with what inputs layers are called in a run, and why some cannot be told by that.

    Raises:
        ValueError: If the model does not take the example, or calls no factorized layer.
    """
    run = partial(example.call, model.get_submodule(place))
    try:
        seen, inputs = observe_inputs(model, run)
    except Exception as error:  # whatever the model raises
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in example.tensors)
        raise ValueError(
            f"`example_input`: {type(model.get_submodule(place)).__name__} must take it, found that inputs of shape "
            f"{shapes} make a {type(error).__name__}: {on_one_line(error)}; give a batch as the model "
            "is called with."
        ) from error
    reasons = {name: reason for name in layers if (reason := seen.why_not(name)) is not None}
    if len(reasons) == len(layers):
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"`example_input`: the run must call a factorized layer, found none; {name}: {reason}.")
    return inputs, reasons


def _pending(model: nn.Module, tuning: Tuning) -> dict[str, FactorizedLayer]:
    """Return the layers that are not yet in their chosen form.

    Raises:
        ValueError: If one is neither in that form nor as it was measured.
    """
    layers, pending = find_layers(model).layers, {}
    for name, form in tuning.changed.items():
        layer, of = layers.get(name), tuning.layers[name]
        now = (layer.num_slices, layer.rank) if isinstance(layer, FactorizedLayer) else None
        if layer is not None and now == of.structure(form):
            continue
        if not isinstance(layer, FactorizedLayer) or now != of.structure(AS_BUILT):
            raise ValueError(
                f"{name}: must be as it was measured, of {of.num_slices} slices and rank {of.rank}, found "
                f"{'no layer that can be replaced' if layer is None else _told(now)}; measure this model with "
                "`tune`. Nothing was changed."
            )
        pending[name] = layer
    return pending


def _told(structure: tuple[int, int] | None) -> str:
    return "a dense one" if structure is None else f"one of {structure[0]} slices and rank {structure[1]}"
