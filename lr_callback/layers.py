"""Layers: the factorized forms of Linear and Conv2d.

A new layer type is one class here and one row in the table of :mod:`lr_callback.layer_types`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from inspect import getmembers
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lr_callback.folding import compose, decoder_axes


class SlicedLinear(nn.Module):
    """Apply one bias-free linear map to each slice of the features: a Linear with groups.

    Args:
        in_features: divisible by ``num_slices``.
        out_features: divisible by ``num_slices``.
        num_slices: number of equal parts of the input and of the output.
        device: of the weight.
        dtype: of the weight.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``, weight ``(out_features, in_features / num_slices)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_slices: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_slices = in_features, out_features, num_slices
        self.weight = nn.Parameter(torch.empty(out_features, in_features // num_slices, device=device, dtype=dtype))
        if self.weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Apply each slice's map."""
        # One batched product with the slices as its batch, however many leading dimensions there are.
        width = self.weight.shape[1]
        sliced = features.reshape(-1, self.num_slices, width).transpose(0, 1)
        mapped = torch.bmm(sliced, self.weight.reshape(self.num_slices, -1, width).mT)
        shape = list(features.shape[:-1])  # TorchScript takes a list here, and nothing unpacked
        shape.append(self.out_features)
        return mapped.transpose(0, 1).reshape(shape)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, num_slices={self.num_slices}"


def _linear_encoder(in_features: int, out_features: int, num_slices: int, dtype: torch.dtype) -> nn.Module:
    """Return an encoder on the meta device; of one slice an ``nn.Linear``, which quantization and adapters look for."""
    if num_slices == 1:
        return nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    return SlicedLinear(in_features, out_features, num_slices, device="meta", dtype=dtype)


class FactorizedLayer(nn.Module, ABC):
    """A layer as two: an encoder over slices of the input channels, then a decoder that owns the bias.

    Args:
        encoder: first factor, without bias.
        decoder: second factor, with the dense layer's bias if it has one.
        folding: which kernel axes the decoder has.
        num_slices: equal parts of the input channels.
    """

    __jit_unused_properties__: ClassVar[list[str]]

    def __init_subclass__(cls, **options: object) -> None:
        """Keep TorchScript from compiling the properties: only ``forward`` is what a layer computes."""
        super().__init_subclass__(**options)
        cls.__jit_unused_properties__ = [name for name, _ in getmembers(cls, lambda one: isinstance(one, property))]

    def __init__(self, encoder: nn.Module, decoder: nn.Module, folding: str, num_slices: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.folding, self.num_slices = folding, num_slices

    def forward(self, input: Tensor) -> Tensor:
        """Apply the encoder, then the decoder; the argument is named as in torch, for calls by name."""
        outputs: Tensor = self.decoder(self.encoder(input))
        return outputs

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The weights of encoder and decoder."""
        return weight_of(self.encoder), weight_of(self.decoder)

    @property
    def rank(self) -> int:
        """Singular values kept per slice."""
        return self.factors[0].shape[0] // self.num_slices

    @property
    def weight(self) -> Tensor:
        """The product of the factors, shaped as the dense weight; differentiable, made anew at each use."""
        return compose(*self.factors, self.num_slices)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, held by the decoder."""
        return _bias_of(self.decoder)

    @abstractmethod
    def dense_skeleton(self) -> nn.Module:
        """Return the dense layer of the same configuration, its weights not set; draws no random numbers."""

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Multiply the factors back: return the dense layer, with a copy of the bias."""
        dense = self.dense_skeleton()
        weight_of(dense).copy_(self.weight)
        bias = _bias_of(dense)
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe the structure."""
        return f"folding={self.folding}, num_slices={self.num_slices}, rank={self.rank}"


class FactorizedLinear(FactorizedLayer):
    """A Linear as two: ``num_slices`` small maps side by side, then one over all of their outputs.

    Args:
        dense: a layer of the configuration to take over (sizes, bias, device, dtype); its weights are not read.
        num_slices: ``k``, divides ``in_features``.
        rank: ``j`` per slice.
        folding: for uniformity; a Linear has one folding.

    Example::

        >>> layer = FactorizedLinear(nn.Linear(12, 5), num_slices=3, rank=2)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(7, 12)).shape
        (torch.Size([6, 4]), torch.Size([5, 6]), torch.Size([7, 5]))
    """

    def __init__(
        self, dense: nn.Linear | FactorizedLinear, num_slices: int, rank: int, folding: str = "kernel_in_encoder"
    ) -> None:
        like, width, has_bias = _any_weight(dense), num_slices * rank, dense_bias(dense) is not None
        encoder = _linear_encoder(dense.in_features, width, num_slices, like.dtype)
        decoder = nn.Linear(width, dense.out_features, bias=has_bias, device="meta", dtype=like.dtype)
        encoder.to_empty(device=like.device)
        decoder.to_empty(device=like.device)
        super().__init__(encoder, decoder, folding, num_slices)
        self.in_features: int = dense.in_features
        self.out_features: int = dense.out_features

    def dense_skeleton(self) -> nn.Linear:
        """Return an ``nn.Linear`` of the same sizes."""
        like, has_bias = _any_weight(self), self.bias is not None
        made = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta", dtype=like.dtype)
        return made.to_empty(device=like.device)


class FactorizedConv2d(FactorizedLayer):
    """A Conv2d as two: a convolution in groups, then one over all of its outputs; each has its own kernel axes.

    Args:
        dense: a layer of the configuration to take over; ``groups`` is 1; its weights are not read.
        num_slices: ``k``, divides ``in_channels``; the encoder's groups.
        rank: ``j`` per slice.
        folding: which kernel axes the decoder has; stride, padding and dilation go with their axis.

    Example::

        >>> dense = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        >>> layer = FactorizedConv2d(dense, num_slices=4, rank=3)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(1, 8, 9, 9)).shape
        (torch.Size([12, 2, 3, 3]), torch.Size([16, 12, 1, 1]), torch.Size([1, 16, 5, 5]))
    """

    def __init__(
        self, dense: nn.Conv2d | FactorizedConv2d, num_slices: int, rank: int, folding: str = "kernel_in_encoder"
    ) -> None:
        width, axes = num_slices * rank, decoder_axes(folding)
        other = tuple(axis for axis in (0, 1) if axis not in axes)
        has_bias = dense_bias(dense) is not None
        encoder = _convolution(dense, dense.in_channels, width, other, groups=num_slices, bias=False)
        decoder = _convolution(dense, width, dense.out_channels, axes, groups=1, bias=has_bias)
        super().__init__(encoder, decoder, folding, num_slices)
        self.in_channels: int = dense.in_channels
        self.out_channels: int = dense.out_channels
        self.groups = 1
        self.kernel_size: tuple[int, ...] = dense.kernel_size
        self.stride: tuple[int, ...] = dense.stride
        self.dilation: tuple[int, ...] = dense.dilation
        self.padding: str | tuple[int, ...] = dense.padding
        self.padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = dense.padding_mode

    def dense_skeleton(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` of the same configuration."""
        has_bias = self.bias is not None
        return _convolution(self, self.in_channels, self.out_channels, (0, 1), groups=1, bias=has_bias)


def _convolution(
    like: nn.Conv2d | FactorizedConv2d,
    in_channels: int,
    out_channels: int,
    axes: tuple[int, ...],
    groups: int,
    bias: bool,
) -> nn.Conv2d:
    """Return a convolution that has the named kernel axes of another, and is pointwise along the rest."""
    weight = _any_weight(like)

    def own(values: tuple[int, ...], pointwise: int) -> tuple[int, int]:
        first, second = (values[axis] if axis in axes else pointwise for axis in (0, 1))
        return first, second

    made = nn.Conv2d(
        in_channels,
        out_channels,
        own(like.kernel_size, 1),
        stride=own(like.stride, 1),
        padding=like.padding if isinstance(like.padding, str) else own(like.padding, 0),
        dilation=own(like.dilation, 1),
        groups=groups,
        bias=bias,
        padding_mode=like.padding_mode,
        device="meta",
        dtype=weight.dtype,
    ).to_empty(device=weight.device)
    weights = like.factors if isinstance(like, FactorizedLayer) else (weight,)
    last = any(_is_channels_last(one) for one in weights)
    return made.to(memory_format=torch.channels_last) if last else made


def _is_channels_last(weight: Tensor) -> bool:
    """Return whether a weight was laid out in channels_last; sizes of 1 leave only the strides to tell."""
    plain = torch.empty(weight.shape, device="meta")
    return weight.stride() == plain.to(memory_format=torch.channels_last).stride() != plain.stride()


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the dense weight of a dense or factorized layer, detached."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def dense_bias(layer: nn.Module) -> nn.Parameter | None:
    """Return the bias of a dense or factorized layer."""
    return layer.bias if isinstance(layer, FactorizedLayer) else _bias_of(layer)


def _any_weight(layer: nn.Module) -> nn.Parameter:
    """Return a weight with the device, dtype and memory format of a dense or factorized layer."""
    return layer.factors[0] if isinstance(layer, FactorizedLayer) else weight_of(layer)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a dense layer."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _bias_of(layer: nn.Module) -> nn.Parameter | None:
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias
