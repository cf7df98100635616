"""Averages: a moving average of a model's weights follows a surgery of the model, in the same basis.

Encoders of two decompositions span different subspaces, and their mean is neither. So the average takes the model's
encoder, and the decoder with which that comes closest to the average's own weight; from there on encoder and decoder
of model and average can be averaged one by one, as any other parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lr_callback.allocation import Factorization
from lr_callback.build import densified, skeleton
from lr_callback.folding import Geometry, decoder_matrices, fold, unfold_decoder
from lr_callback.layer_types import dense_weight
from lr_callback.layers import FactorizedLayer


def averaged_layers(average: nn.Module, made: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the layers that make an average follow the layers made for its model; the average is not changed.

    Args:
        average: of the same layers as the model, each dense or factorized.
        made: name of a layer -> the layer that takes its place in the model.

    Returns:
        Name of a layer -> the layer that takes its place in the average. Dense: the average's factors multiplied back.
        Factorized: the model's encoder, and the decoder of :func:`nearest_decoder`. The bias stays the average's.

    Example::

        >>> from copy import deepcopy
        >>> from lr_callback.layers import FactorizedLinear
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> followers = averaged_layers(deepcopy(model), {"0": FactorizedLinear(model[0], num_slices=2, rank=1)})
        >>> followers["0"].rank
        1
    """
    return {name: _follower(average.get_submodule(name), layer) for name, layer in made.items()}


def _follower(own: nn.Module, model: nn.Module) -> nn.Module:
    if not isinstance(model, FactorizedLayer):
        assert isinstance(own, FactorizedLayer)
        return densified(own)
    made = skeleton(own, Factorization(model.folding, model.num_slices, model.rank, 0.0, 0, 0))
    encoder, decoder = (factor.detach() for factor in model.ordered_factors)
    structure = (model.folding, model.num_slices, model.geometry(model).groups)
    made.set_factors(encoder, nearest_decoder(dense_weight(own), encoder, decoder, *structure))
    return made


def nearest_decoder(
    weight: Tensor, encoder: Tensor, decoder: Tensor, folding: str, num_slices: int, groups: int = 1
) -> Tensor:
    """Return the decoder with which an encoder comes closest to a weight.

    For each slice ``W`` of the weight, with ``A`` and ``B`` those of encoder and decoder: of all ``X`` with the least
    ``||W - X A||_F`` the one nearest to ``B``,

        ``X = B + (W - B A) A^+``, with ``A^+ = A^T (A A^T)^+``.

    That is ``W A^+`` where the rows of ``A`` are independent; a row of zeros leaves its column of ``B`` as it is.

    Args:
        weight: ``(F, C / g, *kernel)``.
        encoder: ``(g * k * j, C / (g * k), *kernel)``.
        decoder: ``(F, k * j, *kernel)``; it gives the columns that the encoder does not determine.
        folding: of the factors.
        num_slices: ``k``.
        groups: ``g``.

    Returns:
        The decoder's weight, float64, on the weight's device.

    Source: Penrose, On best approximate solutions of linear matrix equations (1956).

    Example::

        >>> dense, encoder = torch.eye(2), torch.tensor([[1.0, 1.0]])
        >>> nearest_decoder(dense, encoder, torch.zeros(2, 1), "kernel_in_encoder", 1)
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """
    geometry = Geometry(weight.shape[0], groups * weight.shape[1], tuple(weight.shape[2:]), groups)
    left = decoder_matrices(decoder.to(weight.device, torch.float64), num_slices, groups)
    right = encoder.to(weight.device, torch.float64).reshape(len(left), left.shape[2], -1)
    missing = fold(weight, folding, num_slices, groups).double() - left @ right
    gram = right @ right.mT
    return unfold_decoder(left + missing @ right.mT @ torch.linalg.pinv(gram, hermitian=True), geometry, folding)
