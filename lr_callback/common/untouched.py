"""Untouched: a model is run, and is afterwards as it was: modes, buffers, random state."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_KEPT = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATING})
"""Dtypes of buffers that a model writes; torch cannot copy or compare all others."""


@contextmanager
def as_written() -> Iterator[None]:
    """Run what is compiled as it is written: a compiled graph shows neither its layers nor, perhaps, its products."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        yield


def putting_back(values: Iterable[Tensor]) -> Callable[[], None]:
    """Return what gives tensors the values again that they have now, in place."""
    kept = [(value, value.detach().clone()) for value in values]

    @torch.no_grad()
    def put_back() -> None:
        for value, former in kept:
            value.copy_(former)

    return put_back


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that are written in between: some models count their calls in one, in eval mode too.

    One that another shape takes the place of is a cache, which other attributes of its module describe, and stays.
    """
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if type(buffer) is Tensor and buffer.dtype in _KEPT and buffer.layout == torch.strided and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            _put_back(module, name, buffer, before)


@torch.no_grad()
def _put_back(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    # Versions do not tell: batch_norm writes its running statistics without a new one.
    if buffer.shape == before.shape and not buffer.is_inference() and not torch.equal(buffer, before):
        buffer.copy_(before)
    now = dict(module._buffers.items()).get(name)  # TorchScript's is no dict
    if now is None or now is buffer or (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
        return
    module._buffers[name] = buffer


@contextmanager
def kept_random() -> Iterator[None]:
    """Put back the random states that a model may draw from: torch's, Python's, and numpy's where that is imported."""
    numpy, own = sys.modules.get("numpy"), random.getstate()
    drawn = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(drawn)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients; give back modes, buffers and the random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused path of nn.TransformerEncoder hides its products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), kept_random(), kept_buffers(model):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Put a model into the mode in which it is trained, inside :func:`untouched`, where gradients are kept.

    Modules that are in eval mode in a model that is not, for they are frozen, stay so.
    """
    modes = {module: module.training for module in model.modules()}
    is_trained = model.training
    with untouched(model), torch.enable_grad():
        model.train()
        if is_trained:
            for module, mode in modes.items():
                module.training = mode
        yield
