"""Report: what a person sees when a model is compressed, and at the end of a run.

What cannot be shown ends nothing: it is said once, as a warning, and the training goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lr_callback.common.table import WIDTH, align, printable, shorten, wrap

UNSTEADY = "too unsteady to compare"
"""What is said of times that say nothing."""
_NOISE = 0.5
"""Spread of times from which they are so."""
_TIMES = "ms a batch"
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def is_disabled(bar: object) -> bool:
    """Return whether a Lightning progress bar shows nothing; a bar that does not say is taken to show itself."""
    return bool(getattr(bar, "is_disabled", False))


class _RichConsole(Protocol):
    """What is used of Rich's console; Rich is an optional package."""

    is_terminal: bool
    is_jupyter: bool
    width: int

    def print(self, text: str, *, markup: bool, emoji: bool, highlight: bool, soft_wrap: bool) -> None:
        """Print a text above what moves."""


class RichProgress(Protocol):
    """What is used of Rich's progress display."""

    console: _RichConsole

    def add_task(self, description: str, *, total: float) -> int:
        """Add a line."""

    def update(self, task: int, **changes: object) -> None:
        """Change a line."""

    def refresh(self) -> None:
        """Draw."""

    def start(self) -> None:
        """Show it on the screen."""

    def stop(self) -> None:
        """Take it from the screen."""


def started_rich(bar: ProgressBar) -> RichProgress | None:
    """Return the Rich display of a bar, if it has one that is on the screen: there is none before the training."""
    progress: RichProgress | None = getattr(bar, "progress", None)
    return progress if getattr(getattr(progress, "live", None), "is_started", False) else None


def attempt(act: Callable[[], object]) -> bool:
    """Do what shows something, and return whether that could be done; if not, warn.

    An interrupt is not held up.
    """
    try:
        act()
    except Exception as error:
        rank_zero_warn(
            f"LowRankCompression: a text or a line of progress could not be shown ({type(error).__name__}: {error}). "
            "Compression and training go on, and `allocation` of the callback has the table. Look where the output of "
            "this program goes."
        )
        return False
    return True


def show(trainer: Trainer, text: str) -> None:
    """Print above the Trainer's progress bar, or where there is none, as a message; on rank zero."""
    bar = trainer.progress_bar_callback
    if bar is None or is_disabled(bar):
        attempt(lambda: rank_zero_info(text))
    elif trainer.is_global_zero:
        attempt(lambda: _print(bar, text))


def _print(bar: ProgressBar, text: str) -> None:
    rich = started_rich(bar)
    if rich is not None:
        # A name may look like markup; and lines too long for the terminal are for the terminal to continue.
        rich.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
    elif any(kind.__name__ == "TQDMProgressBar" for kind in type(bar).__mro__):
        Tqdm.write(encodable(text))  # the bar itself prints nothing while it has no line: before the training
    else:
        bar.print(encodable(text))


def encodable(text: str) -> str:
    r"""Return the text with what the standard output has no characters for escaped, as ``\xf6``."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write(text: str) -> None:
    """Write a line of a command's output: at once, since of what takes long each one is waited for."""
    sys.stdout.write(encodable(text) + "\n")
    sys.stdout.flush()


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
        spread: of these runs, see :class:`~lr_callback.units.latency.Timing`.
        batch: shape and dtype of its tensors; empty: none was seen.
    """

    name: str
    metrics: Mapping[str, float]
    parameters: int
    multiply_adds: int
    file_bytes: int
    milliseconds: float
    spread: float = 0.0
    batch: str = ""


def spread_of(stages: Sequence[Stage]) -> float:
    """Return how far runs of the stages differ: the largest spread."""
    return max((stage.spread for stage in stages), default=0.0)


def are_unsteady(stages: Sequence[Stage]) -> bool:
    """Return whether the times of the stages say nothing: runs differ too far."""
    return spread_of(stages) > _NOISE


def differing(stages: Sequence[Stage]) -> str:
    """Return how far runs of the stages differ, in words."""
    return f"runs differ by {spread_of(stages):.0%} of their median"


def of_a_batch(batch: str) -> str:
    """Return which batch counts and times are of, in words.

    Example::

        >>> of_a_batch("64x1x8x8 float32")
        'multiply-adds and milliseconds are of a batch of 64x1x8x8 float32'
    """
    return f"multiply-adds and milliseconds are of a batch of {batch}"


def comparison(stages: Sequence[Stage]) -> str:
    r"""Return the stages side by side as a table, each count also as a fraction of the first stage's.

    Lines below say which batch they are of, and that times are too unsteady to compare where they are.

    Example::

        >>> dense = Stage("dense", {"accuracy": 0.91}, 200, 4000, 1000, 2.0, batch="8x16 float32")
        >>> cut = Stage("after the cut", {"accuracy": 0.7}, 50, 1000, 300, 1.0, batch="8x16 float32")
        >>> print(comparison([dense, cut]).partition("\n")[2])
        accuracy       0.9100         0.7000
        parameters        200     50 (25.0%)
        multiply-adds   4,000  1,000 (25.0%)
        bytes on disk   1,000    300 (30.0%)
        ms a batch       2.00   1.00 (50.0%)
        multiply-adds and milliseconds are of a batch of 8x16 float32
    """
    rows = _compared(stages, ",")
    wide = max(map(len, _table(stages, rows).splitlines()))
    if wide > WIDTH:
        rows = _compared(stages, ".4g")
    room = WIDTH - max(map(len, _table(stages, [["", *cells] for _, *cells in rows]).splitlines()))
    lines = [_table(stages, [[shorten(name, max(_SHORTEST_NAME, room)), *cells] for name, *cells in rows])]
    batch = next((stage.batch for stage in stages if stage.batch), "")
    if batch:
        lines.append(wrap(of_a_batch(batch)))
    if are_unsteady(stages):
        lines.append(f"{_TIMES}: {UNSTEADY}; {differing(stages)}")
    return "\n".join(lines)


_SHORTEST_NAME = len("bytes on disk")


def _table(stages: Sequence[Stage], rows: Sequence[Sequence[str]]) -> str:
    header = ["", *(stage.name for stage in stages)]
    return align(header, rows, right=frozenset(range(1, len(header))))


def _compared(stages: Sequence[Stage], form: str) -> list[list[str]]:
    """Return a row for each metric that any stage has, and for each count."""
    names = dict.fromkeys(name for stage in stages for name in stage.metrics)
    return [
        *([printable(name), *(_metric(stage.metrics.get(name)) for stage in stages)] for name in names),
        ["parameters", *_counted([stage.parameters for stage in stages], form)],
        ["multiply-adds", *_counted([stage.multiply_adds for stage in stages], form)],
        ["bytes on disk", *_counted([stage.file_bytes for stage in stages], form)],
        [_TIMES, *_counted([stage.milliseconds for stage in stages], ",.2f")],
    ]


def _metric(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _counted(values: Sequence[float], form: str) -> list[str]:
    base = values[0]
    if not base:
        return [f"{value:{form}}" if value else "-" for value in values]
    return [f"{base:{form}}", *(f"{value:{form}} ({value / base:.1%})" for value in values[1:])]
