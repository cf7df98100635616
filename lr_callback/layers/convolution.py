"""Convolution: nn.Conv1d, 2d and 3d and the transposed ones, with groups, each as two of the same type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lr_callback.decisions.costs import Call
from lr_callback.layers.base import FactorizedLayer, any_weight, dense_bias
from lr_callback.mathematics.folding import Geometry, decoder_axes

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions of a weight -> the memory format with the channels last."""


class FactorizedConvolution(FactorizedLayer):
    """A convolution as two: one in smaller groups, then one over all of its outputs; each has its own kernel axes.

    Stride, padding, padding mode and dilation act on each axis alone, and go with the axis.

    Args:
        dense: a layer whose configuration is taken over; its weights are not read.
        num_slices: ``k``, divides the input channels of a group; the encoder has ``k`` times the groups.
        rank: ``j`` per slice.
        folding: which kernel axes the decoder has.

    Attributes:
        dense_class: the dense type.
        axes: number of kernel axes.
        in_decoder: whether the decoder has the axis, for each.
    """

    dense_class: ClassVar[Callable[..., _ConvNd]]
    axes: ClassVar[int]
    attributes = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
        "padding_mode",
    )
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def own_attributes(cls) -> set[str]:
        """Return the names of what a layer of this type is given when it is made."""
        return {*super().own_attributes(), "in_decoder"}

    @classmethod
    def geometry(cls, layer: nn.Module) -> Geometry:
        """Return the sizes of the weight."""
        assert isinstance(layer, (_ConvNd, FactorizedConvolution))
        return Geometry(layer.out_channels, layer.in_channels, tuple(layer.kernel_size), layer.groups)

    @classmethod
    def call(cls, inputs: Tensor, outputs: Tensor) -> Call:
        """Describe one observed call."""
        batch = inputs.shape[0] if inputs.dim() == cls.axes + 2 else 1
        return Call(batch, tuple(inputs.shape[-cls.axes :]), tuple(outputs.shape[-cls.axes :]))

    @classmethod
    def patches(cls, layer: nn.Module, inputs: Tensor, outputs: Tensor, chosen: Tensor | None = None) -> Tensor | None:
        """Return the inputs under each kernel position; of a transposed layer what each brings to an output."""
        assert isinstance(layer, (_ConvNd, FactorizedConvolution))
        inputs, outputs = (one if one.dim() == cls.axes + 2 else one.unsqueeze(0) for one in (inputs, outputs))
        if not layer.transposed:
            return _gathered(layer, inputs, tuple(outputs.shape[-cls.axes :]), chosen)
        # A convolution of each channel with kernels that are one at a single position takes the patches apart.
        positions = prod(layer.kernel_size)
        one_hot = torch.eye(positions, dtype=inputs.dtype, device=inputs.device)
        one_hot = one_hot.reshape(1, positions, *layer.kernel_size).repeat(layer.in_channels, *[1] * (cls.axes + 1))
        apart = cls.dense_class(
            layer.in_channels,
            layer.in_channels * positions,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            output_padding=layer.output_padding,
            groups=layer.in_channels,
            bias=False,
            device="meta",
        )
        apart.weight = nn.Parameter(one_hot, requires_grad=False)
        rows = _by_position(apart(inputs, list(outputs.shape[-cls.axes :])), layer.groups, cls.axes)
        return rows if chosen is None else rows[:, chosen]

    @classmethod
    def positions(cls, layer: nn.Module, inputs: Tensor) -> Tensor:
        """Return the inputs of one call position by position."""
        assert isinstance(layer, (_ConvNd, FactorizedConvolution))
        return _by_position(inputs, layer.groups, cls.axes)

    @classmethod
    def results(cls, layer: nn.Module, outputs: Tensor) -> Tensor:
        """Return the outputs of one call position by position."""
        assert isinstance(layer, (_ConvNd, FactorizedConvolution))
        return _by_position(outputs, layer.groups, cls.axes)

    def _factors(self, dense: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
        width, own = self.groups * self.num_slices * rank, decoder_axes(self.folding, self.axes)
        other = tuple(axis for axis in range(self.axes) if axis not in own)
        self.in_decoder = [axis in own for axis in range(self.axes)]  # not the axes: TorchScript takes no empty list
        encoder = self._convolution(dense, (self.in_channels, width), other, self.groups * self.num_slices, bias=False)
        has_bias = dense_bias(dense) is not None
        return encoder, self._convolution(dense, (width, self.out_channels), own, self.groups, has_bias)

    def dense_skeleton(self) -> nn.Module:
        """Return a dense layer of the same configuration."""
        channels, has_bias = (self.in_channels, self.out_channels), self.bias is not None
        return self._convolution(self, channels, tuple(range(self.axes)), self.groups, has_bias)

    def _convolution(
        self, like: nn.Module, channels: tuple[int, int], axes: tuple[int, ...], groups: int, bias: bool
    ) -> nn.Module:
        """Return a convolution that has the named kernel axes of this one, and is pointwise along the rest."""
        weight = any_weight(like)

        def own(values: Sequence[int], pointwise: int) -> tuple[int, ...]:
            return tuple(values[axis] if axis in axes else pointwise for axis in range(self.axes))

        options: dict[str, Any] = {"output_padding": own(self.output_padding, 0)} if self.transposed else {}
        made = self.dense_class(
            *channels,
            own(self.kernel_size, 1),
            stride=own(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else own(self.padding, 0),
            dilation=own(self.dilation, 1),
            groups=groups,
            bias=bias,
            padding_mode=self.padding_mode,
            device="meta",
            dtype=weight.dtype,
            **options,
        ).to_empty(device=weight.device)
        weights = like.factors if isinstance(like, FactorizedLayer) else (weight,)
        last = channels_last(weights)
        return made if last is None else made.to(memory_format=last)


def _gathered(
    layer: _ConvNd | FactorizedConvolution, inputs: Tensor, sizes: tuple[int, ...], chosen: Tensor | None
) -> Tensor:
    """Take the patches of a convolution at some positions of its output, ``(g, n, C / g * prod(kernel))``."""
    device, axes = inputs.device, len(sizes)
    padded = _padded(layer, inputs).movedim(1, -1)
    flat = torch.arange(len(inputs) * prod(sizes), device=device) if chosen is None else chosen
    image, *outputs = torch.unravel_index(flat, (len(inputs), *sizes))
    where = [image.reshape(-1, *[1] * axes)]
    for axis, start in enumerate(outputs):
        steps = torch.arange(layer.kernel_size[axis], device=device) * layer.dilation[axis]
        at = start.unsqueeze(1) * layer.stride[axis] + steps
        where.append(at.reshape(len(flat), *[1] * axis, -1, *[1] * (axes - 1 - axis)))
    patches = padded[tuple(where)].movedim(-1, 1)
    return patches.reshape(len(flat), layer.groups, -1).transpose(0, 1)


def _padded(layer: _ConvNd | FactorizedConvolution, inputs: Tensor) -> Tensor:
    """Return the inputs with what the layer pads them with; of an odd number more comes last, as in torch."""
    both: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            both += [whole // 2, whole - whole // 2]
        else:
            both += [layer.padding[axis]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, both, mode=mode)


def _by_position(values: Tensor, groups: int, axes: int) -> Tensor:
    """Bring ``(*batch, channels, *sizes)`` to ``(g, positions, channels / g)``."""
    grouped = values.reshape(-1, groups, values.shape[-axes - 1] // groups, prod(values.shape[-axes:]))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def channels_last(weights: Sequence[Tensor]) -> torch.memory_format | None:
    """Return the memory format with the channels last that one of the weights of a layer has; None: none has it."""
    last = CHANNELS_LAST.get(weights[0].dim())
    return last if last is not None and any(_is_laid_out(weight, last) for weight in weights) else None


def _is_laid_out(weight: Tensor, last: torch.memory_format) -> bool:
    """Return whether a weight was given a memory format; sizes of 1 leave only the strides to tell."""
    plain = torch.empty(weight.shape, device="meta")
    return weight.stride() == plain.to(memory_format=last).stride() != plain.stride()


class FactorizedConv1d(FactorizedConvolution):
    """A Conv1d as two.

    Example::

        >>> layer = FactorizedConv1d(nn.Conv1d(8, 16, 3, groups=2), num_slices=2, rank=3)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(1, 8, 9)).shape
        (torch.Size([12, 2, 3]), torch.Size([16, 6, 1]), torch.Size([1, 16, 7]))
    """

    dense_class, axes = nn.Conv1d, 1


class FactorizedConv2d(FactorizedConvolution):
    """A Conv2d as two.

    Example::

        >>> dense = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        >>> layer = FactorizedConv2d(dense, num_slices=4, rank=3)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(1, 8, 9, 9)).shape
        (torch.Size([12, 2, 3, 3]), torch.Size([16, 12, 1, 1]), torch.Size([1, 16, 5, 5]))
    """

    dense_class, axes = nn.Conv2d, 2


class FactorizedConv3d(FactorizedConvolution):
    """A Conv3d as two.

    Example::

        >>> layer = FactorizedConv3d(nn.Conv3d(4, 6, 3), num_slices=2, rank=1, folding="depth_in_decoder")
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape
        (torch.Size([2, 2, 1, 3, 3]), torch.Size([6, 2, 3, 1, 1]))
    """

    dense_class, axes = nn.Conv3d, 3


class _FactorizedTransposed(FactorizedConvolution):
    """A transposed convolution as two; torch holds the input channels of its weights first."""

    swapped = frozenset({"dense", "encoder", "decoder"})
    works = "at inputs"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the encoder, then the decoder.

        Args:
            input: as the dense layer takes it.
            output_size: of the output's spatial axes, where the stride leaves a choice.
        """
        if output_size is None:
            outputs: Tensor = self.decoder(self.encoder(input))
            return outputs
        axes = len(self.kernel_size)
        wanted = output_size[-axes:]  # torch takes the sizes of batch and channels before them, too
        inner = list(wanted)
        if len(wanted) == axes:  # torch refuses any other number
            for axis, held in enumerate(self.in_decoder):
                if held:
                    inner[axis] = input.shape[axis - axes]
        sized: Tensor = self.decoder(self.encoder(input, inner), wanted)
        return sized


class FactorizedConvTranspose1d(_FactorizedTransposed):
    """A ConvTranspose1d as two."""

    dense_class, axes = nn.ConvTranspose1d, 1


class FactorizedConvTranspose2d(_FactorizedTransposed):
    """A ConvTranspose2d as two.

    Example::

        >>> dense = nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1)
        >>> layer = FactorizedConvTranspose2d(dense, num_slices=4, rank=3)
        >>> layer.encoder.weight.shape, layer.decoder.weight.shape, layer(torch.zeros(1, 8, 5, 5)).shape
        (torch.Size([8, 3, 4, 4]), torch.Size([12, 16, 1, 1]), torch.Size([1, 16, 10, 10]))
    """

    dense_class, axes = nn.ConvTranspose2d, 2


class FactorizedConvTranspose3d(_FactorizedTransposed):
    """A ConvTranspose3d as two."""

    dense_class, axes = nn.ConvTranspose3d, 3
