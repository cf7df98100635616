"""Pricing: what the layers of a model cost in a unit, and the model with all of them dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lr_callback.costs import LATENCY, OBSERVED, LayerCost, check_cost
from lr_callback.find import Found, check_weight, replaceable_in
from lr_callback.folding import Geometry
from lr_callback.latency import Latencies, LayerTimes, MeasuredCost
from lr_callback.layer_types import layer_cost, layer_type, saved_cost
from lr_callback.methods import Method
from lr_callback.observe import Observation


@dataclass(frozen=True)
class Prices:
    """What is paid for, in one unit.

    Args:
        unit: one of :data:`~lr_callback.costs.COSTS`.
        observation: of one run of the model, for ``multiply_adds`` and ``latency``.

    Raises:
        ValueError: If there is no such unit, or it takes an observation and there is none, or one without times.
    """

    unit: str = "parameters"
    observation: Observation | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be counted."""
        check_cost(self.unit)
        if self.unit in OBSERVED and self.observation is None:
            raise ValueError(f"cost={self.unit!r} is counted on a run of the model, and there is none: observe one.")
        if self.unit == LATENCY and self._timed is None:
            raise ValueError("cost='latency' is measured in a run of the model, and this one was not timed: time it.")

    def of_model(self, model: nn.Module) -> int:
        """Return what a model costs with all layers dense."""
        if self._timed is not None:
            return self._timed.dense
        if self._counted is not None:
            return self._counted.dense_multiply_adds
        return dense_bytes(model) if self.unit == "bytes" else dense_parameters(model)

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        """Return what a layer costs, dense and factorized."""
        calls = None if self._counted is None else self._counted.calls.get(name, ())
        counted = layer_cost(layer, calls, self.unit == "bytes")
        if self._timed is None:
            return counted
        return MeasuredCost(counted.geometry, self._timed.layers.get(name, LayerTimes(0)), counted)

    def why_not(self, name: str) -> str | None:
        """Return why nothing is saved at a layer, however it is factorized; None if it can be."""
        return None if self._counted is None else self._counted.why_not(name)

    @property
    def _counted(self) -> Observation | None:
        return self.observation if self.unit in OBSERVED else None

    @property
    def _timed(self) -> Latencies | None:
        return self.observation.latencies if self.unit == LATENCY and self.observation is not None else None


def dense_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model with all layers dense; a shared parameter counts once.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).
    """
    own = sum(parameter.numel() for parameter in _initialised(model))
    return own + sum(saved_cost(layer) for layer in replaceable_in(model).values())


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and persistent buffers, with all layers dense; a shared one counts once.

    These are what a state dict holds; a file of it is larger by its header. Each entry counts by its dtype, those of a
    sparse tensor all of them.

    Raises:
        ValueError: If a parameter is not initialised yet (a lazy layer).

    Example::

        >>> dense_bytes(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))  # with a count of batches, 8 bytes
        424
    """
    buffers = {
        id(value): value
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    own = sum(value.numel() * value.element_size() for value in [*_initialised(model), *buffers.values()])
    return own + sum(saved_cost(layer, in_bytes=True) for layer in replaceable_in(model).values())


def _initialised(model: nn.Module) -> list[nn.Parameter]:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ValueError(f"{name}: it is not initialised yet and cannot be counted; run one batch first.")
    return list(model.parameters())


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


def layer_costs(found: Found, prices: Prices, skip_zero: bool = True, embeddings: bool = False) -> dict[str, LayerCost]:
    """Return the cost of each layer; move those without one, without error or not asked for to the skipped ones."""
    costs: dict[str, LayerCost] = {}
    for name, layer in found.layers.items():
        kind = layer_type(layer)
        if kind is not None and kind.only_if_asked is not None and not embeddings:
            found.skipped[name] = kind.only_if_asked
            continue
        zero = check_weight(name, layer)
        reason = prices.why_not(name) or (zero if skip_zero else None)
        if reason is not None:
            found.skipped[name] = reason
            continue
        costs[name] = prices.of_layer(name, layer)
    return costs


def no_gain(geometry: Geometry, method: Method) -> str:
    """Return why a layer is skipped that has no candidate."""
    if not method.slice_counts(geometry):
        return f"none of the numbers of slices that are allowed divides its {geometry.weight_shape[1]} input channels"
    depthwise = geometry.groups == geometry.in_channels > 1
    what = "a depthwise convolution" if depthwise else "too small"
    return f"{what}: no rank costs less than the dense layer"
