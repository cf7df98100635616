"""Pricing: what the layers of a model cost, and the model with all of them dense."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from lr_callback.costs import LayerCost
from lr_callback.find import Found, check_weight
from lr_callback.layer_types import layer_cost, saved_cost
from lr_callback.layers import FactorizedLayer
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
    return own + sum(saved_cost(layer) for layer in model.modules() if isinstance(layer, FactorizedLayer))


def dense_again(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the dense weight's shape of each layer that is left out and factorized."""
    layers = {name: layer for name, layer in model.named_modules() if name in skipped}
    return {
        name: layer_cost(layer).geometry.weight_shape
        for name, layer in layers.items()
        if isinstance(layer, FactorizedLayer)
    }


def layer_costs(found: Found, observation: Observation | None, skip_zero: bool = True) -> dict[str, LayerCost]:
    """Return the cost of each layer; move those that have none, or no error, to the skipped ones."""
    costs: dict[str, LayerCost] = {}
    for name, layer in found.layers.items():
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
