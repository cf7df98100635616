"""How wrong a factorized layer is beside the dense one, measured on the two as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.layers.base import FactorizedLayer
from lr_callback.layers.layer_types import layer_type, ordered_weight
from lr_callback.mathematics.folding import Geometry, compose
from lr_callback.mathematics.measured import MEASURED, measured_error

_WHERE = "RelativeLayerError"


def relative_layer_error(dense: Tensor | nn.Module, factorized: nn.Module, error: str = "slice") -> Tensor:
    """Return the relative error of a factorized layer beside the dense one.

    Right after a cut by the same measure it is the ``relative_error`` that the allocation says, up to the rounding of
    the factors; it goes on telling how far the two are apart after a refit and while they train.

    Args:
        dense: the dense layer, or its weight, shaped as the dense layer holds it; not all zero.
        factorized: the layer in its place; one that has stayed dense counts as one slice, with all kernel axes on the
            side of the inputs.
        error: ``slice``, the operator norm of the slice that is worst; ``operator``, that of the whole residual;
            ``bound``, ``sqrt(k)`` times ``slice``; or ``frobenius``. All are divided by the norm of the dense weight,
            and are of that layer's folding and number of slices ``k``.

    Returns:
        A number from 0, differentiable; NaN if an entry is not finite. Computed in float64, by a decomposition.

    Raises:
        TypeError: If an argument is something else.
        ValueError: If the shapes do not agree, the dense weight is all zero, or there is no such measure of weights.

    Example::

        >>> from torch import nn
        >>> from lr_callback import allocate, factorize_
        >>> from lr_callback.metrics.functional import relative_layer_error
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        >>> dense, allocation = model[0], allocate(model, 0.5)
        >>> report = factorize_(model, allocation)
        >>> foreseen = allocation.layers["0"].relative_error
        >>> abs(relative_layer_error(dense, model[0]).item() - foreseen) < 1e-5
        True
    """
    check_measure(error)
    kind = _kind(factorized, "factorized")
    weight, groups = _dense_weight(dense, kind, kind.geometry(factorized)), kind.geometry(factorized).groups
    if not bool(weight.any()):
        raise ValueError(f"{_WHERE}: the dense weight is all zero, there is nothing to measure an error against.")
    made, folding, num_slices = _made(factorized)
    found = measured_error(weight, made, error, folding, num_slices, groups)
    return found.to(torch.promote_types(weight.dtype, torch.float32))


def check_measure(error: str) -> None:
    """Refuse a measure that is not of weights alone."""
    if error not in list(MEASURED):  # what cannot be hashed is none, too
        raise ValueError(f"{_WHERE}: `error` must be one of {list(MEASURED)}, got {error!r}.")


def _kind(layer: object, name: str) -> type[FactorizedLayer]:
    """Return what knows a layer's type."""
    kind = layer_type(layer) if isinstance(layer, nn.Module) else None
    if kind is None:
        raise TypeError(
            f"{_WHERE}: `{name}` must be a layer of a type that can be factorized, dense or factorized"
            f"{', or a weight' if name == 'dense' else ''}, got an object of the type {type(layer).__name__}."
        )
    return kind


def _dense_weight(dense: Tensor | nn.Module, kind: type[FactorizedLayer], geometry: Geometry) -> Tensor:
    """Return the dense weight ``(F, C / g, *kernel)``, of the sizes of the other layer."""
    if isinstance(dense, Tensor):
        wanted = kind.relaid_shape("dense", geometry.weight_shape, geometry.groups)
        if tuple(dense.shape) == wanted and dense.is_floating_point():
            return kind.relaid("dense", dense, geometry.groups)
        found = f"{tuple(dense.shape)} in {dense.dtype}"
        raise ValueError(f"{_WHERE}: the dense weight must have the shape {wanted} and a floating dtype, got {found}.")
    own = _kind(dense, "dense").geometry(dense)
    if own != geometry:
        raise ValueError(
            f"{_WHERE}: both layers must have the same sizes, got {own} as dense and {geometry} as factorized."
        )
    return ordered_weight(dense)


def _made(layer: nn.Module) -> tuple[Tensor, str, int]:
    """Return what a layer multiplies with, the factors multiplied in float64, its folding and its number of slices."""
    if not isinstance(layer, FactorizedLayer):
        return ordered_weight(layer), "kernel_in_encoder", 1
    encoder, decoder = (factor.double() for factor in layer.ordered_factors)
    weight = compose(encoder, decoder, layer.num_slices, layer.geometry(layer).groups)
    return weight, layer.folding, layer.num_slices
