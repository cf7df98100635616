"""Pricing: what the layers of a model cost, and the model with all of them dense."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from lr_callback.costs import LayerCost
from lr_callback.find import Found, check_weight, replaceable_in
from lr_callback.folding import Geometry
from lr_callback.layer_types import layer_cost, layer_type, saved_cost
from lr_callback.observe import Observation


def dense_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model with all layers dense; a shared parameter counts once.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name}: it is not initialised yet and cannot be counted; run one batch first.")
    own = sum(parameter.numel() for parameter in model.parameters())
    return own + sum(saved_cost(layer) for layer in replaceable_in(model).values())


def dense_again(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the dense weight's shape of each layer that is left out, factorized, and can be replaced."""
    layers = replaceable_in(model)
    return {name: layer_cost(layer).geometry.weight_shape for name, layer in layers.items() if name in skipped}


def leave_out_unused(found: Found, observation: Observation | None) -> None:
    """Move the layers that a run neither called nor read to the skipped ones; without a run, none."""
    if observation is None:
        return
    for name in list(found.layers):
        if not observation.calls.get(name) and not observation.reads.get(name):
            found.skipped[name] = "not used on the example input: neither called, nor its weight read"
            del found.layers[name]


def layer_costs(
    found: Found, observation: Observation | None, skip_zero: bool = True, embeddings: bool = False
) -> dict[str, LayerCost]:
    """Return the cost of each layer; move those without one, without error or not asked for to the skipped ones."""
    costs: dict[str, LayerCost] = {}
    for name, layer in found.layers.items():
        kind = layer_type(layer)
        if kind is not None and kind.only_if_asked is not None and not embeddings:
            found.skipped[name] = kind.only_if_asked
            continue
        calls = None if observation is None else observation.calls.get(name, ())
        zero = check_weight(name, layer)
        reason = zero if skip_zero else None
        if observation is not None:
            reason = observation.why_not(name) or reason
        if reason is not None:
            found.skipped[name] = reason
            continue
        costs[name] = layer_cost(layer, calls)
    return costs


def no_gain(geometry: Geometry) -> str:
    """Return why a layer is skipped that has no candidate."""
    depthwise = geometry.groups == geometry.in_channels > 1
    what = "a depthwise convolution" if depthwise else "too small"
    return f"{what}: no rank costs less than the dense layer"
