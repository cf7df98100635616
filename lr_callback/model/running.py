"""Running: a model over calibration batches, in eval mode and without gradients; who is told of its layers' calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lr_callback.common.untouched import as_written, untouched
from lr_callback.layers.layer_types import layer_type

Batch = TypeVar("Batch")
Seen = Callable[[nn.Module, Tensor, Tensor], None]
"""Told of a call of a layer: the layer, its inputs, its outputs."""


def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    layers: Iterable[nn.Module],
    see: Seen,
) -> int:
    """Run a model over batches, in eval mode and without gradients, and tell of each call of some layers.

    Returns:
        The number of batches.

    Raises:
        ValueError: If there are none.
    """
    run, count = runner(model, forward), 0
    with untouched(model), as_written(), watching(layers, see):
        for batch in batches:
            run(batch)
            count += 1
    if not count:
        raise ValueError("`batches` must hold at least one calibration batch, got none.")
    return count


def runner(model: nn.Module, forward: Callable[[Batch], object] | None) -> Callable[[Batch], object]:
    """Return what runs a model on a batch; by default on its first part, or with its entries as named arguments."""
    if forward is not None:
        return forward

    def run(batch: Batch) -> object:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)

    return run


@contextmanager
def watching(layers: Iterable[nn.Module], see: Seen) -> Iterator[None]:
    """Tell of each call of some layers, before their own hooks see the outputs."""
    with ExitStack() as stack:
        for layer in layers:
            handle: RemovableHandle = layer.register_forward_hook(_teller(layer, see), with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


def _teller(watched: nn.Module, see: Seen) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any], Tensor], None]:
    kind = layer_type(watched)
    assert kind is not None
    argument = kind.argument

    def tell(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], outputs: Tensor) -> None:
        if layer is watched:  # a layer and the one in its place share their hooks
            see(layer, inputs[0] if inputs else named[argument], outputs)

    return tell
