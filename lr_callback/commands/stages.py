"""Stages: measure a run's snapshots side by side, with the model's own test or validation loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lr_callback.common.example import Example
from lr_callback.common.untouched import as_written, untouched
from lr_callback.files.checkpoint import restore_
from lr_callback.host.copies import copied_module
from lr_callback.model.held import held_parameters
from lr_callback.model.probe import Probe
from lr_callback.observation.report import Stage, quiet
from lr_callback.units.latency import LayerInput, Timing, timed_in_turns

SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
"""Arguments of a Trainer that shows and writes nothing."""
Run = tuple[nn.Module, Callable[[], object]]
"""A network, and calls of it."""
TITLES = {"dense": "dense, before", "cut": "right after", "final": "at the end"}
"""Snapshot -> what a person calls that moment."""


class FirstBatch(Callback):
    """Watch the calls of each evaluation's first batch.

    Args:
        model: whose calls are watched.

    Attributes:
        probe: that has seen them.
    """

    def __init__(self, model: LightningModule) -> None:
        self.probe = Probe(model)

    def _start(self) -> None:
        if not self.probe.seen:
            self.probe.start()

    def on_test_batch_start(self, *_: object) -> None:
        """Start, at the first batch."""
        self._start()

    def on_test_batch_end(self, *_: object) -> None:
        """Stop."""
        self.probe.stop()

    def on_validation_batch_start(self, *_: object) -> None:
        """Start, at the first batch."""
        self._start()

    def on_validation_batch_end(self, *_: object) -> None:
        """Stop."""
        self.probe.stop()


def measure_stages(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, files: Mapping[str, str]
) -> list[Stage]:
    """Load each snapshot into the model and evaluate it, then time copies of all in turns, on the run's device.

    The model's test loop is run where it and its data have one, else the validation loop; without either a stage has
    no metrics and no times, nor has a module that cannot be copied times.

    Args:
        trainer: of the run; its loggers and callbacks are left out of this.
        model: has the last snapshot's structure and weights afterwards.
        datamodule: of the run; None: the model has its own loaders.
        files: name of a snapshot, a key of :data:`TITLES` -> its file; existing ones in the order of the run.

    Returns:
        One stage for each file, in the order of :data:`TITLES`.
    """
    device, watch = model.device, FirstBatch(model)
    stages: list[Stage] = []
    runs: list[Run | None] = []
    with quiet():
        evaluator = _evaluator(trainer, watch)
        for name in [name for name in TITLES if name in files]:
            stages.append(_measure(evaluator, watch, model, datamodule, TITLES[name], files[name]))
            runs.append(None if None in runs else _run_of_copy(model, watch.probe))
        times = _times(runs, evaluator.strategy.root_device)
    model.to(device)
    if times is None:
        return stages
    timed = zip(stages, times, strict=True)
    return [replace(stage, milliseconds=time.nanoseconds / 1e6, spread=time.spread) for stage, time in timed]


def _run_of_copy(model: LightningModule, probe: Probe) -> Run | None:
    """Return a copy of a module as it is now, and the calls of it that its evaluation makes; None if that cannot be."""
    if not probe.seen:
        return None
    try:
        copied = copied_module(model, "the times of the stages are measured on copies", "see `lr-callback report`")
    except MisconfigurationException as error:  # the training is over: the rest of the table is shown all the same
        rank_zero_warn(str(error))
        return None
    return copied, partial(probe.repeat, copied)


def _times(runs: Sequence[Run | None], device: torch.device) -> list[Timing] | None:
    """Return the times of the calls of all modules, in eval mode, in turns; None if those of one are not known."""
    known = [run for run in runs if run is not None]
    if len(known) < len(runs):
        return None
    with ExitStack() as stack:
        for copied, _ in known:
            stack.enter_context(untouched(copied))
        stack.enter_context(as_written())
        return timed_in_turns([repeat for _, repeat in known], device)


def calls_of_step(model: LightningModule, datamodule: LightningDataModule | None) -> list[tuple[nn.Module, Example]]:
    """Return the modules that a module's step calls on the first batch of its test or validation data, and how.

    Args:
        model: is in no Trainer afterwards, and on the CPU.
        datamodule: of the run; None: the model has its own loaders.

    Raises:
        ValueError: If there is no such step, or no data for it, or it calls no module.
    """
    watch = FirstBatch(model)
    with quiet():
        trainer = Trainer(
            accelerator="cpu", devices=1, callbacks=[watch], limit_test_batches=1, limit_val_batches=1, **SILENT
        )
        run = evaluation_of(trainer, model, datamodule)
        if run is not None:
            run(model, datamodule=datamodule, verbose=False)
    model.trainer = None
    if not watch.probe.seen:
        raise ValueError(
            f"{type(model).__name__}: a test or validation step and data for it must say what is run and with which "
            f"input, found {'no such step, or no data for it' if run is None else 'that it calls no module'}; say the "
            "shape of its input by --input_shape."
        )
    return watch.probe.calls


def call_of_step(model: LightningModule, datamodule: LightningDataModule | None) -> tuple[nn.Module, Example]:
    """Return the one module that a module's step calls, and how; see :func:`calls_of_step`.

    Raises:
        ValueError: If there is none, or there are several, which are called one after the other.
    """
    modules = dict(reversed(calls_of_step(model, datamodule)))  # the first call of each
    if len(modules) != 1:
        raise ValueError(
            f"{type(model).__name__}: its test or validation step must call one module, to tell what is run and "
            f"with which input, found {len(modules)}; give the network by --model and the shape of its input by "
            "--input_shape."
        )
    return next(iter(modules.items()))


def _evaluator(trainer: Trainer, watch: FirstBatch) -> Trainer:
    """Return a Trainer that evaluates as the run did, and writes nothing."""
    return type(trainer)(
        accelerator=trainer.strategy.root_device.type,  # by name: an object would lose the run's autocast
        devices=1,
        precision=trainer.precision,
        limit_test_batches=trainer.limit_test_batches,
        limit_val_batches=trainer.limit_val_batches,
        callbacks=[watch],
        **SILENT,
    )


def _measure(
    evaluator: Trainer,
    watch: FirstBatch,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    title: str,
    file: str,
) -> Stage:
    watch.probe = Probe(model)
    metrics = _evaluate(evaluator, model, datamodule, file)
    model.to(evaluator.strategy.root_device)  # a Trainer moves the model to the CPU when it is done
    return Stage(
        name=title,
        metrics=metrics,
        parameters=held_parameters(model),
        multiply_adds=watch.probe.observe().multiply_adds(model),
        file_bytes=Path(file).stat().st_size,
        milliseconds=0.0,  # measured when all stages are there
        batch=batch_of(watch.probe.calls),
    )


def batch_of(calls: Sequence[tuple[object, Example]]) -> str:
    """Return shape and dtype of the tensors of the first of some calls; nothing without calls."""
    return ", ".join(str(LayerInput.of(tensor)) for _, example in calls[:1] for tensor in example.tensors)


def _evaluate(
    evaluator: Trainer, model: LightningModule, datamodule: LightningDataModule | None, file: str
) -> dict[str, float]:
    """Load a snapshot and return what the model's evaluation logs; nothing where it has none."""
    run = evaluation_of(evaluator, model, datamodule)
    if run is None:
        restore_(model, file)
        return {}
    results = run(model, datamodule=datamodule, ckpt_path=file, verbose=False)
    return logged_by(results)


def logged_by(results: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return what an evaluation logs, of all its loaders together.

    Example::

        >>> logged_by([{"test_loss": 0.5}, {"other_loss": 1}])
        {'test_loss': 0.5, 'other_loss': 1.0}
    """
    return {name: float(value) for one in results for name, value in one.items()}


def evaluation_of(
    evaluator: Trainer, model: LightningModule, datamodule: LightningDataModule | None
) -> Callable[..., Sequence[Mapping[str, float]]] | None:
    """Return the test loop where there are a step and data for it, else the validation loop, else None."""
    sources = [one for one in (model, datamodule) if one is not None]
    loops = {
        ("test_step", "test_dataloader"): evaluator.test,
        ("validation_step", "val_dataloader"): evaluator.validate,
    }
    for (step, loader), run in loops.items():
        if is_overridden(step, model) and any(is_overridden(loader, source) for source in sources):
            return run
    return None
