"""Pointwise: Linear layers as convolutions whose kernel is one pixel, for a CPU.

Both are the same products of the same numbers. But a Linear's are left to the BLAS that torch was built with, those of
a convolution to oneDNN, and a factor of low rank is narrow: there a BLAS may reach two thirds of the processor's rate
where oneDNN reaches all of it. Which is faster is measured (:func:`~lr_callback.tune`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseLinear(nn.Linear):
    """A Linear whose product is a convolution over its rows, which lie in memory as an image's with channels last.

    Its weight has the shape of a Linear's, and so has all that is saved of it.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``, as of ``nn.Linear``.

    Example::

        >>> layer, rows = nn.Linear(6, 4), torch.randn(2, 3, 6)
        >>> expected = layer(rows)
        >>> _ = pointwise_(nn.Sequential(layer))
        >>> torch.allclose(layer(rows), expected, atol=1e-6)
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the map; the first axis is that of images, those between are along a row of pixels."""
        if input.dim() < 3 or input.numel() == 0:  # a single image gains nothing, none at all is refused
            return F.linear(input, self.weight, self.bias)
        pixels = input.flatten(1, -2).unsqueeze(1).permute(0, 3, 1, 2)
        mapped = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return mapped.permute(0, 2, 3, 1).reshape(input.shape[:-1] + self.weight.shape[:1])


def pointwise_(model: nn.Module) -> tuple[str, ...]:
    """Let Linear layers on a CPU compute as convolutions with a kernel of one pixel, in place; done twice it is done once.

    For a model whose training is over, dense or compressed. The factors of layers are among those that change. Layers,
    parameters and their names stay the same ones, so that state dicts of it are as before: no file keeps this, call it
    after reading one. Subclasses of Linear, as ``nn.MultiheadAttention`` has one, and layers in other dtypes than
    float32, which oneDNN multiplies already, stay.

    Args:
        model: is changed.

    Returns:
        The names of the layers that it changed.

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> pointwise_(model), type(model[0]).__name__
        (('0',), 'PointwiseLinear')
    """
    named = {name: layer for name, layer in model.named_modules() if _is_to_change(layer)}
    for layer in named.values():
        layer.__class__ = PointwiseLinear
    return tuple(named)


def back_to_linear_(model: nn.Module, names: tuple[str, ...]) -> None:
    """Undo :func:`pointwise_`.

    Args:
        model: is changed.
        names: that it returned.
    """
    for name in names:
        model.get_submodule(name).__class__ = nn.Linear


def _is_to_change(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or torch.nn.utils.parametrize.is_parametrized(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
