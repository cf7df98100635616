"""Progress: what a person sees of the steps of a compression that take long.

On a terminal, or in a notebook, a line beside the Trainer's bar, Rich or tqdm, for as long as a step takes. Elsewhere
a few plain lines, and none of a step that is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from time import monotonic
from typing import Protocol, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lr_callback.common.table import printable, readable, shorten
from lr_callback.observation.report import RichProgress, attempt, is_disabled, show, started_rich
from lr_callback.units.latency import Progress

Item = TypeVar("Item")

FIRST_LINE, NEXT_LINES = 5.0, 10.0
"""Seconds that a step takes before there is a plain line of it, and from one line to the next."""

_LONGEST_NAME = 18
_ROOM_FOR_NAMES = 100
"""Columns from which on there is room for names beside Rich's own columns."""

_FORM = "{desc}|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""Of a line of tqdm. In its own form percent and rate leave a bar of one character in 80 columns, and cut the name."""


@contextmanager
def progress_line(
    trainer: Trainer, what: str = "analysis", unit: str = "layer", plain: bool = True
) -> Iterator[Progress | None]:
    """Show the progress of a step of a compression, on rank zero, for as long as it takes.

    What cannot be shown is warned of, and the step goes on.

    Args:
        trainer: beside whose bar it is shown.
        what: is done.
        unit: of what is counted.
        plain: whether there are lines where there is no bar that moves.
    """
    line = _line(trainer, f"Low-rank {what}", unit, plain) if trainer.is_global_zero else None
    if line is None:
        yield None
        return
    works = True

    def advance(done: int, total: int, name: str) -> None:
        nonlocal works
        works = works and attempt(lambda: line.advance(done, total, name))

    finished = False
    try:
        yield advance
        finished = True
    finally:
        attempt(lambda: line.close(finished))


class _Line(Protocol):
    """What shows how far a step is."""

    def advance(self, done: int, total: int, name: str) -> None:
        """Show it."""

    def close(self, finished: bool) -> None:
        """Take it away: the step is finished, or something was raised."""


def _line(trainer: Trainer, title: str, unit: str, plain: bool) -> _Line | None:
    bar = trainer.progress_bar_callback
    if bar is not None and not is_disabled(bar):
        rich = started_rich(bar)
        own = _own_rich(bar, trainer) if rich is None else None
        shown = rich or own
        if shown is not None and (shown.console.is_terminal or shown.console.is_jupyter):
            return _RichLine(bar, shown, title, is_own=shown is own)
        if shown is None and _is_moving():
            return _TqdmLine(title, unit)
    return _PlainLines(trainer, title, unit) if plain else None


def _own_rich(bar: ProgressBar, trainer: Trainer) -> RichProgress | None:
    """Return a display that looks like Lightning's, for what is done before the training, when that is not there."""
    columns = getattr(bar, "configure_columns", None)
    if columns is None or all(kind.__name__ != "RichProgressBar" for kind in type(bar).__mro__):
        return None
    console = import_module("rich").get_console()
    made: RichProgress = import_module("rich.progress").Progress(
        *columns(trainer), console=console, auto_refresh=False, transient=True
    )
    return made


def _is_moving() -> bool:
    """Return whether a line that is written over is seen as one: on a terminal, in a notebook, not in a file."""
    return hasattr(sys, "ps1") or (sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty())


class _RichLine:
    """A task of a Rich display, drawn as Lightning draws its own; hidden in the end, as it hides its own.

    A task that was taken out would shift the places by which Lightning finds the others.

    Args:
        bar: that draws.
        rich: the display.
        title: of the line.
        is_own: whether nothing else is on it, and it is on the screen for this line alone.
    """

    def __init__(self, bar: ProgressBar, rich: RichProgress, title: str, is_own: bool) -> None:
        self._rich, self._title, self._is_own = rich, title, is_own
        # Lightning's at its own rate, if it has one.
        self._draw: Callable[[], object] = rich.refresh if is_own else getattr(bar, "refresh", rich.refresh)
        self._task: int | None = None

    def advance(self, done: int, total: int, name: str) -> None:
        """Draw it, the first time where nothing was: how many there are is not known before."""
        if self._task is None:
            self._task = self._rich.add_task(self._title, total=total)
            if self._is_own:
                self._rich.start()
        self._rich.update(self._task, completed=done, total=total, description=self._described(name))
        self._draw()

    def _described(self, name: str) -> str:
        """Return the title, with the name where there is room for it."""
        if not name or self._rich.console.width < _ROOM_FOR_NAMES:
            return self._title
        # A bracket is escaped: it begins markup.
        return f"{self._title} {_padded(name)}".replace("[", "\\[")

    def close(self, finished: bool) -> None:
        """Hide it."""
        if self._task is not None:
            self._rich.update(self._task, visible=False, refresh=True)
            if self._is_own:
                self._rich.stop()


class _TqdmLine:
    """A line of tqdm, of Lightning's own kind: a widget in a notebook that has them.

    Args:
        title: of the line.
        unit: of what is counted.
    """

    def __init__(self, title: str, unit: str) -> None:
        shown = {"desc": title, "unit": unit, "bar_format": _FORM}
        self._options = {**shown, "leave": False, "file": sys.stdout, "dynamic_ncols": True}
        self._line: Tqdm | None = None

    def advance(self, done: int, total: int, name: str) -> None:
        """Draw it: a layer may take long, and must not wait for the next one to be seen."""
        if self._line is None:
            self._line = Tqdm(total=total, **self._options)
        self._line.total, self._line.n = total, done
        self._line.set_postfix_str(_padded(name) if name else "")

    def close(self, finished: bool) -> None:
        """Wipe it."""
        if self._line is not None:
            self._line.close()


def _padded(name: str) -> str:
    """Return a layer's name in the width that all have, so that a bar keeps its own."""
    return shorten(printable(readable(name)), _LONGEST_NAME).ljust(_LONGEST_NAME)


class _PlainLines:
    """A line now and then, for files, jobs and runs without a bar; none of a step that is quick.

    Args:
        trainer: of the run.
        title: begins each line.
        unit: of what is counted.
    """

    def __init__(self, trainer: Trainer, title: str, unit: str) -> None:
        self._trainer, self._title, self._unit = trainer, title, unit
        self._start = monotonic()
        self._next = self._start + FIRST_LINE
        self._is_told = False

    def advance(self, done: int, total: int, name: str) -> None:
        """Print a line, if it is time."""
        if monotonic() >= self._next:
            self._next, self._is_told = monotonic() + NEXT_LINES, True
            told = f" ({printable(readable(name))})" if name else ""
            self._tell(f"{self._unit} {done + 1} of {total}{told} after")

    def close(self, finished: bool) -> None:
        """Print that the step is done, if it was told of."""
        if self._is_told and finished:
            self._tell("done in")

    def _tell(self, text: str) -> None:
        show(self._trainer, f"{self._title}: {text} {monotonic() - self._start:.0f} s")


class Told(list[Item]):
    """Items, and a progress that is told of each one when they are gone through.

    Example::

        >>> list(Told("ab", lambda done, total, name: print(f"{done} of {total}")))
        0 of 2
        1 of 2
        ['a', 'b']
    """

    def __init__(self, items: Iterable[Item], progress: Progress | None) -> None:
        super().__init__(items)
        self._progress = progress

    def __iter__(self) -> Iterator[Item]:
        """Go through the items."""
        for done, item in enumerate(super().__iter__()):
            if self._progress is not None:
                self._progress(done, len(self), "")
            yield item
