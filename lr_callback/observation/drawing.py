"""Drawing: what figures have in common: axes of a new figure or of the caller's, names as they are, quiet frames."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from lr_callback.common.table import readable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

DENSE, KEPT, MEAN, CUT = "#D5D5DE", "#332288", "#44AA99", "#CC6677"
"""Of Paul Tol's "muted" scheme, to be told apart by the colour-blind (https://personal.sron.nl/~pault)."""

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Properties of a text that may hold a name: what looks like a formula is none."""


def axes_of(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return the axes that were given with their figure, or those of a new one.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if ax is not None:
        return cast("Figure", ax.figure), ax
    figure = new_figure(size)
    return figure, figure.subplots()


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure that pyplot does not know.

    Args:
        size: width and height, inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        figures = import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lr_callback draws with matplotlib, and it was not found: install it with "
            "pip install 'lr_callback[figures]'."
        ) from error
    figure: Figure = figures.Figure(figsize=size, layout="constrained")
    return figure


def dress(axes: Axes, across: str, up: str, title: str = "") -> None:
    """Give axes their labels and a title, as they are, and no frame."""
    axes.set_xlabel(across, **LITERAL)
    axes.set_ylabel(up, **LITERAL)
    axes.set_title(title, fontsize=10, loc="left", **LITERAL)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes) -> None:
    """Put the legend beside the title, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8, borderaxespad=0.2)


def formatter(places: int | None = None) -> EngFormatter:
    """Return what writes numbers as ``12k``, with so many places, or as many as they have."""
    made: EngFormatter = import_module("matplotlib.ticker").EngFormatter(places=places, sep="")
    return made


def drawn_name(name: str, width: int = 40) -> str:
    r"""Return a name that any font can draw: of other letters than those of Western Europe their codes.

    Args:
        name: of a layer.
        width: most letters.

    Example::

        >>> drawn_name("größe.$x_1$"), drawn_name("层\n")
        ('größe.$x_1$', '\\u5c42\\n')
    """
    letters = (one if one.isprintable() and ord(one) < 256 else _code(one) for one in readable(name))
    return shorten("".join(letters), width)


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
