"""Repair: bring a cut model back to what its weights can do, without training.

After a cut the inputs of a BatchNorm layer have other means and variances than its running statistics say. They are
measured anew on training batches, as they come from the training loader: with its augmentation. And what the outputs of
a layer are off on average, its bias can make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lr_callback.common.processes import Processes
from lr_callback.common.untouched import as_written, untouched
from lr_callback.edits.surgery import standing_in
from lr_callback.layers import FactorizedLayer
from lr_callback.layers.layer_types import dense_weight
from lr_callback.mathematics.importance import Importance
from lr_callback.model.following import batchnorm_layers, look
from lr_callback.model.running import runner

Batch = TypeVar("Batch")


def recalibrate_batchnorm_(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None = None,
    processes: Processes | None = None,
) -> int:
    """Replace the running statistics of BatchNorm layers by their cumulative average over batches, in place.

    Layers that are frozen (in eval mode in a model that is in train mode) or that keep no statistics are left alone;
    so are weights, modes, other buffers and the momentum of each layer. In a model in eval mode no layer counts as
    frozen. A ``SyncBatchNorm`` is measured as the others are: on each process by itself, and averaged in the end.

    Args:
        model: on the device of the batches.
        batches: training batches, with the augmentation of the training; 2,000 images are plenty.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
        processes: of a distributed run, each with batches of its own; all get the mean over all batches.

    Returns:
        Number of layers that were measured anew; those that are not called on the batches keep what they have.

    Raises:
        ValueError: If there are no batches, or statistics are not finite (the layer is named); nothing was changed.

    Example::

        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> recalibrate_batchnorm_(model, [torch.tensor([[0.0, 4.0], [2.0, 8.0]])])
        1
        >>> model[0].running_mean.tolist()
        [1.0, 6.0]
    """
    run, processes, layers = runner(model, forward), processes or Processes(), _with_statistics(model)

    def measure() -> list[_Statistics]:
        seen = 0
        with _measuring(model, layers.values()):
            for batch in batches:
                run(batch)
                seen += 1
            if layers and not seen:
                raise ValueError("`batches` must hold at least one batch to measure BatchNorm statistics on, got none.")
            return [_buffers(layer, copy=True) for layer in layers.values()]

    parts = processes.gather(measure, long=True)
    found = {name: _mean(own) for name, *own in zip(layers, *parts, strict=True)}
    called = {name: own for name, own in found.items() if own[_COUNT] > 0}
    for name, own in called.items():
        _check_finite(name, own)
    with torch.no_grad():
        for name, own in called.items():
            for key, value in _buffers(layers[name]).items():
                value.copy_(own[key])
    return len(called)


def correct_biases_(
    model: nn.Module,
    replaced: Mapping[str, nn.Module],
    importance: Mapping[str, Importance],
    batches: Iterable[Batch],
    forward: Callable[[Batch], object] | None = None,
    processes: Processes | None = None,
) -> int:
    """Make up for what the outputs of factorized layers are off on average, in place, without a refit.

    ``(W - What) E[x]`` is added to a layer's bias; or, of one without, subtracted from the mean of the BatchNorm
    that takes its outputs.

    Args:
        model: that was cut.
        replaced: name of a factorized layer -> the layer before the cut (:attr:`SurgeryReport.replaced`), with which it
            shares the bias.
        importance: of the layers' inputs, from :func:`~lr_callback.collect_moments`.
        batches: the first one is run, to see what follows the layers.
        forward: runs the model on a batch; None: as for :func:`~lr_callback.collect_moments`.
        processes: of a distributed run; all get the same biases.

    Returns:
        Number of layers that were corrected.

    Raises:
        ValueError: If there are no batches. Nothing was changed.

    Source: bias correction as in Nagel et al., arXiv 1906.04721, section 4.2, for factors in place of rounding.

    Example::

        >>> from lr_callback.analysis.analyze import allocate
        >>> from lr_callback.calibration.collect import collect_moments
        >>> from lr_callback.decisions.methods import ALDS
        >>> from lr_callback.edits.surgery import factorize_
        >>> model, batches = nn.Sequential(nn.Linear(64, 64)), [torch.rand(256, 64)]
        >>> moments = collect_moments(model, batches)
        >>> allocation = allocate(model, 0.3, method=ALDS("activation"), importance=moments)
        >>> mean = model(batches[0]).mean(0)
        >>> report = factorize_(model, allocation, importance=moments)
        >>> correct_biases_(model, report.replaced, moments, batches)
        1
        >>> torch.allclose(model(batches[0]).mean(0), mean, atol=1e-4)
        True
    """
    students = {name: model.get_submodule(name) for name in replaced if name in importance}
    layers = {name: layer for name, layer in students.items() if isinstance(layer, FactorizedLayer)}
    _, takers = look(model, batches, forward, layers, processes or Processes())
    corrected = 0
    with torch.no_grad():
        for name, layer in layers.items():
            shift = importance[name].shift(dense_weight(replaced[name]).double() - dense_weight(layer).double())
            mean = None if name not in takers else takers[name].running_mean
            if shift is None or (layer.bias is None and mean is None):
                continue
            corrected += 1
            if layer.bias is not None:
                layer.bias.add_(shift.to(layer.bias))
            elif mean is not None:
                mean.sub_(shift.to(mean))
    return corrected


_Statistics = dict[str, Tensor]
"""The statistics of a BatchNorm layer, by name, and the number of batches that they are of."""

_COUNT = "num_batches_tracked"


def _buffers(layer: _BatchNorm, copy: bool = False) -> _Statistics:
    """Return the statistics that a layer holds, or a copy in main memory."""
    held = {name: layer._buffers.get(name) for name in ("running_mean", "running_var", _COUNT)}
    return {name: value.to("cpu", copy=True) if copy else value for name, value in held.items() if value is not None}


def _with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers to measure, by name: those that count their batches, too."""
    names = {module: name for name, module in model.named_modules()}
    found = [layer for layer in batchnorm_layers(model) if len(_buffers(layer)) == 3]
    return {names[layer]: layer for layer in found if not any(is_lazy(value) for value in layer.buffers())}


def _mean(parts: Sequence[_Statistics]) -> _Statistics:
    """Return the mean of what several processes measured, each batch counting the same."""
    counts = torch.stack([own[_COUNT] for own in parts])
    total = counts.sum()
    if len(parts) == 1 or total == 0:
        return parts[0]
    weights = (counts.double() / total).unsqueeze(1)
    means = {
        name: (weights * torch.stack([own[name].double() for own in parts])).sum(0)
        for name in parts[0]
        if name != _COUNT
    }
    return {**means, _COUNT: total}


def _check_finite(name: str, found: _Statistics) -> None:
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise ValueError(
            f"{name}: the statistics of its inputs on the batches must be finite, found NaN or infinity: a batch holds "
            "such values, or the network makes them. Nothing was changed."
        )


class _Apart(_BatchNorm):
    """A SyncBatchNorm that does without other processes: the same parameters, statistics and hooks.

    Args:
        layer: in the mode, and with the momentum, that it is to have.
    """

    def __init__(self, layer: nn.SyncBatchNorm) -> None:
        super().__init__(layer.num_features, affine=False, track_running_stats=False)
        vars(self).update(vars(layer))

    def _check_input_dim(self, input: Tensor) -> None:
        """Take inputs of any number of axes, as the layer does."""


@contextmanager
def _measuring(model: nn.Module, layers: Collection[_BatchNorm]) -> Iterator[None]:
    """Put BatchNorm layers into train mode with a cumulative average, all else into eval mode; put all back."""
    momenta = [layer.momentum for layer in layers]
    try:
        with untouched(model), as_written():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            # One that waited for other processes would wait for ever for one that has failed, or has fewer batches.
            apart: dict[nn.Module, nn.Module] = {
                layer: _Apart(layer) for layer in layers if type(layer) is nn.SyncBatchNorm
            }
            with standing_in(model, apart):
                yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
