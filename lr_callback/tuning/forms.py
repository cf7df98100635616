"""Forms: other layers that compute what a factorized one does, for another layer may be faster on a device.

The slices of a layer are products side by side. One block is one product with the same factors, the encoder's zero
outside of the slices' own channels: more multiply-adds, but fewer and larger steps, and still an ordinary factorized
layer, of one slice. Dense is one layer in place of two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback.decisions.factorization import Factorization
from lr_callback.edits.build import densified, skeleton
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import layer_type
from lr_callback.tuning.tuned import AS_BUILT, DENSE, ONE_BLOCK

Structure = tuple[str, int, int]
"""Folding, number of slices and rank of a factorized layer."""


def forms_of(layer: FactorizedLayer) -> dict[str, Structure | None]:
    """Return the forms that a layer can have; None: dense.

    One block is among them where there are several slices, and where its rank is one that a layer of one slice can
    have: beyond that it is larger than the dense layer.

    Args:
        layer: as it is built.

    Example::

        >>> from lr_callback.layers import FactorizedLinear
        >>> forms_of(FactorizedLinear(nn.Linear(12, 8), num_slices=3, rank=2))["one block"]
        ('kernel_in_encoder', 1, 6)
    """
    folding, count, rank = layer.structure
    forms: dict[str, Structure | None] = {AS_BUILT: layer.structure}
    if count > 1 and count * rank <= layer.geometry(layer).full_rank(folding, 1):
        forms[ONE_BLOCK] = (folding, 1, count * rank)
    return {**forms, DENSE: None}


def in_form(layer: FactorizedLayer, form: str) -> nn.Module:
    """Return a layer that computes the same in another form, beside the one that it is made of.

    Its bias is the same parameter; mode, hooks and what else the layer has are taken over.

    Args:
        layer: as it is built.
        form: one of :func:`forms_of`.

    Raises:
        ValueError: If the layer has no such form.

    Example::

        >>> from lr_callback.layers import FactorizedLinear
        >>> layer, inputs = FactorizedLinear(nn.Linear(12, 8), num_slices=3, rank=2), torch.ones(5, 12)
        >>> torch.allclose(in_form(layer, "one block")(inputs), layer(inputs), atol=1e-5)
        True
    """
    known = forms_of(layer)
    if form not in known:
        raise ValueError(f"`form`: must be one of {list(known)} for {layer.extra_repr()}, got {form!r}.")
    if form == AS_BUILT:
        return layer
    return densified(layer) if form == DENSE else _in_one_block(layer)


def _in_one_block(layer: FactorizedLayer) -> FactorizedLayer:
    assert layer_type(layer) is type(layer)
    made = skeleton(layer, Factorization(layer.folding, 1, layer.num_slices * layer.rank, 0.0, 0, 0))
    encoder, decoder = (factor.detach() for factor in layer.ordered_factors)
    # The decoder takes what the slices of a group give one after the other already.
    made.set_factors(_block_diagonal(encoder, layer.geometry(layer).groups, layer.num_slices), decoder)
    return made


def _block_diagonal(encoder: Tensor, groups: int, count: int) -> Tensor:
    """Let each slice see all channels of its group, those of the others times zero.

    Args:
        encoder: ``(g * k * j, C / (g * k), *kernel)``.
        groups: ``g``.
        count: ``k``.

    Returns:
        ``(g * k * j, C / g, *kernel)``.
    """
    (rows, width), kernel = encoder.shape[:2], encoder.shape[2:]
    rank = rows // (groups * count)
    blocks = torch.zeros(groups, count, rank, count, width, *kernel, dtype=encoder.dtype, device=encoder.device)
    own = encoder.reshape(groups, count, rank, width, *kernel)
    blocks.diagonal(dim1=1, dim2=3).copy_(own.movedim(1, -1))
    return blocks.reshape(rows, count * width, *kernel)
