"""Surgery: replace layers inside a model, in place, all or nothing.

Everything that can fail (checks, decompositions, memory) is done before the first module is replaced; the swap itself
is a short block that is undone if anything interrupts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lr_callback.allocation import Allocation, Factorization
from lr_callback.find import find_layers
from lr_callback.folding import Geometry, fold, unfold_decoder, unfold_encoder
from lr_callback.layer_types import layer_type
from lr_callback.layers import FactorizedLayer, dense_bias, dense_weight, weight_of
from lr_callback.optimizers import Replacements, replace_parameters
from lr_callback.parallel import Workers, workers
from lr_callback.spectrum import truncate

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class SurgeryReport:
    """What a surgery did.

    Args:
        factorized: names of the layers that are now factorized in a new way.
        densified: names of the layers that are dense again.
        unchanged: names of the layers that already were as asked.
        parameters_before: of the whole model.
        parameters_after: of the whole model.
        replacements: old parameter -> the new ones in its place.
    """

    factorized: tuple[str, ...]
    densified: tuple[str, ...]
    unchanged: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    replacements: Replacements = field(repr=False, default_factory=dict)


def factorize_(
    model: nn.Module, allocation: Allocation, *, optimizers: Iterable[Optimizer] | Optimizer = ()
) -> SurgeryReport:
    """Carry out an allocation, in place.

    A layer that is factorized otherwise is composed and factorized anew; one that is to be dense is made dense; one
    that already is as asked stays as it is, so that doing it twice is doing it once. The bias stays the same
    parameter; device, dtype, memory format, train/eval mode, ``requires_grad`` and forward hooks are taken over.

    Args:
        model: whose layers are replaced.
        allocation: from :func:`~lr_callback.analysis.allocate` on this model, or one with the same layers.
        optimizers: edited in place: the factors join the group of their weight, state of other parameters stays.

    Returns:
        What was done.

    Raises:
        TypeError: If ``allocation`` is not an :class:`~lr_callback.allocation.Allocation`.
        ValueError: If the model lacks a layer of the allocation, or has it with another shape. Nothing was changed.

    Example::

        >>> from lr_callback.analysis import allocate
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> sum(p.numel() for p in model.parameters()) == report.parameters_after <= 2405
        True
    """
    targets = check_allocation(model, allocation)
    with workers() as crew:
        made = {name: _rebuild(layer, allocation.layers[name], crew) for name, layer in targets.items()}
    return replace_layers(model, {name: layer for name, layer in made.items() if layer is not None}, optimizers)


def densify_(model: nn.Module, *, optimizers: Iterable[Optimizer] | Optimizer = ()) -> SurgeryReport:
    """Multiply the factors of every factorized layer back, in place.

    Args:
        model: whose layers are replaced.
        optimizers: edited in place.

    Returns:
        What was done.

    Raises:
        ValueError: If the model itself is a factorized layer.

    Example::

        >>> from lr_callback.analysis import allocate
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = factorize_(model, allocate(model, keep_ratio=0.5))
        >>> densify_(model).densified
        ('0',)
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)}
    if "" in layers:
        raise ValueError("`model` is a factorized layer itself, not one that holds it; take `model.to_dense()`.")
    return replace_layers(model, {name: _densified(layer) for name, layer in layers.items()}, optimizers)


def check_allocation(model: nn.Module, allocation: Allocation) -> dict[str, nn.Module]:
    """Return the layers of the model that an allocation names.

    Raises:
        TypeError: If it is not an allocation.
        ValueError: If one is missing, cannot be factorized, has another shape, or its slices do not divide it.
    """
    if not isinstance(allocation, Allocation):
        raise TypeError(f"`allocation` must be an Allocation, got {type(allocation).__name__}.")
    found = find_layers(model)
    missing = [name for name in allocation.layers if name not in found.layers]
    if missing:
        raise ValueError(
            f"The allocation is of another model: it names {_some(missing)}, this model has "
            f"{_some(list(found.layers)) or 'no layer that can be factorized'}. Nothing was changed."
        )
    for name, choice in allocation.layers.items():
        _check_layer(name, found.layers[name], allocation.shapes[name], choice)
    return {name: found.layers[name] for name in allocation.layers}


def _check_layer(name: str, layer: nn.Module, shape: tuple[int, ...], choice: Factorization | None) -> None:
    kind = layer_type(layer)
    assert kind is not None
    geometry = kind.geometry(layer)
    if geometry.weight_shape != tuple(shape):
        raise ValueError(
            f"{name}: the allocation is for a weight of shape {tuple(shape)}, this model's is "
            f"{geometry.weight_shape}. Nothing was changed."
        )
    if choice is None:
        return
    if geometry.in_channels % choice.num_slices:
        raise ValueError(
            f"{name}: `num_slices` must divide the {geometry.in_channels} input channels, got {choice.num_slices}. "
            "Nothing was changed."
        )
    full = geometry.full_rank(choice.folding, choice.num_slices)
    if choice.rank > full:
        raise ValueError(
            f"{name}: `rank` must be at most {full}, the smaller side of a slice, got {choice.rank}. "
            "Nothing was changed."
        )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rebuild(layer: nn.Module, choice: Factorization | None, crew: Workers) -> nn.Module | None:
    """Return the layer as chosen, None if it already is."""
    if choice is None:
        return _densified(layer) if isinstance(layer, FactorizedLayer) else None
    if isinstance(layer, FactorizedLayer) and _structure(layer) == (choice.folding, choice.num_slices, choice.rank):
        return None
    made = skeleton(layer, choice)
    encoder, decoder = factors(dense_weight(layer), choice, crew)
    with torch.no_grad():
        made.factors[0].copy_(encoder)
        made.factors[1].copy_(decoder)
    return made


def _structure(layer: FactorizedLayer) -> tuple[str, int, int]:
    return layer.folding, layer.num_slices, layer.rank


def factors(weight: Tensor, choice: Factorization, crew: Workers) -> tuple[Tensor, Tensor]:
    """Return the encoder's and the decoder's weight, float64, of a dense weight."""
    geometry = Geometry(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]))
    left, right = truncate(fold(weight, choice.folding, choice.num_slices), choice.rank, crew)
    return unfold_encoder(right, geometry, choice.folding), unfold_decoder(left, geometry, choice.folding)


def skeleton(layer: nn.Module, choice: Factorization) -> FactorizedLayer:
    """Return the factorized form of a layer with its bias, mode and hooks, but weights that are not set."""
    kind = layer_type(layer)
    assert kind is not None
    with torch.inference_mode(False):
        made = kind.build(layer, choice)
    _take_over(made, made.decoder, layer, made.factors)
    return made


def dense_skeleton(layer: FactorizedLayer) -> nn.Module:
    """Return the dense form of a layer with its bias, mode and hooks, but a weight that is not set."""
    with torch.inference_mode(False):
        made = layer.dense_skeleton()
    _take_over(made, made, layer, (weight_of(made),))
    return made


def _densified(layer: FactorizedLayer) -> nn.Module:
    made = dense_skeleton(layer)
    with torch.no_grad():
        weight_of(made).copy_(layer.weight)
    return made


def _take_over(made: nn.Module, owner: nn.Module, layer: nn.Module, weights: Sequence[nn.Parameter]) -> None:
    """Give a new layer what the old one has besides its weight; the bias stays the same parameter."""
    old = _weights(layer)[0]
    for weight in weights:
        weight.requires_grad_(old.requires_grad)
    owner._parameters["bias"] = dense_bias(layer)
    made.train(layer.training)
    for hooks in _HOOKS:
        # The same dict: handles that users hold still remove their hooks.
        setattr(made, hooks, getattr(layer, hooks))


def replace_layers(
    model: nn.Module, made: Mapping[str, nn.Module], optimizers: Iterable[Optimizer] | Optimizer = ()
) -> SurgeryReport:
    """Swap layers under all of their names, and let optimizers follow; undo both if anything interrupts it."""
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    before = sum(parameter.numel() for parameter in model.parameters())
    old = {name: model.get_submodule(name) for name in made}
    replacements = _replacements(old, made)
    names = _names_of_new(made)
    places = _places(model, {layer: made[name] for name, layer in old.items()})
    undo = replace_parameters(listed, replacements, names)
    try:
        for parent, child, _, new in places:
            parent._modules[child] = new
    except BaseException:
        for parent, child, former, _ in places:
            parent._modules[child] = former
        undo()
        raise
    return SurgeryReport(
        factorized=tuple(name for name, layer in made.items() if isinstance(layer, FactorizedLayer)),
        densified=tuple(name for name, layer in made.items() if not isinstance(layer, FactorizedLayer)),
        unchanged=tuple(
            name for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer) and name not in made
        ),
        parameters_before=before,
        parameters_after=sum(parameter.numel() for parameter in model.parameters()),
        replacements=replacements,
    )


def _places(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """List every place where a layer stands: parent, name of the child, old layer, new layer."""
    return [
        (parent, child, layer, new[layer])
        for parent in model.modules()
        for child, layer in parent._modules.items()
        if layer is not None and layer in new
    ]


def _replacements(old: Mapping[str, nn.Module], made: Mapping[str, nn.Module]) -> Replacements:
    """Pair the old weights with the new: one with two factors, two factors with one weight, or two with two."""
    pairs: dict[nn.Parameter, Sequence[nn.Parameter]] = {}
    for name, layer in old.items():
        before, after = _weights(layer), _weights(made[name])
        if len(before) == len(after):
            pairs.update({one: (other,) for one, other in zip(before, after, strict=True)})
        else:
            pairs.update(dict.fromkeys(before[1:], ()))
            pairs[before[0]] = after
    return pairs


def _weights(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    return layer.factors if isinstance(layer, FactorizedLayer) else (weight_of(layer),)


def _names_of_new(made: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    return {
        parameter: f"{name}.{inner}" for name, layer in made.items() for inner, parameter in layer.named_parameters()
    }
