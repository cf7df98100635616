"""Running: a model over calibration batches, in eval mode and without gradients; who is told of its layers' calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lr_callback.common.table import on_one_line
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


def told(model: nn.Module, run: Callable[[], object], what: str, way_out: str) -> Callable[[], object]:
    """Return the same run of a model, which says where it fails.

    Args:
        model: that is run.
        run: calls it.
        what: must be possible.
        way_out: what to do about it.
    """

    def tell() -> object:
        try:
            return run()
        except Exception as error:  # whatever the model raises
            mode = "as it is trained" if model.training else "in eval mode without gradients"
            raise ValueError(
                f"{what} {mode}, and raised {type(error).__name__}: {on_one_line(error)}; {way_out}. "
                "Nothing was changed."
            ) from error

    return tell


def check_can_run(model: nn.Module) -> None:
    """Refuse a model without values, before it is run.

    Raises:
        ValueError: If a parameter or buffer is not initialised yet (a lazy layer), or on the meta device.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ValueError(
                f"{name}: must be initialised before the model is run to count or time it, found a lazy one, whose "
                "shape the first batch decides; run one batch first. Nothing was changed."
            )
        if value.device.type == "meta":
            raise ValueError(
                f"{name}: must be on a device where the model can be run to count or time it, found it on the meta "
                "device; call `model.to_empty(device=...)` and load its weights, or keep parameters or bytes, which "
                "need no run. Nothing was changed."
            )
