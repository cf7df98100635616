"""Truncation: what is kept of a spectrum, and the error that is left at each cost."""

from __future__ import annotations

import torch
from chart import Chart
from drawing import Drawing
from example import layer, weight
from torch import Tensor, nn

from lr_callback import ALDS, analyze
from lr_callback.common.parallel import workers
from lr_callback.decisions.candidates import frontier
from lr_callback.layers.layer_types import layer_cost
from lr_callback.mathematics.errors import relative_errors
from lr_callback.mathematics.folding import fold

_CURVES = {1: "la", 4: "lb", 16: "lc"}
_SHOWN, _KEPT = 32, 9


def draw() -> Drawing:
    """Return the picture."""
    values = weight(64, 32, 4, 6.0, 0)
    picture = Drawing(760, 348, "The singular values that a rank keeps, and the error at each cost for three slicings")
    picture.text(24, 34, "one slice: the rank keeps the largest", "title")
    _spectrum(picture, values)
    picture.text(392, 34, "one layer: every slicing, every rank", "title")
    _errors(picture, values)
    return picture


def _spectrum(picture: Drawing, values: Tensor) -> None:
    slices = fold(values.double(), "kernel_in_encoder", 4)
    sizes = torch.linalg.svdvals(slices[0])[:_SHOWN]
    heights = (sizes / sizes[0] * 200).tolist()
    for index, height in enumerate(heights):
        style = "ca" if index < _KEPT else "quiet"
        picture.box(44 + index * 9.5, 284 - height, 7.5, height, style)
    picture.path([(40, 284), (44 + _SHOWN * 9.5, 284)], "axis")
    left, height = 44 + _KEPT * 9.5, heights[_KEPT]
    picture.path([(left - 1, 284 - height), (left + 96, 284 - height)], "limit dashed")
    picture.text(left + 34, 284 - height - 8, "\N{GREEK SMALL LETTER SIGMA} at j + 1: the error", "mark")
    picture.text(44 + _KEPT * 4.7, 304, "j kept", "soft", "middle")
    picture.text(44 + (_SHOWN + _KEPT) * 4.75, 304, "dropped", "soft", "middle")


def _errors(picture: Drawing, values: Tensor) -> None:
    chart, cost = Chart(picture, 420, 284, 300, 208), layer_cost(layer(values))
    chart.axes("parameters, of those of the dense layer", "relative error")
    [known] = analyze(nn.Sequential(layer(values)), ALDS("operator")).layers.values()
    edge = frontier(known)
    chart.steps([(price / cost.dense, error) for price, error in zip(edge.costs, edge.errors, strict=True)], "frontier")
    last = {count: cost.last_rank("kernel_in_encoder", count) for count in _CURVES}
    with workers() as crew:
        [matrix] = fold(values, "kernel_in_encoder", 1)
        curves = relative_errors(matrix, "operator", last, crew)
    for row, (count, style) in enumerate(_CURVES.items()):
        costs = cost.at_ranks("kernel_in_encoder", count, last[count]) / cost.dense
        chart.steps(list(zip(costs.tolist()[1:], curves[count].tolist()[1:], strict=True)), style)
        picture.path([(596, 94 + row * 20), (620, 94 + row * 20)], style)
        picture.text(628, 98 + row * 20, f"{count} slice{'s' if count > 1 else ''}", "small")
    picture.path([(596, 154), (620, 154)], "frontier")
    picture.text(628, 158, f"best of all {len(known.candidates)}", "small")
