"""Gallery: what a compression gives to loggers besides its metrics.

Whatever fails here is said once, as a warning, and left out: a figure is no reason to end a training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lr_callback.common.table import on_one_line, printable, readable, wrap
from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.curves import Curves
from lr_callback.observation.boards import Arguments, Board, board_of
from lr_callback.observation.figures import plot_allocation, plot_spectra, plot_tradeoff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NUMBERED = 20
"""Layers of which a logger without figures gets numbers."""
_MOST_LETTERS = 300
"""Of an argument."""

Drawings = Mapping[str, "Callable[[], Figure]"]
"""Name of a figure -> what draws it."""


class Gallery:
    """What the loggers of a run are given besides numbers, and what was said about it.

    Args:
        figures: whether they are given anything.
        arguments: name -> value, of the callback; names of Python's own are left out.
    """

    def __init__(self, figures: bool, arguments: Mapping[str, object]) -> None:
        self.figures, self._arguments = figures, readable_arguments(arguments)
        self._begun, self._said = set[tuple[int, str]](), set[tuple[str, ...]]()

    def show(
        self, loggers: Iterable[Logger], allocation: Allocation, curves: Curves, step: int, logged: Collection[str]
    ) -> None:
        """Give figures and the table to the loggers that take them, and numbers of some layers to the others.

        Args:
            loggers: of the run, on rank zero.
            allocation: that was carried out.
            curves: of it.
            step: of the run.
            logged: names of the metrics that the loggers get beside them, as in a layout of charts.
        """
        drawings: Drawings = {
            "allocation": cache(lambda: plot_allocation(allocation)[0]),
            "spectra": cache(lambda: plot_spectra(curves)[0]),
            "tradeoff": cache(lambda: plot_tradeoff(curves)[0]),
        }
        for logger in loggers if self.figures else ():
            self._attempt(logger, partial(self._give, logger, allocation, curves, drawings, step, logged))

    def _give(
        self,
        logger: Logger,
        allocation: Allocation,
        curves: Curves,
        drawings: Drawings,
        step: int,
        logged: Collection[str],
    ) -> None:
        board = board_of(logger)
        if board is None:
            self._say_no_figures(logger)
            logger.log_metrics(layer_numbers(allocation, curves), step)
            return
        run = id(logger), str(logger.version)  # a number can be that of another logger later
        if run not in self._begun:
            self._begun.add(run)
            self._attempt(logger, partial(board.begin, self._arguments, logged))
        if board.text is not None:
            self._attempt(logger, partial(board.text, "compression/table", str(allocation), step))
        for name, draw in drawings.items():
            self._attempt(logger, partial(_hang, board, name, draw, step))

    def _attempt(self, logger: Logger, task: Callable[[], object]) -> None:
        """Do something that may fail in many ways that nobody here knows: a logger can be any program."""
        try:
            task()
        except Exception as error:
            name = type(logger).__name__
            if self._is_new(name, type(error).__name__):
                rank_zero_warn(
                    f"LowRankCompression: some of the figures and texts are left out of {name}, "
                    f"{type(error).__name__}: {on_one_line(error).rstrip('.')}. The training goes on. `figures=False` "
                    "leaves out all of them, and this warning."
                )

    def _say_no_figures(self, logger: Logger) -> None:
        if self._is_new(type(logger).__name__, ""):
            told = (
                f"LowRankCompression: {type(logger).__name__} takes no figures; it is given numbers of the largest "
                f"{MOST_NUMBERED} layers, `compression/layers/...`."
            )
            rank_zero_info(wrap(told))

    def _is_new(self, *what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new


def _hang(board: Board, name: str, draw: Callable[[], Figure], step: int) -> None:
    board.figure(f"compression/{name}", draw(), step)


def readable_arguments(arguments: Mapping[str, object]) -> Arguments:
    """Return arguments as loggers can take them: numbers, switches and text; without ``self`` and Python's own names.

    Example::

        >>> readable_arguments({"keep_ratio": 0.5, "epochs": [1, 2], "refit": None})
        {'keep_ratio': 0.5, 'epochs': '[1, 2]', 'refit': 'None'}
    """
    plain = (bool, int, float, str)
    own = {name: value for name, value in arguments.items() if name != "self" and not name.startswith("__")}
    return {name: value if isinstance(value, plain) else str(value)[:_MOST_LETTERS] for name, value in own.items()}


def layer_numbers(allocation: Allocation, curves: Curves) -> dict[str, float]:
    """Return what is kept of each of the largest layers, in (0, 1], and its relative error.

    Args:
        allocation: that was carried out.
        curves: of it.
    """
    largest = sorted(curves.layers, key=lambda name: -curves.layers[name].dense_cost)[:MOST_NUMBERED]
    numbers: dict[str, float] = {}
    for name in largest:
        layer = allocation.layers[name]
        told = f"compression/layers/{printable(readable(name))}"
        kept = 1.0 if layer is None else layer.kept
        if kept is not None:
            numbers[f"{told}/kept"] = kept
        numbers[f"{told}/error"] = 0.0 if layer is None else layer.relative_error
    return numbers
