"""Figures: what a compression kept of each layer, the layers' spectra, and error against size; by matplotlib.

Each function returns ``(figure, axes)``, as ``plot()`` of torchmetrics does. Figures are made without pyplot: none is
left open, and no setting of matplotlib is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import LATENCY, spoken
from lr_callback.decisions.curves import Curves, LayerCurve, Point
from lr_callback.observation.drawing import (
    CUT,
    DENSE,
    KEPT,
    LITERAL,
    MEAN,
    axes_of,
    drawn_name,
    dress,
    formatter,
    legend_above,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40
"""Of a figure of an allocation."""
MOST_PANELS = 24
"""Of a figure of spectra."""

_LEAST = 1e-5
"""Of the largest singular value: what is no more is rounding, of a layer that was cut before, and sets no scale."""
_FLAT = 0.02
"""Spectra that stay above it are drawn on a linear scale."""
_LETTERS = 13
"""Of a title of 9 points, in an inch."""


def plot_allocation(allocation: Allocation, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw where the cost of a model went: a bar for each layer, dense, and on it what is kept.

    The layers with the largest dense cost come first, at most 40 rows; what has no row of its own is summed up in the
    last one. A layer that stays dense has a row in parameters; its cost in other units is not in an allocation.

    Args:
        allocation: of a compression.
        ax: to draw into; None: a figure of its own.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If it is no allocation.

    Example::

        >>> import lr_callback
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.BatchNorm1d(96))
        >>> figure, axes = plot_allocation(lr_callback.allocate(model, 0.5))
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['1', '0', 'everything else']
    """
    _check(allocation, Allocation, "plot_allocation", "an Allocation, such as `callback.allocation`")
    layers, others = _rows(allocation)
    rows = [*layers, *others]
    figure, axes = axes_of(ax, (7.0, 1.1 + 0.24 * len(rows)))
    scale = 1000 if allocation.unit == LATENCY else 1
    axes.barh(range(len(layers)), [dense / scale for _, _, dense in layers], color=DENSE, label="dense")
    axes.barh(range(len(layers)), [kept / scale for _, kept, _ in layers], height=0.5, color=KEPT, label="kept")
    short = formatter()
    for place, (_, kept, dense) in enumerate(rows):
        told, end = f" {kept / dense:.0%}", max(kept, dense) / scale
        if place >= len(layers):  # may be larger than all bars together
            told, end = f" {short(_digits(kept / scale))} of {short(_digits(dense / scale))},{told}", 0.0
        axes.text(end, place, told, va="center", fontsize=7, color="#555555")
    axes.set_yticks(range(len(rows)), [drawn_name(name) for name, _, _ in rows], fontsize=8, **LITERAL)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(formatter())
    unit = "microseconds" if allocation.unit == LATENCY else spoken(allocation.unit)
    kept_part = f"{allocation.cost / allocation.dense_cost:.1%}"
    dress(axes, unit, "", f"{kept_part} of {spoken(allocation.unit)} kept")
    legend_above(axes)
    return figure, axes


def plot_spectra(
    allocation: Allocation | Curves, layers: Sequence[str] | None = None, ax: Axes | None = None
) -> tuple[Figure, Any]:
    """Draw the singular values of layers, relative to the largest, with the rank at which each is cut off.

    A layer of which the analysis tells no singular values (``error="operator"`` with several slices) is drawn by its
    error, and its title says so.

    Args:
        allocation: of a compression; or its curves, ``callback.curves`` of a run, ``analysis.curves(allocation)``.
        layers: names of layers; None: the largest ones, at most 24.
        ax: to draw all of them into, one line for each; None: a figure of its own with a panel for each.

    Returns:
        The figure and ``ax``, or the panels as an array ``(rows, columns)``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If it is something else.
        ValueError: If a layer has no curve, or the allocation was read from a file: files of it hold no spectra.

    Example::

        >>> import lr_callback
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
        >>> figure, panels = plot_spectra(lr_callback.allocate(model, 0.5))
        >>> panels.shape
        (1, 2)
    """
    curves = _curves_of(allocation, "plot_spectra")
    shown = _shown(curves, layers)
    lines = {name: _line(curves.layers[name]) for name in shown}
    lowest = min((one for _, values, _ in lines.values() for one in values if one > _LEAST), default=1.0)
    if ax is not None:
        return _in_one(curves, lines, lowest, ax)
    columns = min(4, max(1, len(shown)))
    rows = max(1, ceil(len(shown) / columns))
    figure = new_figure((max(4.5, 2.5 * columns), 0.9 + 1.7 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    _scale(panels[0][0], lowest)
    for panel, name in zip(panels.flat, shown, strict=False):
        _panel(panel, name, curves.layers[name], lines[name])
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_axis_off()
    figure.supxlabel("rank (dashed: cut off here)", fontsize=9)
    figure.supylabel("relative to the largest", fontsize=9)
    others = len(curves.layers) - len(shown) + curves.left_out
    told = f"{curves.spectrum}{f'; {others} other layers are not shown' if others else ''}"
    figure.suptitle(fill(told, round(_LETTERS * figure.get_figwidth())), fontsize=9)
    return figure, panels


def plot_tradeoff(allocation: Allocation | Curves, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw the worst and the mean error of the layers against what is kept, with the allocation that was chosen.

    The lines are close to what the method would choose for other budgets. Where it cannot tell that quickly, the chosen
    point stands alone.

    Args:
        allocation: of a compression; or its curves, see :func:`plot_spectra`.
        ax: to draw into; None: a figure of its own.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If it is something else.
        ValueError: If the allocation was read from a file.

    Example::

        >>> import lr_callback
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
        >>> figure, axes = plot_tradeoff(lr_callback.allocate(model, 0.5))
        >>> axes.get_xlabel()
        'parameters kept (%)'
    """
    curves = _curves_of(allocation, "plot_tradeoff")
    figure, axes = axes_of(ax, (5.6, 3.8))

    def kept(one: Point) -> float:
        return 100 * one.cost / curves.dense_cost

    for name, colour in (("worst", KEPT), ("mean", MEAN)):
        errors = [getattr(one, f"{name}_error") for one in (*curves.tradeoff, curves.chosen)]
        axes.plot([kept(one) for one in curves.tradeoff], errors[:-1], color=colour, label=f"{name} error of a layer")
        axes.plot(kept(curves.chosen), errors[-1], "o", color=colour)
    label = f"chosen: {kept(curves.chosen):.1f} %"
    axes.axvline(kept(curves.chosen), color=CUT, linestyle="--", linewidth=1, label=label)
    axes.set_xlim(0, max(102, 1.05 * kept(curves.chosen)))
    axes.set_ylim(bottom=0)
    dress(axes, f"{spoken(curves.unit)} kept (%)", f"relative error ({curves.error})")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure, axes


_Row = tuple[str, int, int]
_Line = tuple[list[int], list[float], bool]


def _rows(allocation: Allocation) -> tuple[list[_Row], list[_Row]]:
    """Return name, kept cost and dense cost of layers, the largest first; and of all that is left over, if any."""
    own = {name: (layer.cost, layer.dense_cost) for name, layer in allocation.factorized.items() if layer.dense_cost}
    if allocation.unit == "parameters":
        sizes = {name: prod(allocation.shapes[name]) for name, layer in allocation.layers.items() if layer is None}
        own |= {name: (size, size) for name, size in sizes.items()}
    order = sorted(own, key=lambda name: -own[name][1])
    shown = [(name, *own[name]) for name in order[: MOST_ROWS - 1]]
    kept = allocation.cost - sum(row[1] for row in shown)
    dense = allocation.dense_cost - sum(row[2] for row in shown)
    more = len(order) - len(shown)
    others = f"{more} other layer{'s' * (more > 1)}, everything else" if more else "everything else"
    return shown, [(others, max(0, kept), dense)] if dense > 0 else []


def _digits(value: float) -> float:
    """Return a number with its three first digits."""
    return float(f"{value:.3g}")


def _shown(curves: Curves, layers: Sequence[str] | None) -> list[str]:
    """Return the names of the layers that are drawn, by default of the largest ones in the model's order."""
    if layers is None:
        largest = sorted(curves.layers, key=lambda name: -curves.layers[name].dense_cost)[:MOST_PANELS]
        return sorted(largest, key=list(curves.layers).index)
    if isinstance(layers, str) or any(name not in curves.layers for name in layers):
        raise ValueError(
            f"`layers` must be a list of names of layers that have a curve, such as {list(curves.layers)[:3]}, got "
            f"{layers!r}."
        )
    return list(layers)


def _line(layer: LayerCurve) -> _Line:
    """Return ranks and singular values, and that they are such; else ranks and errors."""
    known = [(rank, value) for rank, value in zip(layer.ranks, layer.values, strict=True) if value is not None]
    points = known or list(zip(layer.ranks, layer.errors, strict=True))
    return [rank for rank, _ in points], [max(value, _LEAST) for _, value in points], bool(known)


def _panel(panel: Axes, name: str, layer: LayerCurve, line: _Line) -> None:
    ranks, values, are_spectrum = line
    panel.plot(ranks, values, color=KEPT, linewidth=1.4, marker="." if len(ranks) < 12 else "")
    told = "stays dense"
    if layer.rank is not None:
        panel.axvline(layer.rank, color=CUT, linestyle="--", linewidth=1.1)
        panel.axvspan(0, layer.rank, color=KEPT, alpha=0.07, linewidth=0)
        slices = f", {layer.num_slices} slices" if layer.num_slices > 1 else ""
        told = f"rank {layer.rank} of {layer.full_rank}{slices}"
    title = f"{drawn_name(name, 30)}\n{told}{'' if are_spectrum else ' (error)'}"
    panel.set_title(title, fontsize=8, loc="left", **LITERAL)
    panel.set_xlim(0, 1.02 * max(ranks, default=1))
    panel.locator_params(axis="x", nbins=4, integer=True)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _in_one(curves: Curves, lines: dict[str, _Line], lowest: float, ax: Axes) -> tuple[Figure, Axes]:
    """Draw a line for each layer, with a dot at its cut."""
    for name, (ranks, values, _) in lines.items():
        [line] = ax.plot(ranks, values, linewidth=1.2, label=f"layer {drawn_name(name, 30)}")
        rank = curves.layers[name].rank
        if rank in ranks:
            ax.plot(rank, values[ranks.index(rank)], "o", color=line.get_color(), markersize=4)
    _scale(ax, lowest)
    dress(ax, "rank (dot: cut off here)", "relative to the largest", curves.spectrum)
    if 0 < len(lines) <= 12:
        for text in ax.legend(frameon=False, fontsize=7).get_texts():
            text.set(**LITERAL)
    return axes_of(ax, (0, 0))


def _scale(axes: Axes, lowest: float) -> None:
    """Give axes the scale on which a fall from 1 to the lowest value can be seen."""
    if lowest > _FLAT:
        axes.set_ylim(0, 1.05)
        return
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.5, 1.5)
    axes.minorticks_off()


def _curves_of(given: Curves | Allocation, function: str) -> Curves:
    if isinstance(given, Allocation):
        return given.curves()
    _check(given, Curves, function, "an Allocation, such as `callback.allocation`, or its Curves")
    return given


def _check(value: object, kind: type, function: str, must: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{function}: the first argument must be {must}; got {type(value).__name__}.")
