"""Report: what a person sees while a model is compressed, and at the end of a run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning_utilities.core.rank_zero import rank_zero_info

from lr_callback.common.table import align
from lr_callback.units.latency import Progress

Item = TypeVar("Item")

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def is_disabled(bar: object) -> bool:
    """Return whether a Lightning progress bar shows nothing; a bar that does not say is taken to show itself."""
    return bool(getattr(bar, "is_disabled", False))


class _RichProgress(Protocol):
    """What is used of Rich's progress display; Rich is an optional package."""

    def add_task(self, description: str, *, total: float) -> int:
        """Add a line."""

    def update(self, task: int, **changes: object) -> None:
        """Change a line."""


@contextmanager
def progress_line(bar: object | None, what: str = "analysis", unit: str = "layer") -> Iterator[Progress | None]:
    """Show the progress of a part of a compression in the style of a Lightning progress bar, for as long as it takes.

    Args:
        bar: the Trainer's bar, Rich or tqdm; without one, or with a disabled one, nothing is shown.
        what: is done.
        unit: of what is counted.
    """
    if bar is None or is_disabled(bar):
        yield None
        return
    rich = getattr(bar, "progress", None)
    title = f"Low-rank {what}"
    with _tqdm_line(title, unit) if rich is None else _rich_line(rich, title) as progress:
        yield progress


@contextmanager
def _rich_line(rich: _RichProgress, title: str) -> Iterator[Progress]:
    task = rich.add_task(title, total=1)  # the number of layers is not known yet
    try:
        yield lambda done, total, name: rich.update(task, completed=done, total=total)
    finally:
        rich.update(task, visible=False)


@contextmanager
def _tqdm_line(title: str, unit: str) -> Iterator[Progress]:
    with Tqdm(desc=title, leave=False, file=sys.stdout, unit=unit) as line:

        def advance(done: int, total: int, name: str) -> None:
            line.total, line.n = total, done
            line.set_postfix_str(name)  # draws the line: a layer may take long, and must not wait for the next one

        yield advance


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


def show(trainer: Trainer, text: str) -> None:
    """Print above the Trainer's progress bar, or where there is none, as a message; on rank zero."""
    bar = trainer.progress_bar_callback
    if bar is None or is_disabled(bar):
        rank_zero_info(text)
    elif trainer.is_global_zero:
        bar.print(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes on devices, tips and files, which the run has shown already, off the screen."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.WARNING))
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Stage:
    """A model at one moment of a run, measured.

    Args:
        name: the moment.
        metrics: name -> value, as the model's own test or validation loop logs them.
        parameters: their number.
        multiply_adds: of one batch; 0 if none was seen.
        file_bytes: of the file with its weights.
        milliseconds: of one batch, the median of repeated runs; 0 if none was seen.
    """

    name: str
    metrics: Mapping[str, float]
    parameters: int
    multiply_adds: int
    file_bytes: int
    milliseconds: float


def comparison(stages: Sequence[Stage]) -> str:
    r"""Return the stages side by side as a table, each count also as a fraction of the first stage's.

    Example::

        >>> dense = Stage("dense", {"accuracy": 0.91}, 200, 4000, 1000, 2.0)
        >>> cut = Stage("after the cut", {"accuracy": 0.7}, 50, 1000, 300, 1.0)
        >>> print(comparison([dense, cut]).partition("\n")[2])
        accuracy       0.9100         0.7000
        parameters        200     50 (25.0%)
        multiply-adds   4,000  1,000 (25.0%)
        bytes on disk   1,000    300 (30.0%)
        ms a batch       2.00   1.00 (50.0%)
    """
    first = stages[0]
    metrics = [
        [name, *(f"{stage.metrics[name]:.4f}" if name in stage.metrics else "-" for stage in stages)]
        for name in first.metrics
    ]
    counts = [
        ["parameters", *_counted([stage.parameters for stage in stages])],
        ["multiply-adds", *_counted([stage.multiply_adds for stage in stages])],
        ["bytes on disk", *_counted([stage.file_bytes for stage in stages])],
        ["ms a batch", *_counted([stage.milliseconds for stage in stages], ",.2f")],
    ]
    header = ["", *(stage.name for stage in stages)]
    return align(header, [*metrics, *counts], right=frozenset(range(1, len(header))))


def _counted(values: Sequence[float], form: str = ",") -> list[str]:
    base = values[0]
    if not base:
        return [f"{value:{form}}" if value else "-" for value in values]
    return [f"{base:{form}}", *(f"{value:{form}} ({value / base:.1%})" for value in values[1:])]
