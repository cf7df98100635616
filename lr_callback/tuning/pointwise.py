"""Pointwise: Linear layers as convolutions whose kernel is one pixel, for a CPU.

Both are the same products of the same numbers. But a Linear's are left to the BLAS that torch was built with, those of
a convolution to oneDNN, and a factor of low rank is narrow: there a BLAS may reach two thirds of the processor's rate
where oneDNN reaches all of it. Which is faster is measured (:func:`~lr_callback.tune`).
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.fx import wrap
from torch.nn import functional
from torch.nn.utils import parametrize


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
        return _mapped(input, self.weight, self.bias)


def _mapped(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if input.dim() < 3 or input.is_nested or input.numel() == 0:  # a single image gains nothing, no pixels are refused
        return functional.linear(input, weight, bias)
    pixels = input.flatten(1, -2).contiguous().unsqueeze(1).permute(0, 3, 1, 2)
    mapped = functional.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    # As a Linear's, whatever the strides of its inputs: what comes next may ask for a view.
    return mapped.reshape(input.shape[:-1] + weight.shape[:1]).contiguous()


wrap("_mapped")  # one node of a graph of torch.fx, which cannot see what an input's axes are


def pointwise_(model: nn.Module) -> tuple[str, ...]:
    """Let Linear layers on a CPU compute as convolutions with a kernel of one pixel, in place.

    For a model whose training is over, dense or compressed; what :func:`~lr_callback.tune` measures as ``pointwise``.
    Factors are among the layers that change. Layers, parameters and names stay, so that a state dict is as before: no
    file keeps this, call it after reading one, and last: what quantizes Linear layers passes them over from now on, or
    puts weights into them that no convolution takes. Subclasses of Linear stay as they are, ``nn.MultiheadAttention``
    has one, and so do layers in other dtypes than float32, which oneDNN multiplies already, and those whose weights are
    no plain tensors: quantized or sparse ones.

    Args:
        model: is changed.

    Returns:
        The names of the layers that it changed; none of those that are so already.

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> pointwise_(model), type(model[0]).__name__
        (('0',), 'PointwiseLinear')
    """
    with ExitStack() as undo:
        names = make_pointwise(model, undo)
        undo.pop_all()
    return names


def make_pointwise(model: nn.Module, undo: ExitStack) -> tuple[str, ...]:
    """Do what :func:`pointwise_` does, and return the same; what takes it back goes on the stack."""
    named = {name: layer for name, layer in model.named_modules() if _can_be(layer)}
    for layer in named.values():
        undo.callback(setattr, layer, "__class__", nn.Linear)
        layer.__class__ = PointwiseLinear
    return tuple(named)


def _can_be(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or parametrize.is_parametrized(layer):
        return False
    weight = layer.weight
    is_plain = type(weight) in (nn.Parameter, Tensor) and weight.layout == torch.strided and weight.numel() > 0
    return is_plain and weight.device.type == "cpu" and weight.dtype == torch.float32
