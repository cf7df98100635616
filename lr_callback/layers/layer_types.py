"""Layer types: the table of what can be factorized, one row a type, and what is asked about its layers."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

from lr_callback.decisions.costs import Call, CountedCost
from lr_callback.decisions.factorization import Factorization
from lr_callback.layers.base import FactorizedLayer, any_weight, dense_bias, weight_of
from lr_callback.layers.convolution import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from lr_callback.layers.embedding import FactorizedEmbedding
from lr_callback.layers.linear import FactorizedConv1D, FactorizedLinear


def full_name(kind: type) -> str:
    """Return the name of a class with that of its module, by which it is known before it is imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


LAYER_TYPES: MutableMapping[str, type[FactorizedLayer]] = {
    full_name(nn.Linear): FactorizedLinear,
    full_name(nn.Conv1d): FactorizedConv1d,
    full_name(nn.Conv2d): FactorizedConv2d,
    full_name(nn.Conv3d): FactorizedConv3d,
    full_name(nn.ConvTranspose1d): FactorizedConvTranspose1d,
    full_name(nn.ConvTranspose2d): FactorizedConvTranspose2d,
    full_name(nn.ConvTranspose3d): FactorizedConvTranspose3d,
    full_name(nn.Embedding): FactorizedEmbedding,
    "transformers.pytorch_utils.Conv1D": FactorizedConv1D,
    # Subclasses that compute what torch's class does, and differ in how they are made, or in the order of one sum.
    "lr_callback.tuning.pointwise.PointwiseLinear": FactorizedLinear,
    "timm.layers.linear.Linear": FactorizedLinear,
    "transformers.models.falcon.modeling_falcon.FalconLinear": FactorizedLinear,
    "torchvision.models.video.resnet.Conv3DSimple": FactorizedConv3d,
    "torchvision.models.video.resnet.Conv3DNoTemporal": FactorizedConv3d,
}
"""Dense type (exactly, not a subclass) -> its factorized form; by name, so that nothing is imported for it.

A row for a type of one's own may be added, ``LAYER_TYPES[full_name(Own)] = FactorizedOwn``, in every process.
"""


def layer_type(layer: nn.Module) -> type[FactorizedLayer] | None:
    """Return the row of a dense or factorized layer, None if its type is not in the table."""
    kind = type(layer)
    return next((row for row in LAYER_TYPES.values() if row is kind), None) or LAYER_TYPES.get(full_name(kind))


def ordered_weight(layer: nn.Module) -> Tensor:
    """Return the dense weight ``(F, C / g, *kernel)`` of a dense or factorized layer; differentiable."""
    kind = layer_type(layer)
    assert kind is not None
    if isinstance(layer, FactorizedLayer):
        return layer.ordered_weight
    return kind.relaid("dense", weight_of(layer), kind.geometry(layer).groups)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the dense weight ``(F, C / g, *kernel)`` of a dense or factorized layer, detached."""
    return ordered_weight(layer).detach()


def build(layer: nn.Module, choice: Factorization) -> FactorizedLayer:
    """Return the factorized form of a dense or factorized layer, its weights not set."""
    return build_form(layer, choice.folding, choice.num_slices, choice.rank)


def build_form(layer: nn.Module, folding: str, num_slices: int, rank: int) -> FactorizedLayer:
    """Return one form of a dense or factorized layer, its weights not set."""
    kind = layer_type(layer)
    assert kind is not None
    return kind(layer, num_slices, rank, folding)


def layer_cost(layer: nn.Module, calls: tuple[Call, ...] | None = None, in_bytes: bool = False) -> CountedCost:
    """Return the cost of a dense or factorized layer: what it holds, or the multiply-adds of observed calls.

    Args:
        layer: of a type in the table.
        calls: for multiply-adds; None: what it holds.
        in_bytes: whether that is counted in bytes, not in parameters.
    """
    kind, bias = layer_type(layer), dense_bias(layer)
    assert kind is not None
    held = 0 if bias is None else bias.numel() * (bias.element_size() if in_bytes else 1)
    entry = any_weight(layer).element_size() if in_bytes else 1
    return CountedCost(kind.geometry(layer), held, calls, kind.works, entry)


def saved_cost(layer: FactorizedLayer, calls: tuple[Call, ...] | None = None, in_bytes: bool = False) -> int:
    """Return how much less a factorized layer costs than the dense one; arguments as of :func:`layer_cost`."""
    cost = layer_cost(layer, calls, in_bytes)
    return cost.dense - cost.factorized(layer.folding, layer.num_slices, layer.rank)
