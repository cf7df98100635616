"""Folding: a layer's weight as matrices, one per slice of its input channels, and back.

Shape conventions (used by every other file):

====================  =================================================================================
symbol                meaning
====================  =================================================================================
``F``                 output channels (rows of a Linear's weight)
``C``                 input channels
``kernel``            kernel axes: ``()`` for Linear, up to ``(depth, height, width)`` for Conv3d
``g``, groups         of the dense layer: group ``i`` of the outputs sees group ``i`` of the inputs alone
``k``, num_slices     equal consecutive parts of the input channels of each group; divides ``C / g``
``j``, rank           singular values kept per slice
``E``, ``D``          product of the kernel axes that go to the encoder, to the decoder; ``E * D = prod(kernel)``
weight                ``(F, C / g, *kernel)``, the memory order of torch's Linear and Conv
slices                ``(g * k, F / g * D, C / (g * k) * E)``: group by group, slice by slice, in channel order
encoder weight        ``(g * k * j, C / (g * k), *kernel)``, the decoder's axes of size 1; ``groups = g * k``, no bias
decoder weight        ``(F, k * j, *kernel)``, the encoder's axes of size 1; ``groups = g``, owns the bias
====================  =================================================================================

The input is always *sliced first, then folded*, in :func:`fold` alone: the error of a layer and the layer
that is built are made from the same matrices. Layer types whose weights torch holds with the input channels first
(transposed convolutions) are brought to this order, and back, by :func:`swap_channels`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor

FOLDINGS: dict[str, tuple[int, ...]] = {
    "kernel_in_encoder": (),
    "depth_in_decoder": (-3,),
    "height_in_decoder": (-2,),
    "width_in_decoder": (-1,),
    "kernel_in_decoder": (-3, -2, -1),
}
"""Name of each folding -> the kernel axes that go to the decoder, counted from the last, where the kernel has them."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer's weight.

    Args:
        out_channels: ``F``, at least 1.
        in_channels: ``C``, at least 1.
        kernel: sizes of the kernel axes; empty for a Linear layer.
        groups: ``g``, divides ``F`` and ``C``.
        sliceable: whether there may be more slices than one.

    Example::

        >>> Geometry(64, 32, (3, 3)).weight_shape
        (64, 32, 3, 3)
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    sliceable: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, ``(F, C / g, *kernel)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def slice_counts(self, max_slices: int | None = None) -> list[int]:
        """Return every number of slices that the layer can have, ascending.

        Example::

            >>> Geometry(8, 12, groups=2).slice_counts()
            [1, 2, 3, 6]
        """
        return slice_counts(self.in_channels // self.groups, max_slices if self.sliceable else 1)

    def work(self, counts: Iterable[int]) -> float:
        """Return how long the singular values of slicings take, up to a factor, to share layers out.

        ``g (m n min(m, n) + 5 sum_k k min(m, n / k)^3)``: products of the ``(m, n)`` matrix of each group with itself,
        and for each number of slices the eigenvalues of ``k`` small matrices, measured to take five times as long for
        their size.

        Args:
            counts: numbers of slices.

        Example::

            >>> Geometry(4, 6).work([1, 2])
            686.0
        """
        rows, columns = self.matrix_shape("kernel_in_encoder", 1)
        products = rows * columns * min(rows, columns)
        return float(self.groups * (products + 5 * sum(count * min(rows, columns // count) ** 3 for count in counts)))

    def decoder_kernel(self, folding: str) -> tuple[int, ...]:
        """Return the decoder's kernel: the size of its own axes, 1 for the encoder's."""
        own = decoder_axes(folding, len(self.kernel))
        return tuple(size if axis in own else 1 for axis, size in enumerate(self.kernel))

    def encoder_kernel(self, folding: str) -> tuple[int, ...]:
        """Return the encoder's kernel: the size of its own axes, 1 for the decoder's."""
        own = decoder_axes(folding, len(self.kernel))
        return tuple(1 if axis in own else size for axis, size in enumerate(self.kernel))

    def factor_shapes(self, folding: str, num_slices: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the encoder's and of the decoder's weight.

        Example::

            >>> Geometry(64, 32, (3, 3), groups=2).factor_shapes("height_in_decoder", num_slices=4, rank=5)
            ((40, 4, 1, 3), (64, 20, 3, 1))
        """
        blocks = self.groups * num_slices
        encoder = (blocks * rank, self.in_channels // blocks, *self.encoder_kernel(folding))
        return encoder, (self.out_channels, num_slices * rank, *self.decoder_kernel(folding))

    def matrix_shape(self, folding: str, num_slices: int) -> tuple[int, int]:
        """Return ``(F / g * D, C / (g * k) * E)``, the shape of one folded slice."""
        rows = self.out_channels // self.groups * prod(self.decoder_kernel(folding))
        return rows, self.in_channels // (self.groups * num_slices) * prod(self.encoder_kernel(folding))

    def full_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank of a slice, the smaller side of its matrix."""
        return min(self.matrix_shape(folding, num_slices))


def decoder_axes(folding: str, axes: int) -> tuple[int, ...]:
    """Return the kernel axes that the named folding gives to the decoder.

    Args:
        folding: a name in :data:`FOLDINGS`.
        axes: how many axes the kernel has.

    Raises:
        ValueError: If there is no folding of that name.

    Example::

        >>> decoder_axes("height_in_decoder", 2), decoder_axes("height_in_decoder", 3)
        ((0,), (1,))
    """
    if folding not in FOLDINGS:
        raise ValueError(f"`folding` must be one of {list(FOLDINGS)}, got {folding!r}.")
    return tuple(axes + axis for axis in FOLDINGS[folding] if axes + axis >= 0)


def slice_counts(in_channels: int, max_slices: int | None = None) -> list[int]:
    """Return every number of slices that divides the input channels, ascending.

    Example::

        >>> slice_counts(12), slice_counts(12, max_slices=4)
        ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    limit = in_channels if max_slices is None else min(max_slices, in_channels)
    return [count for count in range(1, limit + 1) if in_channels % count == 0]


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Exchange the two channel axes of a weight, group by group; done twice it gives the weight again.

    Args:
        weight: ``(C, F / g, *kernel)``, or ``(F, C / g, *kernel)``.
        groups: ``g``.

    Returns:
        ``(F, C / g, *kernel)``, or ``(C, F / g, *kernel)``.

    Example::

        >>> import torch
        >>> swap_channels(torch.zeros(6, 4, 3, 3), groups=2).shape
        torch.Size([8, 3, 3, 3])
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def swapped_shape(shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Return the shape that :func:`swap_channels` gives a weight of a shape.

    Example::

        >>> swapped_shape((6, 4, 3, 3), groups=2)
        (8, 3, 3, 3)
    """
    return (groups * shape[1], shape[0] // groups, *shape[2:])


def fold(weight: Tensor, folding: str, num_slices: int, groups: int = 1) -> Tensor:
    """Slice the input channels of a weight, then fold each slice to a matrix.

    Args:
        weight: ``(F, C / g, *kernel)``.
        folding: a name in :data:`FOLDINGS`.
        num_slices: ``k``, divides ``C / g``.
        groups: ``g``.

    Returns:
        ``(g * k, F / g * D, C / (g * k) * E)``; shares memory with ``weight`` where the strides allow it.

    Raises:
        ValueError: If the folding is unknown or ``num_slices`` does not divide ``C / g``.

    Source: arXiv 2107.11442, section 2.1 (slicing) and appendix (foldings). The paper's code slices rows of the
    folded matrix in two of the foldings and channels in the layer; here both are channels.

    Example::

        >>> import torch
        >>> fold(torch.zeros(64, 32, 3, 3), "height_in_decoder", 4).shape
        torch.Size([4, 192, 24])
    """
    (out_channels, in_channels), kernel = weight.shape[:2], weight.shape[2:]
    if num_slices < 1 or in_channels % num_slices:
        raise ValueError(
            f"`num_slices` must divide the {in_channels} input channels, got {num_slices}; "
            f"divisors: {slice_counts(in_channels)}."
        )
    own = decoder_axes(folding, len(kernel))
    decoder, encoder = ([4 + axis for axis in range(len(kernel)) if (axis in own) == mine] for mine in (True, False))
    sliced = weight.reshape(groups, out_channels // groups, num_slices, in_channels // num_slices, *kernel)
    ordered = sliced.permute(0, 2, 1, *decoder, 3, *encoder)
    rows = out_channels // groups * prod(kernel[axis] for axis in own)
    return ordered.reshape(groups * num_slices, rows, -1)


def unfold_encoder(matrices: Tensor, geometry: Geometry, folding: str) -> Tensor:
    """Return the encoder's weight ``(g * k * j, C / (g * k), *kernel)`` of matrices ``(g * k, j, C / (g * k) * E)``."""
    blocks, rank, _ = matrices.shape
    return matrices.reshape(blocks * rank, geometry.in_channels // blocks, *geometry.encoder_kernel(folding))


def unfold_decoder(matrices: Tensor, geometry: Geometry, folding: str) -> Tensor:
    """Return the decoder's weight ``(F, k * j, *kernel)`` of its matrices ``(g * k, F / g * D, j)``."""
    num_slices, rank, groups = matrices.shape[0] // geometry.groups, matrices.shape[2], geometry.groups
    kernel = geometry.decoder_kernel(folding)
    split = matrices.reshape(groups, num_slices, geometry.out_channels // groups, *kernel, rank)
    ordered = split.permute(0, 2, 1, split.dim() - 1, *range(3, split.dim() - 1))
    return ordered.reshape(geometry.out_channels, num_slices * rank, *kernel)


def decoder_matrices(decoder: Tensor, num_slices: int, groups: int = 1) -> Tensor:
    """Return the matrices ``(g * k, F / g * D, j)`` of a decoder's weight, the inverse of :func:`unfold_decoder`."""
    rows, rank = decoder.shape[0] // groups, decoder.shape[1] // num_slices
    split = decoder.reshape(groups, rows, num_slices, rank, -1)
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)


def compose(encoder: Tensor, decoder: Tensor, num_slices: int, groups: int = 1) -> Tensor:
    """Multiply the two factors back to the dense weight.

    Args:
        encoder: ``(g * k * j, C / (g * k), *kernel)``.
        decoder: ``(F, k * j, *kernel)``.
        num_slices: ``k``.
        groups: ``g``.

    Returns:
        ``(F, C / g, *kernel)``, differentiable in both factors.

    Example::

        >>> import torch
        >>> compose(torch.ones(4, 3, 1, 3), torch.ones(8, 4, 3, 1), num_slices=2).shape
        torch.Size([8, 6, 3, 3])
    """
    kernel = tuple(max(a, b) for a, b in zip(encoder.shape[2:], decoder.shape[2:], strict=True))
    left = decoder_matrices(decoder, num_slices, groups)
    joined = left @ encoder.reshape(len(left), left.shape[2], -1)  # one product per slice: (F / g, D) by (C / (gk), E)
    rows = (decoder.shape[0] // groups, *decoder.shape[2:])
    split = joined.reshape(groups, num_slices, *rows, encoder.shape[1], *encoder.shape[2:])
    axes = len(kernel)
    order = [0, 2, 1, 3 + axes]
    for axis in range(axes):
        order += [3 + axis, 4 + axes + axis]
    return split.permute(order).reshape(decoder.shape[0], num_slices * encoder.shape[1], *kernel)
