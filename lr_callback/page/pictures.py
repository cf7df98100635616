"""Pictures: the figures of a page, each with what it shows in words."""

from __future__ import annotations

from textwrap import fill

from lr_callback.common.table import shorten
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import spoken
from lr_callback.decisions.curves import Curves
from lr_callback.observation.drawing import new_figure
from lr_callback.observation.figures import plot_allocation, plot_spectra, plot_tradeoff
from lr_callback.page.facts import Picture
from lr_callback.page.svg import inline_svg

_WIDTH = 4.4
"""Inches of a figure whose letters can be read on a phone, where it is not scaled down further."""
_LETTERS = 22
"""Of a name beside a bar of such a figure."""


def pictures_of(allocation: Allocation, curves: Curves | None) -> tuple[Picture, ...]:
    """Draw what is known: what each layer kept; with curves also error against size and spectra, where they have them.

    Args:
        allocation: of a compression.
        curves: of the same one; None: they are not known.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    pictures = [_kept(allocation)]
    if curves is not None and curves.tradeoff:
        pictures.append(_tradeoff(curves))
    if curves is not None and _tells_singular_values(curves):
        pictures.append(_spectra(curves))
    return tuple(pictures)


def _tells_singular_values(curves: Curves) -> bool:
    return any(value is not None for layer in curves.layers.values() for value in layer.values)


def _kept(allocation: Allocation) -> Picture:
    figure = new_figure((_WIDTH, _WIDTH))
    _, axes = plot_allocation(allocation, ax=figure.subplots())
    names = [label.get_text() for label in axes.get_yticklabels()]
    figure.set_size_inches(_WIDTH, 1.1 + 0.24 * len(names))
    axes.set_yticks(range(len(names)), [beside(name) for name in names])
    axes.legend().remove()  # beside the title there is no room for it
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    told = f"A bar for each layer: {spoken(allocation.unit)} of the dense layer, and on it what is kept"
    return Picture("What each layer kept", f"{told}. The largest layers come first.", inline_svg(figure, "kept", told))


def beside(name: str) -> str:
    r"""Return what stands beside a bar: words in lines, and of a long name its end.

    Example::

        >>> beside("encoder.layers.11.mlp.dense_out"), beside("21 other layers, everything else")
        ('...rs.11.mlp.dense_out', '21 other layers,\neverything else')
    """
    lines = fill(name, _LETTERS, break_long_words=False, break_on_hyphens=False).splitlines()
    return "\n".join(shorten(line, _LETTERS) for line in lines)


def _tradeoff(curves: Curves) -> Picture:
    figure = new_figure((_WIDTH, 3.4))
    plot_tradeoff(curves, ax=figure.subplots())
    told = f"Error of the layers against what is kept of the {spoken(curves.unit)}, with what was chosen"
    caption = (
        f"{told}. Left of the line the network is smaller, and its layers err more. The errors are those right after "
        "the decomposition, before a refit and further training."
    )
    return Picture("Error against size", caption, inline_svg(figure, "tradeoff", told))


def _spectra(curves: Curves) -> Picture:
    figure, _ = plot_spectra(curves)
    told = "Singular values of the layers, with the rank at which each was cut off"
    caption = (
        f"{told}; up to the rank from which factors are no smaller than the layer. Where they fall steeply little is "
        "lost by a small rank; a layer whose values hardly fall is hard to compress."
    )
    return Picture("Spectra", caption, inline_svg(figure, "spectra", told))
