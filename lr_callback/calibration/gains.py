"""Gains: what the BatchNorm right after a layer multiplies each of its outputs with.

In eval mode a BatchNorm layer is ``y = gamma (x - mean) / sqrt(var + eps) + beta``: an error of output ``f`` of the
layer before counts ``gamma_f^2 / (var_f + eps)`` times in the squared error of what goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.common.processes import Processes
from lr_callback.mathematics.importance import Importance
from lr_callback.model.find import find_layers
from lr_callback.model.following import follow

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
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
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
        met: dict[nn.Module, list[Tensor]] = {}

        def meet(layer: nn.Module, norm: _BatchNorm, outputs: Tensor) -> None:
            met.setdefault(layer, []).append(_gain(norm, outputs))

        called = follow(model, batches, forward, layers.values(), meet).calls
        gains = {name: met.get(layer, []) for name, layer in layers.items() if layer in called}
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


def _gain(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """Return ``gamma^2 / (var + eps)`` of each channel, float64 on the CPU."""
    others = [axis for axis in range(inputs.dim()) if axis != 1]
    variance = norm.running_var if norm.running_var is not None else inputs.var(others, unbiased=False)
    gamma = torch.ones_like(variance) if norm.weight is None else norm.weight
    gain: Tensor = gamma.detach().double() ** 2 / (variance.detach().double() + norm.eps)
    return gain.cpu()
