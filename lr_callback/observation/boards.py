"""Boards: how loggers take what is no number: figures, text, arguments. Known by their methods, none is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from lightning.pytorch.loggers import Logger

from lr_callback.common.table import align

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arguments = Mapping[str, bool | int | float | str]
"""Name of an argument -> its value, as a logger can take it."""

CHARTS: Mapping[str, tuple[str, ...]] = {
    "kept": ("kept_parameters", "kept_multiply_adds"),
    "error of the layers": ("worst_error", "mean_error"),
    "layers factorized": ("layers_factorized",),
    "accuracy, of the validations before and after": ("accuracy_before", "accuracy_after"),
    "milliseconds of one run": ("milliseconds_before", "milliseconds_after", "milliseconds"),
    "seconds that it took": ("seconds",),
}
"""The layout of charts: title -> names of metrics; a chart of which a run logs none is left out."""


@dataclass(frozen=True)
class Board:
    """How a logger takes what is no number.

    Args:
        figure: called with a name, a figure and a step.
        text: called with a name, a text and a step; None: it takes none.
        begin: called once, with the arguments of the callback and the names of the metrics that the run logs.
    """

    figure: Callable[[str, Figure, int], object]
    text: Callable[[str, str, int], object] | None
    begin: Callable[[Arguments, Collection[str]], object]


class _Writer(Protocol):
    """What is used of TensorBoard's ``SummaryWriter``."""

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        """Add a figure."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Add a text, in Markdown."""

    def add_custom_scalars(self, layout: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Add a layout of charts, each with patterns of tags."""

    def _get_file_writer(self) -> _FileWriter: ...


class _FileWriter(Protocol):
    """What is used of TensorBoard's ``FileWriter``."""

    def add_summary(self, summary: object) -> None:
        """Add what TensorBoard has no method for."""


def board_of(logger: Logger) -> Board | None:
    """Return how a logger takes figures; None: it takes none.

    Those of TensorBoard are known by ``experiment.add_figure``, Weights & Biases by ``log_image``, MLflow and Comet by
    ``experiment.log_figure``.
    """
    known: Any = logger
    experiment: Any = getattr(logger, "experiment", None)
    if _has(experiment, "add_figure"):
        start = _tag_start(logger)
        return Board(
            lambda name, figure, step: experiment.add_figure(start + name, figure, step),
            lambda name, text, step: _add_text(experiment, start + name, text, step),
            partial(_begin_tensorboard, logger, experiment),
        )
    begin = partial(_log_arguments, logger)
    if _has(logger, "log_image"):
        return Board(lambda name, figure, step: known.log_image(name, [figure], step), None, begin)
    if not _has(experiment, "log_figure"):
        return None
    run = getattr(logger, "run_id", None)
    if run is not None:
        return Board(
            lambda name, figure, step: experiment.log_figure(run, figure, f"{name}/{step:07d}.png"),
            lambda name, text, step: experiment.log_text(run, text, f"{name}/{step:07d}.txt"),
            begin,
        )
    return Board(
        lambda name, figure, step: experiment.log_figure(name, figure, step=step),
        lambda name, text, step: experiment.log_text(text, step),
        begin,
    )


def _has(holder: object, name: str) -> bool:
    """Return whether the class of an object has a method; Lightning's dummies, which answer to all, have none."""
    return callable(getattr(type(holder), name, None))


def _tag_start(logger: Logger) -> str:
    """Return what TensorBoard's logger puts before the names of metrics, and with that before all that is logged."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}" if prefix else ""


def _add_text(writer: _Writer, name: str, text: str, step: int) -> None:
    """Give TensorBoard a text, which it reads as Markdown: indented, it is shown as it is."""
    writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)


def _begin_tensorboard(logger: Logger, writer: _Writer, arguments: Arguments, logged: Collection[str]) -> None:
    """Give TensorBoard the arguments and a layout; the arguments as hyperparameters, too, where a run has no others.

    Of one run it shows the hyperparameters that came first, and no more: those of the user stay alone.
    """
    start = _tag_start(logger)
    shown = {title: names for title, names in CHARTS.items() if not {*names}.isdisjoint(logged)}
    tags = {title: [f"{start}compression/{name}" for name in names] for title, names in shown.items()}
    patterns = {title: ["Multiline", [re.escape(tag) for tag in some]] for title, some in tags.items()}
    rows = [[name, str(value)] for name, value in arguments.items()]
    _add_text(writer, f"{start}compression/arguments", align(["argument", "value"], rows), 0)
    if getattr(logger, "hparams", None) == {}:
        _add_hyperparameters(writer, arguments, [*tags["kept"], *tags["error of the layers"]])
    writer.add_custom_scalars({"compression": patterns})


def _add_hyperparameters(writer: _Writer, arguments: Arguments, metrics: Iterable[str]) -> None:
    given = {f"compression/{name}": value for name, value in arguments.items()}
    make = import_module("torch.utils.tensorboard.summary").hparams  # takes a second to import
    for summary in make(given, dict.fromkeys(metrics, 0.0)):
        writer._get_file_writer().add_summary(summary)


def _log_arguments(logger: Logger, arguments: Arguments, logged: Collection[str]) -> None:
    logger.log_hyperparams({f"compression/{name}": value for name, value in arguments.items()})
