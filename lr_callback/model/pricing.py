"""Pricing: what a model costs in a unit with all layers dense, and what each of its layers does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import nn

from lr_callback.decisions.costs import ACTIVATION_MEMORY, LATENCY, OBSERVED, LayerCost, Unit, check_cost, spoken
from lr_callback.decisions.goals import NOT_ALONE
from lr_callback.decisions.methods import Method
from lr_callback.layers.layer_types import layer_cost, layer_type
from lr_callback.mathematics.folding import Geometry
from lr_callback.model.find import Found, check_weight, find_layers, replaceable_in
from lr_callback.model.held import dense_bytes, dense_parameters
from lr_callback.model.observe import Observation
from lr_callback.model.overrides import Override
from lr_callback.units.activations import ActivationCost, Activations
from lr_callback.units.latency import Latencies, LayerTimes, MeasuredCost, Wanted
from lr_callback.units.own_cost import OwnCost

Part = TypeVar("Part")


class _Rate(ABC):
    """How models and layers are priced in one unit."""

    @abstractmethod
    def of_model(self, model: nn.Module) -> int:
        """Return what a model costs with all layers dense."""

    @abstractmethod
    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        """Return what a layer costs, dense and factorized."""


@dataclass(frozen=True)
class _Held(_Rate):
    in_bytes: bool

    def of_model(self, model: nn.Module) -> int:
        return dense_bytes(model) if self.in_bytes else dense_parameters(model)

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        return layer_cost(layer, in_bytes=self.in_bytes)


@dataclass(frozen=True)
class _MultiplyAdds(_Rate):
    observation: Observation

    def of_model(self, model: nn.Module) -> int:
        return self.observation.dense_multiply_adds

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        return layer_cost(layer, self.observation.calls.get(name, ()))


@dataclass(frozen=True)
class _Latency(_Rate):
    timed: Latencies

    def of_model(self, model: nn.Module) -> int:
        return self.timed.dense

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        counted = layer_cost(layer)
        return MeasuredCost(counted.geometry, self.timed.layers.get(name, LayerTimes(0)), counted)


@dataclass(frozen=True)
class _ActivationMemory(_Rate):
    kept: Activations

    def of_model(self, model: nn.Module) -> int:
        return self.kept.dense

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        return ActivationCost.of(layer, self.kept.calls.get(name, ()))


@dataclass(frozen=True)
class _Own(_Rate):
    own: OwnCost

    def of_model(self, model: nn.Module) -> int:
        return self.own.of_model(model, find_layers(model).layers)

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        return self.own.of_layer(layer, name)


@dataclass(frozen=True)
class Prices:
    """What is paid for, in one unit.

    Args:
        asked: one of :data:`~lr_callback.decisions.costs.COSTS`, or a function that says what any module costs.
        observation: of one run of the model, for the units that are observed.

    Raises:
        ValueError: If there is no such unit, or it takes an observation and there is none, or one without it.
    """

    asked: Unit = "parameters"
    observation: Observation | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be counted."""
        _ = self._rate

    @property
    def unit(self) -> str:
        """Name of the unit; of a function the path that it is imported by."""
        return self.asked if isinstance(self.asked, str) else _own(self.asked).name

    def of_model(self, model: nn.Module) -> int:
        """Return what a model costs with all layers dense."""
        return self._rate.of_model(model)

    def of_layer(self, name: str, layer: nn.Module) -> LayerCost:
        """Return what a layer costs, dense and factorized."""
        return layer_cost(layer, ()) if self.is_free(name) else self._rate.of_layer(name, layer)

    def why_not(self, name: str) -> str | None:
        """Return why nothing is saved at a layer, however it is factorized; None if it can be."""
        return self.observation.why_not(name) if self.unit in OBSERVED and self.observation is not None else None

    def is_free(self, name: str) -> bool:
        """Return whether a layer costs nothing in any form; in training, whose activations count, it may be used."""
        seen = self.observation if self.unit in ("multiply_adds", LATENCY) else None
        return seen is not None and not seen.is_used(name)

    @cached_property
    def _rate(self) -> _Rate:
        if not isinstance(self.asked, str):
            return _Own(_own(self.asked))
        check_cost(self.asked)
        if self.asked not in OBSERVED:
            return _Held(in_bytes=self.asked == "bytes")
        seen = self.observation
        if seen is None:
            raise ValueError(f"cost={self.asked!r} is counted on a run of the model, and there is none: observe one.")
        if self.asked == LATENCY:
            return _Latency(_counted(seen.latencies, "cost='latency' is measured in", "timed: time it"))
        if self.asked == ACTIVATION_MEMORY:
            how = "observed in training: do so with `activations=True`"
            return _ActivationMemory(_counted(seen.activations, f"cost={self.asked!r} is counted on", how))
        return _MultiplyAdds(seen)


def _counted(part: Part | None, what: str, how: str) -> Part:
    """Return a part of an observation.

    Raises:
        ValueError: If it is not there.
    """
    if part is None:
        raise ValueError(f"{what} a run of the model, and this one was not {how}.")
    return part


def _own(asked: Unit) -> OwnCost:
    assert not isinstance(asked, str)
    return asked if isinstance(asked, OwnCost) else OwnCost(asked)


def listed_prices(prices: Prices | Sequence[Prices] | None) -> list[Prices]:
    """Return the units in which is paid, the first one first; by default parameters.

    Raises:
        ValueError: If the first is activation memory, in which factorized layers save nothing.
    """
    listed = [prices or Prices()] if prices is None or isinstance(prices, Prices) else list(prices)
    if listed[0].unit == ACTIVATION_MEMORY:
        raise ValueError(NOT_ALONE)
    return listed


def model_costs(model: nn.Module, prices: Sequence[Prices]) -> dict[str, int]:
    """Return what the model costs in each unit, all layers dense.

    Raises:
        ValueError: If that is nothing in one of several that are counted on a run.
    """
    totals = {one.unit: one.of_model(model) for one in prices}
    nothing = [unit for unit, dense in totals.items() if dense == 0 and unit in OBSERVED]
    if nothing and len(totals) > 1:
        raise ValueError(
            f"`budget`: a run of the network on its example input must take {spoken(nothing[0])} for a fraction of "
            "them to be kept, and takes none. Leave this unit out, or give an example of at least one row."
        )
    return totals


def dense_again(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the dense weight's shape of each layer that is left out, factorized, and can be replaced."""
    layers = replaceable_in(model)
    return {name: layer_cost(layer).geometry.weight_shape for name, layer in layers.items() if name in skipped}


def wanted_times(
    found: Found, pins: Mapping[str, Override], method: Method, embeddings: bool = False
) -> dict[str, Wanted]:
    """Return what is to be measured of each layer that can be factorized, where time is paid for.

    Args:
        found: what can be factorized.
        pins: name of a layer -> what it becomes whatever the others do.
        method: of the others.
        embeddings: whether embeddings are factorized, too.
    """
    kinds = {name: layer_type(layer) for name, layer in found.layers.items()}
    asked = [name for name, kind in kinds.items() if embeddings or kind is None or kind.only_if_asked is None]
    own = {name: Wanted(one.method(method), one.rank) for name, one in pins.items()}
    return {name: own.get(name) or Wanted(method) for name in asked}


def leave_out_unused(found: Found, observation: Observation | None) -> None:
    """Move the layers that a run neither called nor read to the skipped ones; without a run, none."""
    if observation is None:
        return
    for name in list(found.layers):
        if not observation.is_used(name):
            found.skipped[name] = "not used on the example input: neither called, nor its weight read"
            del found.layers[name]


def layer_costs(
    found: Found, prices: Sequence[Prices], skip_zero: bool = True, embeddings: bool = False
) -> dict[str, dict[str, LayerCost]]:
    """Return the costs of each layer by unit; move those without one, without error or not asked for to the skipped.

    Args:
        found: what can be factorized.
        prices: in each unit.
        skip_zero: whether layers whose weights are all zero are skipped.
        embeddings: whether embeddings are factorized, too.
    """
    costs: dict[str, dict[str, LayerCost]] = {}
    for name, layer in found.layers.items():
        kind = layer_type(layer)
        if kind is not None and kind.only_if_asked is not None and not embeddings:
            found.skipped[name] = kind.only_if_asked
            continue
        zero = check_weight(name, layer)
        reason = _saves_nothing(name, prices) or (zero if skip_zero else None)
        if reason is not None:
            found.skipped[name] = reason
            continue
        costs[name] = {one.unit: one.of_layer(name, layer) for one in prices}
    return costs


def first_costs(units: Mapping[str, Mapping[str, LayerCost]]) -> dict[str, LayerCost]:
    """Return the cost of each layer in the first unit, of its costs by unit."""
    return {name: next(iter(own.values())) for name, own in units.items()}


def _saves_nothing(name: str, prices: Sequence[Prices]) -> str | None:
    """Return why a layer cannot be factorized for what is paid for; where it is free, it may be for another unit."""
    charged = [one for one in prices if not one.is_free(name)] or prices
    return next((reason for one in charged if (reason := one.why_not(name)) is not None), None)


def no_gain(geometry: Geometry, method: Method, is_timed: bool = False) -> str:
    """Return why a layer is skipped that has no candidate.

    Args:
        geometry: sizes of its weight.
        method: by which it has none.
        is_timed: whether it may have none because each was measured to be slower.
    """
    if not method.slice_counts(geometry):
        return method.why_no_slices(geometry)
    if is_timed:
        return "no form of it was measured to be faster than the dense layer"
    depthwise = geometry.groups == geometry.in_channels > 1
    what = "a depthwise convolution" if depthwise else "too small"
    return f"{what}: no rank costs less than the dense layer"
