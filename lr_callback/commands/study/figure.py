"""Figure: a metric against what is kept, one line for each method, with its spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from numpy import exp, float64, log, minimum
from numpy.typing import NDArray

from lr_callback.commands.study.plan import CONTROL
from lr_callback.commands.study.rows import Row, Spread, grouped, in_percent, spread
from lr_callback.observation.drawing import LITERAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#88CCEE",
    "#DDCC77",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#777777",
)
"""Paul Tol's "muted" scheme, to be told apart by the colour-blind (https://personal.sron.nl/~pault)."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
_STYLES = ("-", "--", "-.")
_TICKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100)
_SHARES = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 100)
_NAMED = "method "
"""Before a name: matplotlib leaves out of a legend what begins with an underscore."""
_LEAST_RANGE = 1.8
"""Of the largest fraction kept over the smallest, at least: where one size was asked for, methods differ by hairs."""
_AXES = {"kept_parameters": "parameters kept (%)", "kept_multiply_adds": "multiply-adds kept (%)"}

Points = list[tuple[float, Spread]]
"""Percent kept, and the metric there."""


def draw(rows: Sequence[Row], metric: str, path: Path) -> Path:
    """Draw :func:`compose` into a file, which is whole at every moment.

    Args:
        rows: of a study.
        metric: of the test.
        path: with a suffix that matplotlib can write: png, pdf, svg.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    compose(rows, metric).savefig(part, dpi=160)
    return part.replace(path)


def compose(rows: Sequence[Row], metric: str) -> Figure:
    """Make the figure: the metric right after the cut, and after the training, against what is kept.

    Less is kept to the right. Points are means over seeds, bars and the band of the dense control one standard
    deviation. The methods in the legend stand as their last points do, the highest first.

    Args:
        rows: of a study.
        metric: of the test.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    made = grouped(rows)
    moments = ["right_after", *(["after"] if any(row.after for row in rows) else [])]
    axes = [name for name in _AXES if any(row.method != CONTROL and getattr(row, name) is not None for row in rows)]
    axes = axes or list(_AXES)[:1]
    size = 2.6 + 3.9 * len(axes), 0.4 + 3.1 * len(moments)
    figure: Figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(moments), len(axes), squeeze=False, sharey="row", sharex="col")
    styles = _styles([name for name in dict.fromkeys(row.method for row in rows) if name != CONTROL])
    known: dict[str, Any] = {}
    for line, moment in enumerate(moments):
        for panel, axis in zip(panels[line], axes, strict=True):
            _control(panel, made.get((CONTROL, 1.0), []), moment, metric)
            for name, style in styles.items():
                _line(panel, _points(made, name, axis, moment, metric), {**style, "label": f"{_NAMED}{name}"})
            _dress(panel, _AXES[axis] if line + 1 == len(moments) else "", in_percent(metric))
            drawn = zip(*panel.get_legend_handles_labels(), strict=True)
            known |= {label.removeprefix(_NAMED): handle for handle, label in drawn}
        panels[line][0].set_ylabel(_label(metric, moment, rows))
    names = [*_order(made, styles, axes[0], moments[-1], metric), *(name for name in known if name not in styles)]
    shown = figure.legend([known[name] for name in names], names, loc="outside right center", frameon=False)
    for text in shown.get_texts():
        text.set(**LITERAL)
    return figure


def _matplotlib(part: str) -> ModuleType:
    try:
        return import_module(f"matplotlib.{part}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The figure was not drawn: matplotlib must be installed, and it was not found; install it with "
            "pip install 'lr_callback[study]' and start the study again: what was run is not repeated."
        ) from error


def _styles(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """Return how each method is drawn; the first one stands out."""
    return {
        name: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _STYLES[index // len(_COLOURS) % len(_STYLES)],
            "linewidth": 1.3 if index else 2.4,
            "zorder": 3 if index else 4,
        }
        for index, name in enumerate(names)
    }


def _points(made: Mapping[tuple[str, float], list[Row]], name: str, axis: str, moment: str, metric: str) -> Points:
    """Return the points of a method, the largest first."""
    found: Points = []
    for (method, _), rows in made.items():
        kept = [value for row in rows if (value := getattr(row, axis)) is not None]
        values = spread(rows, moment, metric)
        if method == name and kept and values is not None:
            found.append((100 * sum(kept) / len(kept), values))
    return sorted(found, key=lambda point: -point[0])


def _line(panel: Axes, points: Points, style: Mapping[str, Any]) -> None:
    if not points:
        return
    bars = [values.deviation for _, values in points]
    panel.errorbar(
        [kept for kept, _ in points],
        [values.mean for _, values in points],
        yerr=bars if any(bars) else None,
        markersize=5,
        elinewidth=0.9,
        capsize=2,
        **style,
    )


def _control(panel: Axes, rows: Sequence[Row], moment: str, metric: str) -> None:
    """Draw the dense control as a line across the panel, and its spread as a band."""
    values = spread(rows, moment, metric)
    if values is None:
        return
    panel.axhline(values.mean, color="black", linestyle=":", linewidth=1.4, zorder=2, label=f"{CONTROL} control")
    low, high = values.mean - values.deviation, values.mean + values.deviation
    if low < high:
        panel.axhspan(low, high, color="black", alpha=0.1, linewidth=0, zorder=1)


def _dress(panel: Axes, label: str, share: bool) -> None:
    """Give a panel its axes: logarithmic, less to the right, with the numbers that a person would write.

    A share is drawn by the logarithm of what it lacks: between 98 and 99 % lies as much as between 40 and 70.
    """
    if share:
        panel.set_yscale("function", functions=(_of_share, _share_of))
        low, high = panel.get_ylim()
        panel.set_yticks([tick for tick in _SHARES if low <= tick <= high])
        panel.set_ylim(max(low, 0), min(high, 100))
    panel.set_xscale("log")
    low, high = sorted(panel.get_xlim())
    low, high = min(low, sqrt(low * high / _LEAST_RANGE)), max(high, sqrt(low * high * _LEAST_RANGE))
    panel.set_xlim(high, low)
    panel.set_xticks([tick for tick in _TICKS if low <= tick <= high])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(_matplotlib("ticker").NullLocator())
    panel.set_xlabel(label)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _of_share(values: NDArray[float64]) -> NDArray[float64]:
    heights: NDArray[float64] = -log(101 - minimum(values, 100))
    return heights


def _share_of(heights: NDArray[float64]) -> NDArray[float64]:
    values: NDArray[float64] = 101 - exp(-heights)
    return values


def _label(metric: str, moment: str, rows: Sequence[Row]) -> str:
    epochs = max(row.epochs for row in rows)
    name = f"{metric.replace('_', ' ')}{' (%)' if in_percent(metric) else ''}"
    return f"{name}\nright after the cut" if moment == "right_after" else f"{name}\nafter {epochs} epochs"


def _order(
    made: Mapping[tuple[str, float], list[Row]], names: Mapping[str, object], axis: str, moment: str, metric: str
) -> list[str]:
    """Return the methods in the order of their lines at the right end, the highest first."""
    ends = {name: points[-1][1].mean for name in names if (points := _points(made, name, axis, moment, metric))}
    return sorted(ends, key=lambda name: -ends[name])
