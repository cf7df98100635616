"""Memory: that of outputs is kept and used again while times are taken, as it is inside a network.

Without an allocator that keeps blocks, as a GPU's does, large ones are given back to the system at each call and come
anew, zeroed, page by page: what a small form of a layer takes can double by that, and whether it does depends on what
else the process has freed before. So a gap is left in the heap, out of which all calls have their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from lr_callback.units.latency.inputs import LayerInput

_BLOCK = 2**24
"""Bytes of a block that is small enough for the heap: glibc takes those of more than ``2 ** 25`` beside it."""
_TIMES = 8
"""Room for what is alive at once in a run, in blocks as large as the largest input of a layer."""


def room_for(inputs: Iterable[LayerInput]) -> int:
    """Return the bytes of a gap that suffices for the calls of some layers, and for their inputs."""
    sizes = {one: torch.Size(one.shape).numel() * one.dtype.itemsize for one in inputs}
    return sum(sizes.values()) + _TIMES * max(sizes.values(), default=0)


@contextmanager
def reused_memory(size: int, device: torch.device) -> Iterator[None]:
    """Keep the memory of what is freed meanwhile in the process, on a CPU; it takes none until it is used.

    Args:
        size: bytes that are kept at most.
        device: that is worked on; other kinds keep memory themselves.
    """
    if device.type != "cpu":
        yield
        return
    torch.empty(_BLOCK, dtype=torch.uint8)  # once one was freed, glibc takes others of its size from the heap
    blocks = [torch.empty(_BLOCK, dtype=torch.uint8) for _ in range(size // _BLOCK + 2)]
    last = blocks.pop()  # above the gap, lest it is given back
    blocks.clear()
    try:
        yield
    finally:
        del last
