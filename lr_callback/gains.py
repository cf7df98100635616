"""Gains: what the BatchNorm right after a layer multiplies each of its outputs with.

In eval mode a BatchNorm layer is ``y = gamma (x - mean) / sqrt(var + eps) + beta``: an error of output ``f`` of the
layer before counts ``gamma_f^2 / (var_f + eps)`` times in the squared error of what goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.collect import run_batches
from lr_callback.find import find_layers
from lr_callback.importance import Importance
from lr_callback.layer_types import layer_type
from lr_callback.processes import Processes

Batch = TypeVar("Batch")


def batchnorm_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[Batch], object] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    processes: Processes | None = None,
) -> dict[str, Importance]:
    """Find what BatchNorm layers multiply the outputs of the layers before them with, for ``error="batchnorm"``.

    A BatchNorm layer is that of a layer if what it takes is the very tensor that the layer gives, unchanged; of a layer
    with several of them the mean counts. One without statistics of its own counts with those of the batch.

    Args:
        model: on the device of the batches; is not changed.
        batches: of the training; the first one is run.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect.collect_moments`.
        include: glob patterns of layer names; only these are looked at. None: all.
        exclude: glob patterns of layer names that are left out.
        processes: of a distributed run; all get what the first one finds.

    Returns:
        Layer name -> the weights of its outputs; without weights, so that all of them count the same, for a layer that
        no BatchNorm follows. Layers that were not called have no entry.

    Raises:
        ValueError: If there are no batches, or no layer is followed by a BatchNorm.
        RuntimeError: If another process failed.

    Example::

        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        >>> model[1].running_var.copy_(torch.tensor([1.0, 4.0]))
        tensor([1., 4.])
        >>> batchnorm_importance(model, [torch.randn(5, 3)])["0"].outputs
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    layers = find_layers(model, include, exclude).layers

    def find() -> dict[str, Importance]:
        found = _followed(model, batches, forward, list(layers.values()))
        gains = {name: found[layer] for name, layer in layers.items() if layer in found}
        if not any(gains.values()):
            raise ValueError(
                "error='batchnorm' weighs the outputs of a layer by the BatchNorm right after it, and none of the "
                f"{len(gains)} layer(s) that were called is followed by one. Choose error='activation', or another one."
            )
        return {name: _importance(name, of) for name, of in gains.items()}

    return (processes or Processes()).first(find)


def _importance(name: str, gains: Sequence[Tensor]) -> Importance:
    try:
        return Importance(outputs=torch.stack(list(gains)).mean(0) if gains else None)
    except ValueError as error:
        raise ValueError(f"{name}: the BatchNorm after it cannot weigh its outputs. {error}") from error


def _followed(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None,
    layers: Sequence[nn.Module],
) -> dict[nn.Module, list[Tensor]]:
    """Return the gains of the BatchNorm layers after each layer that is called on the first batch."""
    given: dict[int, tuple[ref[Tensor], int, nn.Module]] = {}
    found: dict[nn.Module, list[Tensor]] = {}

    def see(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        found.setdefault(layer, [])
        if _is_by_channel(layer, outputs):
            given[id(outputs)] = ref(outputs), _version(outputs), layer

    def meet(norm: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = arguments[0] if arguments else named["input"]
        kept, version, layer = given.get(id(inputs), (None, 0, None))
        # An id may be of a tensor that is gone, and what was changed in place is no layer's output any more.
        is_kept = kept is not None and kept() is inputs
        if is_kept and version == _version(inputs) and layer is not None:
            assert isinstance(norm, _BatchNorm)
            found[layer].append(_gain(norm, inputs))

    with _meeting(model, meet):
        run_batches(model, islice(batches, 1), forward, layers, see)
    return found


def _is_by_channel(layer: nn.Module, outputs: Tensor) -> bool:
    """Return whether a layer's outputs are on the axis that a BatchNorm takes for its channels, the second."""
    kind = layer_type(layer)
    assert kind is not None
    return outputs.dim() == 2 or bool(kind.geometry(layer).kernel)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _meeting(model: nn.Module, meet: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Tell of each call of a BatchNorm layer before it happens, as it comes."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                handle = module.register_forward_pre_hook(meet, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _gain(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """Return ``gamma^2 / (var + eps)`` of each channel, float64 on the CPU."""
    others = [axis for axis in range(inputs.dim()) if axis != 1]
    variance = norm.running_var if norm.running_var is not None else inputs.var(others, unbiased=False)
    gamma = torch.ones_like(variance) if norm.weight is None else norm.weight
    gain: Tensor = gamma.detach().double() ** 2 / (variance.detach().double() + norm.eps)
    return gain.cpu()
