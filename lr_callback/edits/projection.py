"""Projection: what an optimizer remembers of a dense weight, carried over to the factors in its place.

With ``optimizer_state="project"`` the momentum goes through the chain rule at the moment of the cut. For SGD (its
``momentum_buffer``) and Adam, AdamW and AMSGrad (``exp_avg``) that is exact: the buffer becomes what the factors would
have gathered, had they stood where they are now. Second moments cannot be had exactly from their own values, see
:func:`projected_state`. Every other optimizer starts anew, and so do weights that were factorized before: the gradient
of the dense weight, which the chain rule starts from, is not known of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lr_callback.layers import FactorizedLayer
from lr_callback.mathematics.folding import Geometry, decoder_matrices, fold, unfold_decoder, unfold_encoder

OptimizerState = Literal["reset", "project"]
"""What new factors start with: no state, or their share of the dense weight's."""

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
_ADAM = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", *_SQUARES})
_KNOWN: Mapping[type[Optimizer], tuple[set[str], ...]] = {SGD: ({"momentum_buffer"},), Adam: _ADAM, AdamW: _ADAM}
"""Optimizers (exactly, not a subclass, which may keep more) -> all that the state of a parameter may hold."""


def check_optimizer_state(optimizer_state: str) -> None:
    """Refuse another word than ``reset`` and ``project``.

    Raises:
        ValueError: If it is another.
    """
    if optimizer_state not in get_args(OptimizerState):
        raise ValueError(
            f"`optimizer_state` must be one of {list(get_args(OptimizerState))}, got {optimizer_state!r}: the factors "
            "start without state, or SGD's and Adam's momentum is projected on them."
        )


def can_project(optimizer: Optimizer) -> bool:
    """Return whether the state of an optimizer can be projected: SGD, Adam, AdamW, and no subclass of theirs."""
    return type(optimizer) in _KNOWN


def project_gradient(
    gradient: Tensor, encoder: Tensor, decoder: Tensor, folding: str, num_slices: int, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the two factors, given that of their product.

    For each slice ``W_i = B_i A_i`` of the folded weight, with ``G_i`` the same slice of the gradient::

        dA_i = B_i^T G_i        dB_i = G_i A_i^T

    Args:
        gradient: ``(F, C / g, *kernel)``, of the dense weight, or anything linear in gradients.
        encoder: ``(g * k * j, C / (g * k), *kernel)``, the ``A_i``.
        decoder: ``(F, k * j, *kernel)``, the ``B_i``.
        folding: of the factors.
        num_slices: ``k``.
        groups: ``g``.

    Returns:
        Gradients shaped as encoder and decoder, in the gradient's dtype but at least float32.

    Source: the chain rule. It is used here for the factors as they are after the cut, although the momentum was
    gathered while the weight was dense, at other weights and before truncation.

    Example::

        >>> encoder, decoder = torch.ones(2, 3), torch.full((4, 2), 2.0)
        >>> for one in project_gradient(torch.ones(4, 3), encoder, decoder, "kernel_in_encoder", 1):
        ...     print(one.shape, one.unique())
        torch.Size([2, 3]) tensor([8.])
        torch.Size([4, 2]) tensor([3.])
    """
    working = torch.promote_types(gradient.dtype, torch.float32)
    geometry = Geometry(gradient.shape[0], groups * gradient.shape[1], tuple(gradient.shape[2:]), groups)
    slices = fold(gradient.to(working), folding, num_slices, groups)
    left = decoder_matrices(decoder.to(working), num_slices, groups)
    right = encoder.to(working).reshape(len(left), left.shape[2], -1)
    of_encoder = unfold_encoder(left.mT @ slices, geometry, folding)
    return of_encoder, unfold_decoder(slices @ right.mT, geometry, folding)


@torch.no_grad()
def projected_state(
    optimizer: Optimizer, state: Mapping[str, Any], layer: FactorizedLayer
) -> dict[Tensor, dict[str, Any]]:
    """Return the state of a layer's factors, given that of the dense weight in whose place they are.

    Means of gradients (``momentum_buffer``, ``exp_avg``) go through :func:`project_gradient`; ``step`` is carried. A
    mean of squares ``V`` of gradients becomes, with ``M`` the projected ``exp_avg`` and squares entry by entry::

        V_A = max((B^2)^T V, M_A^2)        V_B = max(V (A^2)^T, M_B^2)

    The first term is the mean of squares of a factor's gradient if the gradients of the entries that it sums were
    uncorrelated and without a mean. Where they are not it is too small, and ``M / sqrt(V)`` would make a first step as
    large as the square root of the number of entries; no mean of squares is below the square of the mean, hence the
    second term. Nothing is negative, and the maximum that AMSGrad keeps is not below the mean.

    Args:
        optimizer: whose state it is.
        state: of the dense weight.
        layer: the factors, already with their values.

    Returns:
        State of both factors; empty (so both start anew) if the optimizer is not SGD, Adam or AdamW itself, if there
        is no momentum yet or if the state holds anything that is not known.
    """
    moments = {name: value for name, value in state.items() if name != "step"}
    if set(state) not in _KNOWN.get(type(optimizer), ()) or not all(_fits(value, layer) for value in moments.values()):
        return {}
    projected = _projected(moments, layer)
    made: dict[Tensor, dict[str, Any]] = {}
    for index, factor in enumerate(layer.factors):
        made[factor] = {name: copy.deepcopy(value) for name, value in state.items() if name == "step"}
        for name, value in moments.items():
            # Laid out as the factor: fused kernels walk through both at once.
            made[factor][name] = torch.empty_like(factor, dtype=value.dtype).copy_(projected[name][index])
    return made


def _fits(value: object, layer: FactorizedLayer) -> bool:
    """Return whether a value is a tensor like the dense weight; that of a sparse gradient is not."""
    geometry = layer.geometry(layer)
    shape = layer.relaid_shape("dense", geometry.weight_shape, geometry.groups)
    return isinstance(value, Tensor) and value.layout == torch.strided and tuple(value.shape) == shape


def _projected(moments: Mapping[str, Tensor], layer: FactorizedLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """Project means of gradients through the factors, means of squares through the factors' squares."""
    plain = [factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in layer.ordered_factors]
    squared = [factor.square() for factor in plain]
    groups = layer.geometry(layer).groups
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in moments.items():
        ordered, of = layer.relaid("dense", value, groups), squared if name in _SQUARES else plain
        of_encoder, of_decoder = project_gradient(ordered, of[0], of[1], layer.folding, layer.num_slices, groups)
        made[name] = layer.in_own_order(of_encoder, of_decoder)
    for name in made.keys() & set(_SQUARES):
        of_encoder, of_decoder = (
            torch.maximum(square, mean.square()) for square, mean in zip(made[name], made["exp_avg"], strict=True)
        )
        made[name] = of_encoder, of_decoder
    return made
