"""Measured: the networks of a run's files side by side: their sizes, their times in turns, their metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lr_callback.commands.from_checkpoint import calls_of, moved
from lr_callback.commands.stages import SILENT, batch_of, evaluation_of, logged_by
from lr_callback.common.example import Example
from lr_callback.common.table import on_one_line
from lr_callback.common.untouched import as_written, untouched
from lr_callback.edits.surgery import densify_
from lr_callback.files.checkpoint import restore_
from lr_callback.model.held import held_parameters
from lr_callback.model.observe import observe_run
from lr_callback.observation.report import Stage, quiet
from lr_callback.units.latency import timed_in_turns

_OF_THE_RUN = ("precision", "limit_test_batches", "limit_val_batches")
"""Arguments of a run's Trainer that its evaluation depends on."""


@dataclass(frozen=True)
class Times:
    """What the networks take for a batch.

    Args:
        milliseconds: of each.
        multiply_adds: of each.
        spreads: of each time, see :class:`~lr_callback.units.latency.Timing`.
        batch: shape and dtype of its tensors.
    """

    milliseconds: tuple[float, ...]
    multiply_adds: tuple[int, ...]
    spreads: tuple[float, ...]
    batch: str


def networks(model: nn.Module, files: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Return a copy of a model for each file, with its structure and weights; without that of the dense one, too.

    Args:
        model: as the code makes it.
        files: name of a stage -> its file, or what is in it, in the order of the run; ``dense``, the first stage, may
            be missing: then it is the model as it is, without factors.

    Raises:
        ValueError: If a file is of another model.
    """
    made = {"dense": copy.deepcopy(model), **{name: copy.deepcopy(model) for name in files if name != "dense"}}
    densify_(made["dense"])
    for name, file in files.items():
        restore_(made[name], file)
    return made


def sized(stages: tuple[Stage, ...], models: Mapping[str, nn.Module]) -> tuple[Stage, ...]:
    """Return the stages with the number of parameters of each network."""
    counts = [held_parameters(model) for model in models.values()]
    return tuple(replace(stage, parameters=count) for stage, count in zip(stages, counts, strict=True))


def times_of(chosen: Namespace, models: Mapping[str, nn.Module], device: torch.device) -> Times:
    """Make the calls of one batch of each network, in turns, and count its multiply-adds.

    Args:
        chosen: model, data and shape of the input, of a command line.
        models: of the structure of the chosen one, up to factors.
        device: where they are run.

    Raises:
        ValueError: If nothing says how the model is called, or it does not take that.
    """
    names = {module: name for name, module in chosen.model.named_modules()}
    calls = [(names[module], moved(example, device)) for module, example in calls_of(chosen)]
    batch = batch_of(calls)
    with ExitStack() as stack:
        runs = []
        for model in models.values():
            stack.enter_context(untouched(model.to(device)))
            runs.append(partial(_run, model, calls))
        counts = [_multiply_adds(model, run, batch) for model, run in zip(models.values(), runs, strict=True)]
        with as_written():
            times = timed_in_turns(runs, device)
    milliseconds, spreads = [one.nanoseconds / 1e6 for one in times], [one.spread for one in times]
    return Times(tuple(milliseconds), tuple(counts), tuple(spreads), batch)


def _run(model: nn.Module, calls: Sequence[tuple[str, Example]]) -> None:
    for place, example in calls:
        example.call(model.get_submodule(place))


def _multiply_adds(model: nn.Module, run: Callable[[], object], batch: str) -> int:
    try:
        return observe_run(model, run).multiply_adds(model)
    except Exception as error:  # whatever the model raises
        raise ValueError(
            f"the model must take a batch of {batch}, found that it makes a {type(error).__name__}: "
            f"{on_one_line(error)}; say by --input_shape what it is called with"
        ) from error


def timed_stages(stages: tuple[Stage, ...], times: Times) -> tuple[Stage, ...]:
    """Return the stages with times and multiply-adds."""
    measured = zip(stages, times.milliseconds, times.multiply_adds, times.spreads, strict=True)
    return tuple(
        replace(stage, milliseconds=time, multiply_adds=count, spread=spread) for stage, time, count, spread in measured
    )


def evaluated(stage: Stage, model: nn.Module, data: LightningDataModule | None, trainer: Trainer) -> Stage:
    """Return a stage with what the model's test loop logs, else its validation loop.

    Args:
        stage: of the model.
        model: with the weights of that stage.
        data: of the run; None: the model has its own loaders.
        trainer: see :func:`evaluator`.

    Raises:
        ValueError: If the model has no such loop, or no data for it.
    """
    if not isinstance(model, LightningModule):
        raise ValueError(
            f"a {type(model).__name__} has no test or validation loop: the model must be the run's LightningModule"
        )
    with quiet():
        run = evaluation_of(trainer, model, data)
        if run is None:
            raise ValueError(f"{type(model).__name__} has no test or validation loop, or there is no data for it")
        results = run(model, datamodule=data, verbose=False)
    return replace(stage, metrics=logged_by(results))


def evaluator(configuration: Mapping[str, Any], device: torch.device | None) -> Trainer:
    """Return a Trainer that evaluates as a run did, and writes nothing.

    Args:
        configuration: of the run; empty: it is not known.
        device: where; None: where Lightning would.

    Raises:
        ValueError: If Lightning makes none of the run's settings on that device.
    """
    written = configuration.get("trainer")
    known = written if isinstance(written, Mapping) else {}
    of_the_run = {name: known[name] for name in _OF_THE_RUN if known.get(name) is not None}
    with quiet():
        try:
            return Trainer(
                accelerator="auto" if device is None else device.type,
                devices=1 if device is None or device.index is None else [device.index],
                **of_the_run,
                **SILENT,
            )
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(
                f"a Trainer must evaluate on {device or 'the device that Lightning takes'} as the run did, with "
                f"{of_the_run or 'its defaults'}, found that Lightning refuses it: {error}"
            ) from error
