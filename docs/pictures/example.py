"""Weights to draw curves of: made up, with a spectrum that falls as that of trained layers does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lr_callback import ALDS, analyze
from lr_callback.decisions.analysed import Analysis


def weight(out_channels: int, in_channels: int, parts: int, fall: float, seed: int) -> Tensor:
    """Return the weight of a 3 x 3 convolution whose parts of the input channels each have few directions.

    Args:
        out_channels: of the layer.
        in_channels: of the layer.
        parts: of the input channels.
        fall: how fast the spectrum falls: the value at which it is ``1 / e`` is this.
        seed: of the numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    columns, full = in_channels // parts * 9, min(out_channels, in_channels // parts * 9)
    made = []
    for part in range(parts):
        left = torch.linalg.qr(torch.randn(out_channels, full, generator=draw, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(columns, full, generator=draw, dtype=torch.float64)).Q
        sizes = torch.exp(-torch.arange(full, dtype=torch.float64) / fall) + 0.02
        made.append((1 - 0.12 * part) * (left * sizes) @ right.mT)
    return torch.cat(made, dim=1).reshape(out_channels, in_channels, 3, 3).float()


def layer(values: Tensor) -> nn.Conv2d:
    """Return a convolution with this weight and no bias."""
    made = nn.Conv2d(values.shape[1], values.shape[0], 3, padding=1, bias=False)
    with torch.no_grad():
        made.weight.copy_(values)
    return made


def analysis() -> Analysis:
    """Return what is known of a network of three layers."""
    sizes = {"first": (32, 16, 2, 8.0), "second": (48, 32, 4, 5.0), "third": (48, 48, 2, 14.0)}
    layers = {name: layer(weight(*size, seed)) for seed, (name, size) in enumerate(sizes.items())}
    return analyze(nn.ModuleDict(layers), ALDS("operator"))
