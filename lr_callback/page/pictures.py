"""Pictures: the figures of a page, each with what it shows in words."""

from __future__ import annotations

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import spoken
from lr_callback.decisions.curves import Curves
from lr_callback.observation.figures import plot_allocation, plot_spectra, plot_tradeoff
from lr_callback.page.facts import Picture
from lr_callback.page.svg import inline_svg


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
    figure, _ = plot_allocation(allocation)
    told = f"A bar for each layer: {spoken(allocation.unit)} of the dense layer, and on it what is kept"
    return Picture("What each layer kept", f"{told}. The largest layers come first.", inline_svg(figure, "kept", told))


def _tradeoff(curves: Curves) -> Picture:
    figure, _ = plot_tradeoff(curves)
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
