"""Weightless: a layer and the forms that it may take, sizes and settings without values, on the meta device.

What a form costs can be asked of it before it is built; nothing here reads or holds a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.layers.base import FactorizedLayer, any_weight, weight_of
from lr_callback.layers.layer_types import build_form

_NOT_TAKEN = frozenset({"_compiled_call_impl"})
_WIDTHS = ("out_channels", "out_features", "embedding_dim"), ("in_channels", "in_features")
"""Attributes of an encoder, and of a decoder, that hold the width between the two."""


def weightless(layer: nn.Module) -> nn.Module:
    """Return the dense form of a dense or factorized layer without its values, on the meta device.

    It has the settings and the attributes of the layer, and no hooks; what is frozen is so there, too.

    Args:
        layer: of a type in :data:`~lr_callback.layers.layer_types.LAYER_TYPES`, dense or factorized.

    Example::

        >>> weightless(nn.Linear(8, 4)).weight
        Parameter containing:
        tensor(..., device='meta', size=(4, 8), requires_grad=True)
    """
    made = bare(layer)
    if not isinstance(made, FactorizedLayer):
        return made
    dense = made.dense_skeleton()
    weight_of(dense).requires_grad_(any_weight(layer).requires_grad)
    return dense


class Forms:
    """The forms of a layer with one folding and number of slices, without values.

    Args:
        dense: from :func:`weightless`.
        folding: which kernel axes go to the decoder.
        num_slices: equal parts of the input channels of each group.

    Example::

        >>> Forms(nn.Linear(8, 4, device="meta"), "kernel_in_encoder", 2).at(3).encoder
        SlicedLinear(in_features=8, out_features=6, num_slices=2)
    """

    def __init__(self, dense: nn.Module, folding: str, num_slices: int) -> None:
        self._first = build_form(dense, folding, num_slices, rank=1)
        for factor in self._first.factors:
            factor.requires_grad_(any_weight(dense).requires_grad)

    def at(self, rank: int) -> FactorizedLayer:
        """Return the form at a rank: the one at rank 1 with other sizes, which is made much faster than built."""
        made = bare(self._first)
        assert isinstance(made, FactorizedLayer)
        shapes = _shapes(made, rank)
        for part, names, shape in zip((made.encoder, made.decoder), _WIDTHS, shapes, strict=True):
            name = next(name for name in names if name in vars(part))
            setattr(part, name, rank * vars(part)[name])
            part._parameters["weight"] = _empty(weight_of(part), shape)
        return made


def _shapes(form: FactorizedLayer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the factors at a rank, in the order of axes of the form's type."""
    sizes = form.geometry(form)
    encoder, decoder = sizes.factor_shapes(form.folding, form.num_slices, rank)
    blocks = sizes.groups * form.num_slices
    return form.relaid_shape("encoder", encoder, blocks), form.relaid_shape("decoder", decoder, sizes.groups)


def bare(layer: nn.Module) -> nn.Module:
    """Return a module of the same class, settings and parts, without hooks, whose parameters have no values."""
    made = layer.__class__.__new__(layer.__class__)
    nn.Module.__init__(made)
    own = vars(made)
    own.update({name: value for name, value in vars(layer).items() if name not in own and name not in _NOT_TAKEN})
    made.training = layer.training
    made._parameters.update({name: _or_none(one) for name, one in layer._parameters.items()})
    made._modules.update({name: None if one is None else bare(one) for name, one in layer._modules.items()})
    return made


def _or_none(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else _empty(parameter, tuple(parameter.shape))


def _empty(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    if tuple(like.shape) == shape:
        made = torch.empty_strided(shape, like.stride(), dtype=like.dtype, device="meta")
    else:
        made = torch.empty(shape, dtype=like.dtype, device="meta")
    return nn.Parameter(made, like.requires_grad)
