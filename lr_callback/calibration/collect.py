"""Collect: run a model over calibration batches and see what comes into each of its layers, and how it counts.

The batches are those of the training, with its augmentation; the model is run in eval mode, without gradients, and is
not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import TypeVar
from warnings import warn

import torch
from torch import Tensor, nn

from lr_callback.common.processes import Processes, by_name
from lr_callback.common.table import listed
from lr_callback.layers import dense_bias
from lr_callback.layers.layer_types import layer_type
from lr_callback.mathematics.importance import Importance
from lr_callback.mathematics.moments import SecondMoments, summed
from lr_callback.model.find import find_layers
from lr_callback.model.following import following
from lr_callback.model.running import run_batches, runner

Batch = TypeVar("Batch")
POSITIONS = 8192
"""Rows of a call that are measured: more positions of the same images say little more, and take time."""

_GOLDEN = (5**0.5 - 1) / 2

LARGEST = 4608
"""Size of the largest matrix of moments: 170 MB; that of a 3x3 convolution of 512 channels."""


def collect_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Callable[[Batch], object] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    largest: int = LARGEST,
    gentle: bool = False,
    processes: Processes | None = None,
) -> dict[str, Importance]:
    """Measure the second moments of the inputs of every layer, for ``error="activation"``.

    Args:
        model: on the device of the batches; is not changed.
        batches: of the training; some hundred images, or more where layers are wide.
        forward: runs the model on a batch; None: ``model(batch)``, ``model(batch[0])`` for tuples and lists,
            ``model(**batch)`` for dicts.
        include: glob patterns of layer names; only these are measured. None: all.
        exclude: glob patterns of layer names that are left out.
        largest: size of the largest matrix of moments that is kept. Of a layer with more inputs those of its channels
            are measured, with none between the positions of the kernel; and where these are too many, mean squares.
        gentle: of a layer that is seen at fewer than two positions for each of its inputs take mean squares alone, in
            place of a matrix of few directions and a warning.
        processes: of a distributed run, each with batches of its own; all get the moments of all batches.

    Returns:
        Layer name -> the second moments of its inputs, and their means where a constant error of the outputs can be
        made up for: by the layer's bias, or by the BatchNorm that takes them and is not frozen
        (:mod:`lr_callback.model.following`). Layers that were not called have none.

    Memory: ``8 * g * s^2`` bytes a layer, ``s = C / g * prod(kernel)`` at most ``largest``.

    Raises:
        ValueError: If there are no batches, or a layer's inputs are not finite (it is named).
        RuntimeError: If another process failed.

    Example::

        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> moments = collect_moments(model, [torch.randn(16, 3)])
        >>> moments["0"].inputs.shape, moments["2"].inputs.shape
        (torch.Size([1, 3, 3]), torch.Size([1, 8, 8]))
    """
    layers = find_layers(model, include, exclude).layers
    moments: dict[str, SecondMoments] = {}
    names = {layer: name for name, layer in layers.items()}

    def see(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        rows = _rows(layer, inputs, outputs, largest)
        if rows is not None:
            trouble = "its inputs on the calibration batches cannot be measured"
            add_rows(moments, names[layer], rows, trouble, diagonal=rows.shape[2] > largest)

    def measure() -> tuple[dict[str, SecondMoments], list[str]]:
        with following(model, layers.values()) as found:
            run_batches(model, batches, found.watched(runner(model, forward)), layers.values(), see)
        mended = [name for name in moments if dense_bias(layers[name]) is not None or layers[name] in found.takers()]
        return {name: one.cpu() for name, one in moments.items()}, mended

    processes = processes or Processes()
    parts = processes.gather(measure, long=True)
    whole, mended = merged([part for part, _ in parts]), parts[0][1]
    if processes.rank == 0 and not gentle:
        _warn_of_few(whole)
    return {name: _importance(one, name in mended, gentle) for name, one in whole.items()}


def _importance(moments: SecondMoments, mended: bool, gentle: bool) -> Importance:
    inputs = moments.products.reshape(moments.total.shape)
    if gentle and not moments.diagonal and moments.count < 2 * inputs.shape[1]:
        inputs = inputs.diagonal(dim1=1, dim2=2).clone()
    return Importance(inputs, means=moments.means if mended else None)


def _rows(layer: nn.Module, inputs: Tensor, outputs: Tensor, largest: int) -> Tensor | None:
    """Return the inputs of one call, position by position: patches, or channels alone where patches are too many."""
    kind = layer_type(layer)
    assert kind is not None
    geometry = kind.geometry(layer)
    if geometry.in_channels // geometry.groups * prod(geometry.kernel) <= largest or prod(geometry.kernel) == 1:
        return kind.patches(layer, inputs, outputs, spread(kind.results(layer, outputs).shape[1], inputs.device))
    rows = kind.positions(layer, inputs)
    chosen = spread(rows.shape[1], rows.device)
    return rows if chosen is None else rows[:, chosen]


def spread(count: int, device: torch.device) -> Tensor | None:
    """Return at most :data:`POSITIONS` of so many positions, spread over all, the same each time; None: take all."""
    if count <= POSITIONS:
        return None
    # A stride of the golden ratio is never in step with the width of an image.
    chosen = (torch.arange(POSITIONS, dtype=torch.float64) * _GOLDEN % 1 * count).long()
    return chosen.to(device)


def add_rows(moments: dict[str, SecondMoments], name: str, rows: Tensor, trouble: str, diagonal: bool = False) -> None:
    """Add rows to the moments of a layer.

    Args:
        moments: layer name -> its moments; given those of this layer, if they are the first.
        name: of the layer.
        rows: ``(g, n, s)``.
        trouble: what cannot be done if they are not finite.
        diagonal: whether mean squares alone are kept.

    Raises:
        ValueError: If they are not finite; the layer is named.
    """
    if name not in moments:
        made = SecondMoments(rows.shape[2], rows.shape[0], diagonal=diagonal, sync_on_compute=False)
        moments[name] = made.to(rows.device)
    try:
        moments[name].update(rows)
    except ValueError as error:
        raise ValueError(f"{name}: {trouble}. {error}") from error


def merged(parts: Iterable[Mapping[str, SecondMoments]]) -> dict[str, SecondMoments]:
    """Add up the moments of each layer that several processes measured, in the order of their ranks."""
    return {name: summed(held) for name, held in by_name(parts).items()}


def _warn_of_few(moments: Mapping[str, SecondMoments]) -> None:
    """Warn of layers that were seen at fewer positions than they have inputs: their moments are of few directions."""
    few = [name for name, one in moments.items() if not one.diagonal and one.count < one.total.shape[1]]
    if few:
        warn(
            f"The calibration batches are few for {len(few)} layer(s) ({listed(few)}): these have more inputs than "
            "positions were seen, and some directions were not seen at all. What is built is right for those that "
            "were; give more batches.",
            stacklevel=3,
        )
