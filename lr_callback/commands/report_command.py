"""Report command: from a checkpoint on the disk to a page that says what its compression did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from torch import nn

from lr_callback.commands.attempts import Attempts
from lr_callback.commands.from_checkpoint import (
    add_checkpoint,
    add_model,
    check_writable,
    configuration,
    described_run,
    device_named,
    named_model,
    parsed,
    weights_in,
    why_unknown,
)
from lr_callback.commands.measured import evaluated, evaluator, networks, sized, timed_stages, times_of
from lr_callback.commands.origin import arguments_of, commands_for, device_of, origin_of
from lr_callback.commands.recorded import NOW, Recorded, recorded
from lr_callback.commands.snippet import loading_code
from lr_callback.page.facts import Facts, Missing
from lr_callback.page.page import page
from lr_callback.page.pictures import pictures_of

_AGAIN = "make the page again after that"
_ALL = "times, multiply-adds and accuracies"
_WAY = (
    "name the classes, `--model my_module.MyModule --data my_module.MyData`, or a configuration that names them, "
    "`--config config.yaml`"
)
_ASKED = ("--model", "--data", "--config", "--input_shape", "--device")
"""Arguments that name what is measured."""
_NAMED = ("--model", "--data", "--config", "--input_shape")
"""Those that other commands on the same checkpoint take, too."""


def report_command(arguments: Sequence[str]) -> str:
    """Write the page of a checkpoint.

    Args:
        arguments: of ``lr-callback report``; see its ``--help``.

    Returns:
        Where it is, and what it lacks.
    """
    parser = report_parser()
    try:
        return _report(*_read(parser, arguments))
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))


def report_parser(exit_on_error: bool = True) -> ArgumentParser:
    """Return the parser of ``lr-callback report``.

    Args:
        exit_on_error: whether a wrong command line ends the process; else it raises.
    """
    description = "Write one HTML page that says what the compression of a checkpoint did."
    parser = ArgumentParser(prog="lr-callback report", description=description, exit_on_error=exit_on_error)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--output", type=str | None, help="the page; by default beside the checkpoint, with the suffix .html")
    add("--device", type=str | None, help="where it is measured, as cpu or cuda:0; by default where Lightning would")
    add_model(parser)
    return parser


def _read(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, Attempts]:
    """Read the command line, and how the run made its model and data; what of that fails is told in the page."""
    attempts = Attempts(arguments)
    if attempts.are_asked(*_ASKED):
        return parsed(parser, arguments), attempts
    found = attempts.make(_ALL, _WAY, lambda: parsed(report_parser(exit_on_error=False), arguments))
    if found is None:
        found = parser.parse_args(list(arguments))  # a wrong command line ends here
    return found, attempts


def _report(chosen: Namespace, attempts: Attempts) -> str:
    checkpoint = Path(chosen.checkpoint)
    loaded = weights_in(checkpoint)
    said = recorded(checkpoint, loaded)
    output = Path(chosen.output or checkpoint.with_suffix(".html"))
    check_writable("--output", output, checkpoint)
    device = None if chosen.device is None else device_named(chosen.device)
    written = configuration(checkpoint, chosen.config)
    named = attempts.words(*_NAMED)
    facts = _told(checkpoint, said, written, chosen.config, named)
    pictures = attempts.make("figures", _AGAIN, lambda: pictures_of(said.allocation, said.record.curves))
    facts = replace(facts, pictures=pictures or ())
    models = _networks(chosen, said, attempts)
    if models is not None:
        facts = replace(facts, stages=sized(facts.stages, models))
        trainer = attempts.make(_ALL, "name a device, `--device cpu`", lambda: evaluator(written, device), "--device")
        facts = facts if trainer is None else _side_by_side(facts, chosen, said, models, trainer, attempts)
    facts = replace(facts, missing=tuple(attempts.missing))
    _write(output, page(facts))
    return "\n".join([f"report: {output}", *map(str, facts.missing)])


def _told(
    checkpoint: Path, said: Recorded, written: Mapping[str, Any], config: str | None, named: Sequence[str]
) -> Facts:
    """Return what the checkpoint, the configuration of its run, and the names on the command line say by themselves."""
    model = named_model(named)
    by_name = None if model is None else {"class_path": model}
    described = described_run(checkpoint, config, model).get("model", by_name)
    return Facts(
        str(checkpoint),
        said.allocation,
        said.stages(),
        origin=origin_of(checkpoint, said),
        arguments=arguments_of(written),
        loading=loading_code(described, checkpoint),
        commands=commands_for(checkpoint, named),
    )


def _networks(chosen: Namespace, said: Recorded, attempts: Attempts) -> dict[str, nn.Module] | None:
    """Return the network of each stage; None where it is not known how one is made."""
    if chosen.model is None:
        if _ALL not in (one.what for one in attempts.missing):
            why = why_unknown(Path(chosen.checkpoint), chosen.config)
            attempts.missing.append(Missing(_ALL, why, _WAY))
        return None
    files = {**said.moments, NOW: Path(chosen.checkpoint)}
    return attempts.make(_ALL, _WAY, lambda: networks(chosen.model, files), "--model", "--config")


def _side_by_side(
    facts: Facts,
    chosen: Namespace,
    said: Recorded,
    models: Mapping[str, nn.Module],
    trainer: Trainer,
    attempts: Attempts,
) -> Facts:
    """Return the facts with the metrics and the times of all stages."""
    facts = _evaluated(facts, chosen, said, models, trainer, attempts)
    return _timed(facts, chosen, models, trainer.strategy.root_device, attempts)


def _evaluated(
    facts: Facts,
    chosen: Namespace,
    said: Recorded,
    models: Mapping[str, nn.Module],
    trainer: Trainer,
    attempts: Attempts,
) -> Facts:
    """Return the facts with the metrics of each stage whose weights are those of the run."""
    known = {*said.moments, NOW}
    stages = attempts.make(
        "accuracies",
        "`--data my_module.MyData`",
        lambda: evaluated(facts.stages, models, chosen.data, known, trainer),
        "--data",
    )
    if stages is None:
        return facts
    if "dense" not in known:
        why = "there is no snapshot from before the cut"
        way = "`LowRankCompression(snapshots=True)` in the next run; `lr-callback fit` does so by itself"
        attempts.missing.append(Missing("accuracies of the network before", why, way))
    return replace(facts, stages=stages)


def _timed(
    facts: Facts, chosen: Namespace, models: Mapping[str, nn.Module], device: torch.device, attempts: Attempts
) -> Facts:
    """Return the facts with the times of all stages."""
    way = "say what the model is called with, `--input_shape 1,3,32,32`"
    times = attempts.make("times and multiply-adds", way, lambda: times_of(chosen, models, device), "--input_shape")
    if times is None:
        return facts
    origin = {**facts.origin, "measured on": device_of(device)}
    stages = timed_stages(facts.stages, times)
    return replace(facts, stages=stages, spread=times.spread, batch=times.batch, origin=origin)


def _write(path: Path, text: str) -> None:
    """Write the page, whole or not at all."""
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        part.write_text(text, encoding="utf-8")
        part.replace(path)
