"""Averages: a moving average of a model's weights follows a surgery of the model, in the same basis.

Encoders of two decompositions span different subspaces, and their mean is neither. So the average takes the model's
encoder, and the decoder with which that comes closest to the average's own weight; from there on encoder and decoder
of model and average can be averaged one by one, as any other parameter. What a repair changes in the model besides its
factors, biases and BatchNorm layers, changes in the average by as much.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.decisions.factorization import Factorization
from lr_callback.edits.build import densified, skeleton
from lr_callback.layers import FactorizedLayer, dense_bias
from lr_callback.layers.layer_types import dense_weight
from lr_callback.mathematics.folding import Geometry, fold, unfold_decoder


def averaged_layers(
    average: nn.Module, former: Mapping[str, nn.Module], made: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the layers that make an average follow the layers made for its model; the average is not changed.

    Args:
        average: of the same layers as the model, each dense or factorized.
        former: name of a layer -> the one that stood there in the model.
        made: name of a layer -> the one that takes its place in the model.

    Returns:
        Name of a layer -> the one that takes its place in the average. Dense: the average's factors multiplied back.
        Factorized: the model's encoder, and the model's decoder with what the weights differ by, as near as the encoder
        comes to that. So an average that equals the model does so afterwards, however the factors were found. The bias
        stays the average's.

    Example::

        >>> from copy import deepcopy
        >>> from lr_callback.layers import FactorizedLinear
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> made = {"0": FactorizedLinear(model[0], num_slices=2, rank=1)}
        >>> averaged_layers(deepcopy(model), {"0": model[0]}, made)["0"].rank
        1
    """
    return {name: _follower(average.get_submodule(name), former[name], layer) for name, layer in made.items()}


def _follower(own: nn.Module, former: nn.Module, model: nn.Module) -> nn.Module:
    if not isinstance(model, FactorizedLayer):
        assert isinstance(own, FactorizedLayer)
        return densified(own)
    made = skeleton(own, Factorization(model.folding, model.num_slices, model.rank, 0.0, 0, 0))
    encoder, decoder = (factor.detach() for factor in model.ordered_factors)
    weight = dense_weight(own).double()
    change = weight - dense_weight(former).to(weight)
    structure = (model.folding, model.num_slices, model.geometry(model).groups)
    made.set_factors(encoder, decoder.to(weight) + nearest_decoder(change, encoder, *structure))
    return made


def repaired(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return copies of what a repair may change besides factors: biases of some layers, and BatchNorm.

    Args:
        model: that holds them.
        layers: its layers that are replaced.

    Returns:
        Name of a parameter or buffer -> its value.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> list(repaired(model, {"0": model[0]}))
        ['0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var']
    """
    biases = {id(dense_bias(layer)) for layer in layers.values()}
    found: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if id(value) in biases}
    norms = [(name, one) for name, one in model.named_modules() if isinstance(one, _BatchNorm)]
    for name, norm in norms:
        kept = {**dict(norm.named_parameters(prefix=name)), **dict(norm.named_buffers(prefix=name))}
        found |= {key: value for key, value in kept.items() if not key.endswith("num_batches_tracked")}
    return {name: value.detach().clone() for name, value in found.items()}


@torch.no_grad()
def moved(name: str, value: Tensor, before: Tensor, after: Tensor, eps: float = 0.0) -> Tensor:
    """Return a value of an average, changed as that of its model was: by as much, a variance or weight by its factor.

    Args:
        name: of the value.
        value: of the average.
        before: that of the model before the repair.
        after: and after it.
        eps: of the BatchNorm layer, which is added to the variance wherever that is used.

    Example::

        >>> moved("bn.running_var", torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))
        tensor(1.5000)
    """
    former, latter = before.to(value), after.to(value)
    if not name.endswith(("running_var", "weight")):
        return value + (latter - former)
    is_variance = name.endswith("running_var")
    added = eps if is_variance else 0.0
    factor = (latter.double() + added) / (former.double() + added)
    scaled = (value.double() + added) * factor - added
    result = (scaled.clamp(min=0) if is_variance else scaled).to(value)
    return torch.where(factor.isfinite() & (factor > 0) & result.isfinite(), result, value)


def nearest_decoder(weight: Tensor, encoder: Tensor, folding: str, num_slices: int, groups: int = 1) -> Tensor:
    """Return the decoder with which an encoder comes closest to a weight.

    For each slice ``W`` of the weight, with ``A`` that of the encoder: of all ``X`` with the least ``||W - X A||_F``
    the smallest, ``X = W A^+`` with ``A^+ = A^T (A A^T)^+``. A row of zeros in ``A`` has a column of zeros in ``X``.

    Args:
        weight: ``(F, C / g, *kernel)``.
        encoder: ``(g * k * j, C / (g * k), *kernel)``.
        folding: of the factors.
        num_slices: ``k``.
        groups: ``g``.

    Returns:
        The decoder's weight, float64, on the weight's device.

    Source: Penrose, On best approximate solutions of linear matrix equations (1956).

    Example::

        >>> nearest_decoder(torch.eye(2), torch.tensor([[1.0, 1.0]]), "kernel_in_encoder", 1)
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """
    geometry = Geometry(weight.shape[0], groups * weight.shape[1], tuple(weight.shape[2:]), groups)
    folded = fold(weight, folding, num_slices, groups).double()
    right = encoder.to(weight.device, torch.float64).reshape(len(folded), -1, folded.shape[2])
    gram = right @ right.mT
    return unfold_decoder(folded @ right.mT @ torch.linalg.pinv(gram, hermitian=True), geometry, folding)
