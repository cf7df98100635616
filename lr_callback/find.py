"""Find: which layers of a model can be factorized, under which names, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lr_callback.layer_types import dense_weight, layer_type
from lr_callback.layers import FactorizedLayer
from lr_callback.table import readable

_COMPUTED = "its weight is computed from other parameters (weight_norm, pruning or another parametrization)"


@dataclass(frozen=True)
class Found:
    """What a model has.

    Args:
        layers: name -> dense or factorized layer; a layer with several names stands under its first.
        skipped: name of a layer that is left out -> why.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def find_layers(
    model: nn.Module, include: Sequence[str] | str | None = None, exclude: Sequence[str] | str | None = None
) -> Found:
    """Find the layers that can be factorized, and the reason for each weight that cannot.

    Args:
        model: is not changed.
        include: glob patterns of layer names; only these are factorized. None: all.
        exclude: glob patterns of layer names that stay dense.

    Raises:
        ValueError: If a pattern matches no layer.

    Example::

        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Bilinear(8, 8, 3))
        >>> found = find_layers(model)
        >>> list(found.layers), found.skipped
        (['0'], {'1': 'Bilinear is not among the layer types that are factorized'})
    """
    found = Found()
    owners = _parameter_owners(model)
    for name, layer, inside in _weighted(model):
        reason = _refusal(name, layer, inside, owners)
        if reason is None:
            found.layers[name] = layer
        else:
            found.skipped[name] = reason
    check_patterns(include=include, exclude=exclude)
    _select(found, _patterns(include), _patterns(exclude))
    return found


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield the layers with a weight of their own: name, layer, the attention module that it belongs to."""
    attention: nn.Module | None = None
    prefix = ""
    hidden: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if attention is not None and not name.startswith(prefix):
            attention = None
        if isinstance(layer, nn.MultiheadAttention):
            attention, prefix = layer, f"{name}." if name else ""
        if layer in hidden:
            continue
        parts = _parts(layer)
        hidden |= parts
        if parts or any(parameter is not None and _is_matrix(parameter) for parameter in layer._parameters.values()):
            yield name, layer, attention


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


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, for the id of each parameter, the names of the different modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _refusal(name: str, layer: nn.Module, attention: nn.Module | None, owners: dict[int, list[str]]) -> str | None:
    """Return why a layer cannot be factorized, None if it can."""
    kind = layer_type(layer)
    if attention is not None and layer is not attention:
        return "read directly by nn.MultiheadAttention"
    if any(parameter is not None and is_lazy(parameter) for parameter in layer._parameters.values()):
        return "its weight is not initialised yet; run one batch first"
    if is_parametrized(layer, "weight"):
        return _COMPUTED
    if layer._compiled_call_impl is not None or name.rpartition(".")[2] == "_orig_mod":
        return "it is compiled on its own, and would go on being called; compile the module that holds it instead"
    if kind is None:
        return f"{type(layer).__name__} is not among the layer types that are factorized"
    if name == "":
        return "the model itself is this layer, and cannot be replaced in place; put it into an nn.Sequential"
    if isinstance(layer, FactorizedLayer):
        return None
    return _weight_refusal(layer, name, owners) or kind.refusal(layer)


def _weight_refusal(layer: nn.Module, name: str, owners: dict[int, list[str]]) -> str | None:
    """Return what is wrong with the weight of a dense layer, None if nothing is."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return _COMPUTED
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"its weight is tied to that of {', '.join(others)}"
    if any(base.__name__ == "DTensor" for base in type(weight).__mro__):  # by name: its module takes long to import
        return "its weight is sharded over processes (DTensor); compress before sharding"
    if weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if not weight.is_floating_point():
        return f"its weight is of dtype {weight.dtype}, not floating point"
    if weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(weight.shape)}"
    return None


def check_patterns(**arguments: object) -> None:
    """Refuse what are no patterns.

    Args:
        arguments: name of an argument -> its value.

    Raises:
        TypeError: If one is neither None, a string, nor a list or tuple of strings.
    """
    for name, value in arguments.items():
        listed = [value] if isinstance(value, str) else value
        if value is not None and not (
            isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)
        ):
            raise TypeError(
                f"`{name}` must be a glob pattern of layer names such as 'layer1.*', or a list of them, got {value!r}."
            )


def factorized_in(model: nn.Module) -> list[str]:
    """Return the names of the factorized layers of a model.

    Example::

        >>> factorized_in(nn.Linear(4, 4))
        []
    """
    return [name for name, layer in model.named_modules() if isinstance(layer, FactorizedLayer)]


def _patterns(patterns: Sequence[str] | str | None) -> tuple[str, ...] | None:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern is for a layer's name, with or without what ``torch.compile`` puts into it."""
    return fnmatchcase(name, pattern) or fnmatchcase(readable(name), pattern)


def _select(found: Found, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> None:
    """Move the layers that the user leaves out to the skipped ones."""
    names = [*found.layers, *found.skipped]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"`{argument}`: each pattern must match a layer's name, {pattern!r} matches none of: "
                    f"{', '.join(names) or '(the model has no layers with a weight)'}."
                )
    for name in list(found.layers):
        if include is not None and not any(_matches(name, pattern) for pattern in include):
            found.skipped[name] = "not among `include`"
        elif any(_matches(name, pattern) for pattern in exclude or ()):
            found.skipped[name] = "named by `exclude`"
        if name in found.skipped:
            del found.layers[name]


def check_weight(name: str, layer: nn.Module) -> str | None:
    """Refuse a weight that is not finite; return why an all-zero one is skipped, None if it is neither.

    Raises:
        ValueError: If the weight has NaN or infinity.
    """
    weight = dense_weight(layer)
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        raise ValueError(
            f"{name}: every weight must be finite, found {broken} of {weight.numel()} NaN or infinite; "
            "the training has diverged or the file is damaged. Go back to an earlier checkpoint, or exclude the layer."
        )
    return "all its weights are zero, there is nothing to measure an error against" if not weight.any() else None
