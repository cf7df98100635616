"""Repair: bring a cut model back to what its weights can do, without training.

After a cut the inputs of a BatchNorm layer have other means and variances than its running statistics say. They are
measured anew on training batches, as they come from the training loader: with its augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lr_callback.following import batchnorm_layers
from lr_callback.processes import Processes
from lr_callback.running import runner

Batch = TypeVar("Batch")


def recalibrate_batchnorm_(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None = None,
    processes: Processes | None = None,
) -> int:
    """Replace the running statistics of BatchNorm layers by their cumulative average over batches, in place.

    Layers that are frozen (in eval mode in a model that is in train mode) or that keep no statistics are left alone;
    so are weights, modes and the momentum of each layer. In a model in eval mode no layer counts as frozen.

    Args:
        model: on the device of the batches.
        batches: training batches, with the augmentation of the training; 2,000 images are plenty.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect.collect_moments`.
        processes: of a distributed run, each with batches of its own; all get the mean of their statistics.

    Returns:
        Number of layers that were measured anew.

    Raises:
        ValueError: If there are no batches; the statistics are as they were.

    Example::

        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> recalibrate_batchnorm_(model, [torch.tensor([[0.0, 4.0], [2.0, 8.0]])])
        1
        >>> model[0].running_mean.tolist()
        [1.0, 6.0]
    """
    run, processes = runner(model, forward), processes or Processes()
    with _measuring(model) as layers, torch.no_grad():

        def measure() -> list[Tensor]:
            seen = 0
            for batch in batches:
                run(batch)
                seen += 1
            if layers and not seen:
                raise ValueError("`batches` must hold at least one batch to measure BatchNorm statistics on, got none.")
            return [value.cpu() for value in _statistics(layers)]

        parts = processes.gather(measure, long=True)
        if len(parts) > 1:
            for value, *own in zip(_statistics(layers), *parts, strict=True):
                value.copy_(torch.stack(own).mean(0))
    return len(layers)


def _statistics(layers: Iterable[_BatchNorm]) -> list[Tensor]:
    return [value for layer in layers for value in (layer.running_mean, layer.running_var) if value is not None]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Put the BatchNorm layers to measure into train mode with a cumulative average, all else into eval mode."""
    modes = {module: module.training for module in model.modules()}
    layers = batchnorm_layers(model)
    momenta = [layer.momentum for layer in layers]
    statistics = [{name: value.clone() for name, value in layer.named_buffers()} for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        yield layers
    except BaseException:
        for layer, kept in zip(layers, statistics, strict=True):
            layer.load_state_dict(kept, strict=False)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
