"""Folding: a layer's weight as matrices, one per slice of its input channels, and back.

Shape conventions (used by every other file):

====================  =================================================================================
symbol                meaning
====================  =================================================================================
``F``                 output channels (rows of a Linear's weight)
``C``                 input channels
``kernel``            kernel axes: ``()`` for Linear, ``(height, width)`` for Conv2d
``k``, num_slices     equal consecutive parts of the input channels; divides ``C``
``j``, rank           singular values kept per slice
``E``, ``D``          product of the kernel axes that go to the encoder, to the decoder; ``E * D = prod(kernel)``
weight                ``(F, C, *kernel)``, the memory order of torch
slices                ``(k, F * D, (C / k) * E)``: matrix ``i`` holds input channels ``i * C/k .. (i + 1) * C/k``
encoder weight        ``(k * j, C / k, *kernel)`` with the decoder's axes of size 1; ``groups = k``, no bias
decoder weight        ``(F, k * j, *kernel)`` with the encoder's axes of size 1; owns the bias
====================  =================================================================================

The input is always *sliced first, then folded*, in :func:`fold` alone: the error of a layer and the layer
that is built are made from the same matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor

FOLDINGS: dict[str, tuple[int, ...]] = {
    "kernel_in_encoder": (),
    "height_in_decoder": (0,),
    "width_in_decoder": (1,),
    "kernel_in_decoder": (0, 1),
}
"""Name of each folding -> the kernel axes that go to the decoder."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer's weight.

    Args:
        out_channels: ``F``, at least 1.
        in_channels: ``C``, at least 1.
        kernel: sizes of the kernel axes; empty for a Linear layer.

    Example::

        >>> Geometry(64, 32, (3, 3)).weight_shape
        (64, 32, 3, 3)
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...] = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, ``(F, C, *kernel)``."""
        return (self.out_channels, self.in_channels, *self.kernel)

    def work(self, counts: Iterable[int]) -> float:
        """Return how long the singular values of slicings take, up to a factor, to share layers out.

        ``m n min(m, n) + 5 sum_k k min(m, n / k)^3``: products of the ``(m, n)`` matrix with itself, and for each
        number of slices the eigenvalues of ``k`` small matrices, measured to take five times as long for their size.

        Args:
            counts: numbers of slices.

        Example::

            >>> Geometry(4, 6).work([1, 2])
            686.0
        """
        rows, columns = self.out_channels, self.in_channels * prod(self.kernel)
        products = rows * columns * min(rows, columns)
        return float(products + 5 * sum(count * min(rows, columns // count) ** 3 for count in counts))

    def decoder_kernel(self, folding: str) -> tuple[int, ...]:
        """Return the decoder's kernel: the size of its own axes, 1 for the encoder's."""
        own = decoder_axes(folding)
        return tuple(size if axis in own else 1 for axis, size in enumerate(self.kernel))

    def encoder_kernel(self, folding: str) -> tuple[int, ...]:
        """Return the encoder's kernel: the size of its own axes, 1 for the decoder's."""
        own = decoder_axes(folding)
        return tuple(1 if axis in own else size for axis, size in enumerate(self.kernel))

    def matrix_shape(self, folding: str, num_slices: int) -> tuple[int, int]:
        """Return ``(F * D, (C / k) * E)``, the shape of one folded slice."""
        rows = self.out_channels * prod(self.decoder_kernel(folding))
        return rows, self.in_channels // num_slices * prod(self.encoder_kernel(folding))

    def full_rank(self, folding: str, num_slices: int) -> int:
        """Return the largest rank of a slice, the smaller side of its matrix."""
        return min(self.matrix_shape(folding, num_slices))


def decoder_axes(folding: str) -> tuple[int, ...]:
    """Return the kernel axes that the named folding gives to the decoder.

    Raises:
        ValueError: If there is no folding of that name.

    Example::

        >>> decoder_axes("height_in_decoder")
        (0,)
    """
    if folding not in FOLDINGS:
        raise ValueError(f"`folding` must be one of {list(FOLDINGS)}, got {folding!r}.")
    return FOLDINGS[folding]


def distinct_foldings(geometry: Geometry, foldings: tuple[str, ...]) -> tuple[str, ...]:
    """Drop foldings that give the same matrices as another (1x1 kernels, Linear), and repeated names.

    Of those that agree the one with the fewest axes in the decoder stays: with a stride it costs the least.

    Example::

        >>> distinct_foldings(Geometry(8, 8, (1, 1)), ("kernel_in_decoder", "kernel_in_encoder"))
        ('kernel_in_encoder',)
    """
    kept: dict[tuple[int, ...], str] = {}
    for name in foldings:
        kernel = geometry.decoder_kernel(name)
        kept[kernel] = min(kept.get(kernel, name), name, key=lambda one: len(decoder_axes(one)))
    return tuple(kept.values())


def slice_counts(in_channels: int, max_slices: int | None = None) -> list[int]:
    """Return every number of slices that divides the input channels, ascending.

    Example::

        >>> slice_counts(12), slice_counts(12, max_slices=4)
        ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    limit = in_channels if max_slices is None else min(max_slices, in_channels)
    return [count for count in range(1, limit + 1) if in_channels % count == 0]


def fold(weight: Tensor, folding: str, num_slices: int) -> Tensor:
    """Slice the input channels of a weight, then fold each slice to a matrix.

    Args:
        weight: ``(F, C, *kernel)``.
        folding: a name in :data:`FOLDINGS`.
        num_slices: ``k``, divides ``C``.

    Returns:
        ``(k, F * D, (C / k) * E)``; shares memory with ``weight`` where the strides allow it.

    Raises:
        ValueError: If the folding is unknown or ``num_slices`` does not divide ``C``.

    Source: arXiv 2107.11442, section 2.1 (slicing) and appendix (foldings). The paper's code slices rows of the
    folded matrix in two of the foldings and channels in the layer; here both are channels.

    Example::

        >>> import torch
        >>> fold(torch.zeros(64, 32, 3, 3), "height_in_decoder", 4).shape
        torch.Size([4, 192, 24])
    """
    out_channels, in_channels = weight.shape[:2]
    if num_slices < 1 or in_channels % num_slices:
        raise ValueError(
            f"`num_slices` must divide the {in_channels} input channels, got {num_slices}; "
            f"divisors: {slice_counts(in_channels)}."
        )
    decoder, encoder = _kernel_dims(weight.dim() - 2, folding)
    sliced = weight.reshape(out_channels, num_slices, in_channels // num_slices, *weight.shape[2:])
    ordered = sliced.permute(1, 0, *decoder, 2, *encoder)
    rows = out_channels * prod(weight.shape[dim - 1] for dim in decoder)
    return ordered.reshape(num_slices, rows, -1)


def unfold_encoder(matrices: Tensor, geometry: Geometry, folding: str) -> Tensor:
    """Return the encoder's weight ``(k * j, C / k, *kernel)`` of its matrices ``(k, j, (C / k) * E)``."""
    num_slices, rank, _ = matrices.shape
    kernel = geometry.encoder_kernel(folding)
    return matrices.reshape(num_slices * rank, geometry.in_channels // num_slices, *kernel)


def unfold_decoder(matrices: Tensor, geometry: Geometry, folding: str) -> Tensor:
    """Return the decoder's weight ``(F, k * j, *kernel)`` of its matrices ``(k, F * D, j)``."""
    num_slices, _, rank = matrices.shape
    kernel = geometry.decoder_kernel(folding)
    split = matrices.reshape(num_slices, geometry.out_channels, *kernel, rank)
    ordered = split.permute(1, 0, split.dim() - 1, *range(2, split.dim() - 1))
    return ordered.reshape(geometry.out_channels, num_slices * rank, *kernel)


def decoder_matrices(decoder: Tensor, num_slices: int) -> Tensor:
    """Return the matrices ``(k, F * D, j)`` of a decoder's weight, the inverse of :func:`unfold_decoder`."""
    split = decoder.reshape(decoder.shape[0], num_slices, decoder.shape[1] // num_slices, -1)
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def compose(encoder: Tensor, decoder: Tensor, num_slices: int) -> Tensor:
    """Multiply the two factors back to the dense weight.

    Args:
        encoder: ``(k * j, C / k, *kernel)``.
        decoder: ``(F, k * j, *kernel)``.
        num_slices: ``k``.

    Returns:
        ``(F, C, *kernel)``, differentiable in both factors.

    Example::

        >>> import torch
        >>> compose(torch.ones(4, 3, 1, 3), torch.ones(8, 4, 3, 1), num_slices=2).shape
        torch.Size([8, 6, 3, 3])
    """
    kernel = tuple(max(a, b) for a, b in zip(encoder.shape[2:], decoder.shape[2:], strict=True))
    rank = encoder.shape[0] // num_slices
    left, right = decoder_matrices(decoder, num_slices), encoder.reshape(num_slices, rank, -1)
    joined = left @ right  # one product per slice: (F, D) by (C / k, E)
    rows = (decoder.shape[0], *decoder.shape[2:])
    columns = (encoder.shape[1], *encoder.shape[2:])
    split = joined.reshape(num_slices, *rows, *columns)
    axes = len(kernel)
    order = [1, 0, 2 + axes]
    for axis in range(axes):
        order += [2 + axis, 3 + axes + axis]
    merged = split.permute(order)
    return merged.reshape(decoder.shape[0], num_slices * encoder.shape[1], *kernel)


def _kernel_dims(axes: int, folding: str) -> tuple[list[int], list[int]]:
    """Return the dims of the decoder's and of the encoder's kernel axes in ``(F, k, C / k, *kernel)``."""
    own = decoder_axes(folding)
    decoder = [3 + axis for axis in range(axes) if axis in own]
    encoder = [3 + axis for axis in range(axes) if axis not in own]
    return decoder, encoder
