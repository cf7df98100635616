"""Find: which layers of a model can be factorized, under which names, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import LAYER_TYPES, dense_weight, full_name, layer_type
from lr_callback.model.holders import held_elsewhere, owners_of_parameters, shared_memory
from lr_callback.model.patterns import as_patterns, check_patterns, meant
from lr_callback.model.traps import COMPUTED, around, factor_trap, holds_weight, layer_trap, way_out, weight_trap

ALL_ZERO = "all its weights are zero, there is nothing to measure an error against"
"""Why a layer is left out for now."""


@dataclass(frozen=True)
class Found:
    """What a model has.

    Args:
        layers: name -> dense or factorized layer; a layer with several names stands under its first.
        skipped: name of a layer that is left out -> why.
        able: the names of the layers that can be factorized, those that a user leaves out included, in their order.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    able: list[str] = field(default_factory=list)


def find_layers(
    model: nn.Module, include: Sequence[str] | str | None = None, exclude: Sequence[str] | str | None = None
) -> Found:
    """Find the layers that can be factorized, and the reason for each weight that cannot.

    Args:
        model: is not changed.
        include: patterns of layers (:mod:`lr_callback.model.patterns`); only these are factorized. None: all.
        exclude: patterns of layers that stay dense.

    Raises:
        ValueError: If a pattern matches no layer.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Bilinear(8, 8, 3))
        >>> found = find_layers(model)
        >>> list(found.layers), found.skipped
        (['0'], {'1': 'Bilinear is not among the layer types that are factorized'})
    """
    found = Found()
    holders = _holders(model)
    for name, layer, inside in _weighted(model):
        reason = _refusal(name, layer, inside, holders)
        if reason is None:
            found.layers[name] = layer
        else:
            found.skipped[name] = reason
    found.able.extend(found.layers)
    check_patterns(include=include, exclude=exclude)
    _select(model, found, as_patterns(include), as_patterns(exclude))
    return found


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the layers with a weight of their own: name, layer, why nothing around it lets it be replaced."""
    inside = insides(model)
    hidden: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if layer in hidden:
            continue
        parts = _parts(layer)
        hidden |= parts
        own = any(parameter is not None and _is_matrix(parameter) for parameter in layer._parameters.values())
        if parts or own or holds_weight(layer):
            yield name, layer, inside.get(layer)


def insides(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that something around them keeps in place, under whichever of their names, and why.

    Example::

        >>> insides(nn.Sequential(nn.Linear(4, 4)))
        {}
    """
    inside: dict[nn.Module, str] = {}
    for module in model.modules():
        reason = None if module in inside else around(module)
        if reason is not None:
            for part in module.modules():
                if part is not module:
                    inside.setdefault(part, reason)
    return inside


def _parts(layer: nn.Module) -> set[nn.Module]:
    """Return the modules inside a layer that are no layers of their own: factors, and what computes a weight."""
    if isinstance(layer, FactorizedLayer):
        return set(layer.modules())
    if is_parametrized(layer):
        computing = layer.parametrizations
        assert isinstance(computing, nn.Module)
        return set(computing.modules())
    return set()


def _is_matrix(parameter: nn.Parameter) -> bool:
    return is_lazy(parameter) or parameter.dim() >= 2


@dataclass(frozen=True)
class _Holders:
    """Who has hold of the parameters and layers of a model, by their ids."""

    owners: dict[int, list[str]]
    memory: dict[int, list[str]]
    elsewhere: dict[int, str]


def _holders(model: nn.Module) -> _Holders:
    wanted: list[nn.Module | Tensor] = []
    for layer in model.modules():
        if layer_type(layer) is not None:
            weights = [] if (weight := layer._parameters.get("weight")) is None else [weight]
            wanted += [layer, *weights]
    return _Holders(owners_of_parameters(model), shared_memory(model), held_elsewhere(model, wanted))


def _refusal(name: str, layer: nn.Module, inside: str | None, holders: _Holders) -> str | None:
    """Return why a layer cannot be factorized, None if it can."""
    kind = layer_type(layer)
    if inside is not None:
        return inside
    if any(parameter is not None and is_lazy(parameter) for parameter in layer._parameters.values()):
        return "its weight is not initialised yet; run one batch first"
    if is_parametrized(layer, "weight"):
        return COMPUTED
    if layer._compiled_call_impl is not None or name.rpartition(".")[2] == "_orig_mod":
        return "it is compiled on its own, and would go on being called; compile the module that holds it instead"
    if kind is None:
        return f"{_class_of(layer)} is not among the layer types that are factorized{way_out(layer)}"
    if name == "":
        return "the model itself is this layer, and cannot be replaced in place; put it into an nn.Sequential"
    if isinstance(layer, FactorizedLayer):
        return factor_trap(layer) or _elsewhere(holders, layer)
    weight = layer._parameters.get("weight")
    if weight is None:
        return COMPUTED
    reason = _shared(weight, name, holders) or weight_trap(weight) or layer_trap(layer)
    reason = reason or _elsewhere(holders, layer, weight) or kind.refusal(layer)
    if reason is None and prod(kind.geometry(layer).weight_shape) != weight.numel():
        return f"its weight is of shape {tuple(weight.shape)}, which is not what its sizes say"
    return reason


def _class_of(layer: nn.Module) -> str:
    """Name the class of a layer; in full where a known type has the same name."""
    kind = type(layer)
    is_namesake = any(kind.__name__ == known.rpartition(".")[2] for known in LAYER_TYPES)
    return full_name(kind) if is_namesake else kind.__name__


def _shared(weight: nn.Parameter, name: str, holders: _Holders) -> str | None:
    others = [other for other in holders.owners[id(weight)] if other != name]
    if others:
        return f"its weight is tied to that of {', '.join(others)}"
    memory = holders.memory.get(id(weight))
    return None if memory is None else f"its weight lies in the same memory as {', '.join(memory)}"


def _elsewhere(holders: _Holders, *held: nn.Module | Tensor) -> str | None:
    """Return where a layer or its weight is held besides its place in the model."""
    places = [holders.elsewhere[id(one)] for one in held if id(one) in holders.elsewhere]
    if not places:
        return None
    return f"held by {places[0]} too, which would keep the layer as it is now; hold layers as submodules only"


def factorized_in(model: nn.Module) -> list[str]:
    """Return the names of the factorized layers of a model.

    Example::

        >>> factorized_in(nn.Linear(4, 4))
        []
    """
    return [name for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)]


def replaceable_in(model: nn.Module) -> dict[str, FactorizedLayer]:
    """Return the factorized layers of a model that can be replaced, under their names.

    Example::

        >>> replaceable_in(nn.Linear(4, 4))
        {}
    """
    if not factorized_in(model):  # most models have none, and to look at what holds their layers takes much longer
        return {}
    return {name: layer for name, layer in find_layers(model).layers.items() if isinstance(layer, FactorizedLayer)}


def _select(model: nn.Module, found: Found, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> None:
    """Move the layers that the user leaves out to the skipped ones."""
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in [*found.layers, *found.skipped]}
    named: dict[str, set[str]] = {"include": set(), "exclude": set()}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            names = meant(pattern, layers, found.able)
            if not names:
                raise ValueError(no_match(argument, pattern, layers))
            named[argument] |= names
    for name in found.able:
        if include is not None and name not in named["include"]:
            found.skipped[name] = "not among `include`"
        elif name in named["exclude"]:
            found.skipped[name] = "named by `exclude`"
        if name in found.skipped:
            del found.layers[name]


def no_match(argument: str, pattern: str, layers: Mapping[str, nn.Module]) -> str:
    """Return what is wrong with a pattern that matches no layer."""
    what = "type" if pattern.startswith("type:") else "name"
    kinds = dict.fromkeys(type(layer).__name__ for layer in layers.values())
    known = ", ".join(kinds if what == "type" else layers) or "(the model has no layers with a weight)"
    return f"`{argument}`: each pattern must match a layer's {what}, {pattern!r} matches none of: {known}."


def check_weight(name: str, layer: nn.Module) -> str | None:
    """Refuse a weight that is not finite; return why an all-zero one is skipped, None if it is neither.

    Raises:
        ValueError: If the weight has NaN or infinity.
    """
    weight = dense_weight(layer)
    least, most = torch.stack(weight.aminmax()).tolist()  # one pass, one transfer; NaN if there is one
    if not (isfinite(least) and isfinite(most)):
        broken = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"{name}: every weight must be finite, found {broken} of {weight.numel()} NaN or infinite; "
            "the training has diverged or the file is damaged. Go back to an earlier checkpoint, or exclude the layer."
        )
    return ALL_ZERO if least == most == 0 else None
