"""Inputs: what a layer is called with, as far as its time depends on it, and the like of it, made up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lr_callback.layers import CHANNELS_LAST


@dataclass(frozen=True)
class LayerInput:
    """The input of one call of a layer.

    Args:
        shape: of the tensor, the batch included.
        dtype: of its entries.
        channels_last: whether it has that memory format.
        strides: of a tensor that neither has that format nor is contiguous, such as a transposed one; else none.
        autocast: dtype of autocast during the call; None: off.

    Example::

        >>> str(LayerInput.of(torch.zeros(2, 3, 8, 8)))
        '2x3x8x8 float32'
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    autocast: torch.dtype | None = None
    strides: tuple[int, ...] = ()

    @classmethod
    def of(cls, inputs: Tensor) -> LayerInput:
        """Describe the input of a call that is being made."""
        last, kind = CHANNELS_LAST.get(inputs.dim()), inputs.device.type
        is_last = last is not None and inputs.is_contiguous(memory_format=last) and not inputs.is_contiguous()
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        is_plain = is_last or inputs.layout != torch.strided or inputs.is_contiguous()
        strides = () if is_plain else inputs.stride()
        return cls(tuple(inputs.shape), inputs.dtype, is_last, autocast, strides)

    def made(self, device: torch.device, numbers: int) -> Tensor:
        """Return such an input, with the same entries each time and without a draw from the random state.

        Args:
            device: that it is on.
            numbers: above all entries, where these are whole numbers (of rows to look up).
        """
        count = torch.arange(self._entries, device=device)
        flat = torch.sin(count.float()) if self.dtype.is_floating_point else count % numbers
        if self.strides:
            return flat.to(self.dtype).as_strided(self.shape, self.strides)
        values = flat.to(self.dtype).reshape(self.shape)
        return values.contiguous(memory_format=CHANNELS_LAST[values.dim()]) if self.channels_last else values

    @property
    def _entries(self) -> int:
        """Number of those that it has in memory: more than in the tensor where it is a part of a larger one."""
        if not self.strides or 0 in self.shape:
            return torch.Size(self.shape).numel()
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    def __str__(self) -> str:
        """Return it as text, by which it is known in files."""
        parts = ["x".join(map(str, self.shape)), dtype_name(self.dtype)]
        parts += ["channels_last"] if self.channels_last else []
        parts += [f"strides {'x'.join(map(str, self.strides))}"] if self.strides else []
        return " ".join([*parts, *([f"autocast {dtype_name(self.autocast)}"] if self.autocast is not None else [])])


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, without torch's."""
    return str(dtype).removeprefix("torch.")
