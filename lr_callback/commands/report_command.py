"""Report command: from a checkpoint on the disk to a page that says what its compression did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from torch import nn

from lr_callback.commands.answers import Parser
from lr_callback.commands.attempts import Attempts
from lr_callback.commands.from_checkpoint import (
    add_checkpoint,
    add_model,
    check_writable,
    device_named,
    files_named,
    named_model,
    parsed,
)
from lr_callback.commands.measured import evaluated, evaluator, networks, sized, timed_stages, times_of
from lr_callback.commands.origin import arguments_of, commands_for, device_of, origin_of
from lr_callback.commands.places import is_exit, raised_in_own_code
from lr_callback.commands.recorded import NOW, Recorded, recorded
from lr_callback.commands.run_files import RunFiles
from lr_callback.commands.snippet import loading_code
from lr_callback.observation.report import write
from lr_callback.page.facts import Facts, Missing
from lr_callback.page.page import page
from lr_callback.page.pictures import pictures_of

_AGAIN = "make the page again after that"
_METRICS = "metrics"
_ALL = f"times, multiply-adds and {_METRICS}"
_WAY = (
    "name the classes, `--model my_module.MyModule --data my_module.MyData`, or a configuration that names them, "
    "`--config config.yaml`"
)
_WAY_OF_DATA = "`--data my_module.MyData`"
_NAMED = ("--model", "--data", "--config", "--input_shape")
"""Arguments that name what is measured; other commands on the same checkpoint take them, too."""
_LESS: Mapping[tuple[str, ...], tuple[str, str]] = {
    (): ("", ""),
    ("data",): (_METRICS, _WAY_OF_DATA),
    ("model", "data"): (_ALL, _WAY),
}
"""What is done without where it cannot be made -> what the page lacks then, and how to have it."""


@dataclass(frozen=True)
class _Measuring:
    """What is needed to measure the stages of a run.

    Args:
        chosen: model, data and shape of the input, of the command line.
        models: the network of each stage.
        known: names of those whose weights are those of the run.
        trainer: evaluates them.
    """

    chosen: Namespace
    models: Mapping[str, nn.Module]
    known: Sequence[str]
    trainer: Trainer


def report_command(arguments: Sequence[str]) -> None:
    """Write the page of a checkpoint; tell where it is, and what it lacks.

    Args:
        arguments: of ``lr-callback report``; see its ``--help``.
    """
    parser, attempts = report_parser(), Attempts(arguments)
    try:
        files = files_named(arguments)
        chosen = _read(parser, files, attempts)
        told = _report(chosen, files or RunFiles(Path(chosen.checkpoint), chosen.config), attempts)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.refuse(error)
    write(told)


def report_parser(exit_on_error: bool = True) -> Parser:
    """Return the parser of ``lr-callback report``.

    Args:
        exit_on_error: whether a wrong command line ends the process; else it raises.
    """
    description = "Write one HTML page that says what the compression of a checkpoint did."
    parser: Parser = Parser(prog="lr-callback report", description=description, exit_on_error=exit_on_error)
    add = parser.add_argument
    add_checkpoint(parser, "a checkpoint of a run with LowRankCompression, as ModelCheckpoint writes them")
    add("--output", type=str | None, help="the page, a name that ends in .html; by default that of the checkpoint")
    add("--device", type=str | None, help="where it is measured, as cpu or cuda:0; by default where Lightning would")
    add_model(parser)
    return parser


def _read(parser: Parser, files: RunFiles | None, attempts: Attempts) -> Namespace:
    """Read the command line; make model and data, without those whose own code fails: that is told in the page."""
    failed: BaseException | None = None
    for without, (what, way) in _LESS.items():
        words = attempts.words_without(*(f"--{name}" for name in without))
        try:
            chosen = parsed(report_parser(exit_on_error=False), words, files, without)
        except (Exception, SystemExit) as error:  # whatever a user's code, and a parser, raise
            if is_exit(error):
                raise
            if attempts.are_asked(*_NAMED) and raised_in_own_code(error) is None:
                parser.refuse(error)
            failed = error
            continue
        if failed is not None:
            attempts.note_error(what, way, failed)
        return chosen
    return parser.parse_args(attempts.words_without())  # a wrong command line ends here


def _report(chosen: Namespace, files: RunFiles, attempts: Attempts) -> str:
    said = recorded(files.checkpoint, files.loaded)
    output = Path(chosen.output or files.checkpoint.with_suffix(".html"))
    check_writable("--output", output, [".html"], files.checkpoint)
    device = None if chosen.device is None else device_named(chosen.device)
    facts = _told(files, said, attempts.words(*_NAMED), chosen.model is not None)
    pictures = attempts.make("figures", _AGAIN, lambda: pictures_of(said.allocation, said.record.curves))
    facts = replace(facts, pictures=pictures or ())
    models = _networks(chosen, files, said, attempts)
    if models is not None:
        facts = replace(facts, stages=sized(facts.stages, models))
        way = "name a device, `--device cpu`"
        trainer = attempts.make(_ALL, way, lambda: evaluator(files.configuration, device), "--device")
        if trainer is not None:
            measuring = _Measuring(chosen, models, [*said.moments, NOW], trainer)
            facts = _timed(_evaluated(facts, measuring, attempts), measuring, attempts)
    facts = replace(facts, missing=tuple(attempts.missing))
    _write(output, page(facts))
    return "\n".join([f"report: {output}", *map(str, facts.missing)])


def _told(files: RunFiles, said: Recorded, named: Sequence[str], is_made: bool) -> Facts:
    """Return what the checkpoint, the configuration of its run, and the names on the command line say by themselves."""
    model = named_model(named)
    by_name = None if model is None else {"class_path": model}
    # A class that is named and cannot be made may be one that cannot be imported.
    described = files.described(model) if is_made or model is None else {}
    return Facts(
        str(files.checkpoint),
        said.allocation,
        said.stages(),
        origin=origin_of(files.checkpoint, said),
        arguments=arguments_of(files.configuration),
        loading=loading_code(described.get("model", by_name), files.checkpoint),
        commands=commands_for(files.checkpoint, named),
    )


def _networks(chosen: Namespace, files: RunFiles, said: Recorded, attempts: Attempts) -> dict[str, nn.Module] | None:
    """Return the network of each stage; None where it is not known how one is made."""
    if chosen.model is None:
        if not attempts.lack(_ALL):
            attempts.note(Missing(_ALL, files.why_unknown(), _WAY))
        return None
    weights: dict[str, Path | Mapping[str, Any]] = {**said.moments, NOW: files.loaded}
    return attempts.make(_ALL, _WAY, lambda: networks(chosen.model, weights), "--model", "--config")


def _evaluated(facts: Facts, measuring: _Measuring, attempts: Attempts) -> Facts:
    """Return the facts with the metrics of each stage whose weights are those of the run, as far as they are had."""
    stages = {name: stage for name, stage in zip(measuring.models, facts.stages, strict=True)}
    if attempts.lack(_METRICS):  # the data that are asked for cannot be made: those of the model are others
        return facts
    had = False
    for name in measuring.known:
        what = f"{_METRICS} of the stage '{stages[name].name}'" if had else _METRICS
        run = partial(evaluated, stages[name], measuring.models[name], measuring.chosen.data, measuring.trainer)
        found = attempts.make(what, _WAY_OF_DATA, run, "--data")
        if found is None and not had:
            return facts
        had, stages[name] = True, found or stages[name]
    if "dense" not in measuring.known:
        why = "there is no snapshot from before the cut"
        way = "`LowRankCompression(snapshots=True)` in the next run; `lr-callback fit` does so by itself"
        attempts.note(Missing(f"{_METRICS} of the network before", why, way))
    return replace(facts, stages=tuple(stages.values()))


def _timed(facts: Facts, measuring: _Measuring, attempts: Attempts) -> Facts:
    """Return the facts with the times of all stages."""
    way, device = "say what the model is called with, `--input_shape 1,3,32,32`", measuring.trainer.strategy.root_device
    run = partial(times_of, measuring.chosen, measuring.models, device)
    times = attempts.make("times and multiply-adds", way, run, "--input_shape")
    if times is None:
        return facts
    origin = {**facts.origin, "measured on": device_of(device)}
    stages = timed_stages(facts.stages, times)
    return replace(facts, stages=stages, batch=times.batch, origin=origin)


def _write(path: Path, text: str) -> None:
    """Write the page, whole or not at all."""
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        part.write_text(text, encoding="utf-8")
        part.replace(path)
