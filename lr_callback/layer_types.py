"""Layer types: what the rest of the package asks about each type of dense layer, one row a type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from lr_callback.allocation import Factorization
from lr_callback.costs import Call, LayerCost
from lr_callback.folding import Geometry
from lr_callback.layers import FactorizedConv2d, FactorizedLayer, FactorizedLinear, dense_bias


class LayerType(Protocol):
    """A row of the table: what the rest of the package asks about one type of dense layer."""

    factorized: type[FactorizedLayer]

    def refusal(self, layer: nn.Module) -> str | None:
        """Return why a dense layer cannot be factorized, None if it can."""

    def geometry(self, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight of a dense or factorized layer."""

    def call(self, inputs: Tensor, outputs: Tensor) -> Call:
        """Describe one observed call."""

    def build(self, layer: nn.Module, choice: Factorization) -> FactorizedLayer:
        """Return the factorized skeleton of a dense or factorized layer."""


class _LinearType:
    factorized: type[FactorizedLayer] = FactorizedLinear

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def geometry(self, layer: nn.Module) -> Geometry:
        assert isinstance(layer, (nn.Linear, FactorizedLinear))
        return Geometry(layer.out_features, layer.in_features)

    def call(self, inputs: Tensor, outputs: Tensor) -> Call:
        return Call(outputs.shape[:-1].numel())

    def build(self, layer: nn.Module, choice: Factorization) -> FactorizedLayer:
        assert isinstance(layer, (nn.Linear, FactorizedLinear))
        return FactorizedLinear(layer, choice.num_slices, choice.rank, choice.folding)


class _Conv2dType:
    factorized: type[FactorizedLayer] = FactorizedConv2d

    def refusal(self, layer: nn.Module) -> str | None:
        groups = getattr(layer, "groups", 1)
        return None if groups == 1 else f"groups={groups}: grouped convolutions are not factorized yet"

    def geometry(self, layer: nn.Module) -> Geometry:
        assert isinstance(layer, (nn.Conv2d, FactorizedConv2d))
        return Geometry(layer.out_channels, layer.in_channels, tuple(layer.kernel_size))

    def call(self, inputs: Tensor, outputs: Tensor) -> Call:
        batch = inputs.shape[0] if inputs.dim() == 4 else 1
        return Call(batch, tuple(inputs.shape[-2:]), tuple(outputs.shape[-2:]))

    def build(self, layer: nn.Module, choice: Factorization) -> FactorizedLayer:
        assert isinstance(layer, (nn.Conv2d, FactorizedConv2d))
        return FactorizedConv2d(layer, choice.num_slices, choice.rank, choice.folding)


LAYER_TYPES: Mapping[type[nn.Module], LayerType] = {nn.Linear: _LinearType(), nn.Conv2d: _Conv2dType()}
"""Dense type (exactly, not a subclass) -> its row."""

_FACTORIZED: Mapping[type[nn.Module], LayerType] = {row.factorized: row for row in LAYER_TYPES.values()}


def layer_type(layer: nn.Module) -> LayerType | None:
    """Return the row of a dense or factorized layer, None if its type is not in the table."""
    return LAYER_TYPES.get(type(layer)) or _FACTORIZED.get(type(layer))


def layer_cost(layer: nn.Module, calls: tuple[Call, ...] | None = None) -> LayerCost:
    """Return the cost of a dense or factorized layer: in parameters, or in the multiply-adds of observed calls."""
    kind, bias = layer_type(layer), dense_bias(layer)
    assert kind is not None
    return LayerCost(kind.geometry(layer), 0 if bias is None else bias.numel(), calls)


def saved_cost(layer: FactorizedLayer, calls: tuple[Call, ...] | None = None) -> int:
    """Return how much less a factorized layer costs than the dense one."""
    cost = layer_cost(layer, calls)
    return cost.dense - cost.factorized(layer.folding, layer.num_slices, layer.rank)
