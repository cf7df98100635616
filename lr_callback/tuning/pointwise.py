"""Pointwise: Linear layers as convolutions whose kernel is one pixel, for a CPU.

Both are the same products of the same numbers. But a Linear's are left to the BLAS that torch was built with, those of
a convolution to oneDNN, and a factor of low rank is narrow: there a BLAS may reach two thirds of the processor's rate
where oneDNN reaches all of it. Which is faster is measured (:func:`~lr_callback.tune`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
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
        if input.dim() < 3 or input.numel() == 0:  # a single image gains nothing, none at all is refused
            return functional.linear(input, self.weight, self.bias)
        pixels = input.flatten(1, -2).unsqueeze(1).permute(0, 3, 1, 2)
        mapped = functional.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return mapped.permute(0, 2, 3, 1).reshape(input.shape[:-1] + self.weight.shape[:1])


def pointwise_(model: nn.Module) -> tuple[str, ...]:
    """Let Linear layers on a CPU compute as convolutions with a kernel of one pixel, in place.

    For a model whose training is over, dense or compressed; what :func:`~lr_callback.tune` measures as ``pointwise``.
    Factors are among the layers that change. Layers, parameters and names stay, so that a state dict is as before: no
    file keeps this, call it after reading one. Subclasses of Linear stay as they are, ``nn.MultiheadAttention`` has
    one, and so do layers in other dtypes than float32, which oneDNN multiplies already.

    Args:
        model: is changed.

    Returns:
        The names of the layers that it changed; none of those that are so already.

    Example::

        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> pointwise_(model), type(model[0]).__name__
        (('0',), 'PointwiseLinear')
    """
    named = {name: layer for name, layer in model.named_modules() if _can_be(layer)}
    for layer in named.values():
        layer.__class__ = PointwiseLinear
    return tuple(named)


def can_be_pointwise(model: nn.Module) -> bool:
    """Return whether :func:`pointwise_` would change a model."""
    return any(map(_can_be, model.modules()))


@contextmanager
def as_pointwise(model: nn.Module) -> Iterator[None]:
    """Let a model be so for a while."""
    changed = [layer for layer in model.modules() if _can_be(layer)]
    try:
        pointwise_(model)
        yield
    finally:
        for layer in changed:
            layer.__class__ = nn.Linear


def _can_be(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or parametrize.is_parametrized(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
