"""Stages: measure a run's snapshots side by side, with the model's own test or validation loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lr_callback.probe import Probe
from lr_callback.report import Stage

TITLES = {"dense": "dense, before", "cut": "right after", "final": "at the end"}
"""Snapshot -> what a person calls that moment."""

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


class _FirstBatch(Callback):
    """Watch the calls of each evaluation's first batch."""

    def __init__(self, model: LightningModule) -> None:
        self.probe = Probe(model)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.probe = Probe(pl_module)

    def _start(self) -> None:
        if not self.probe.seen:
            self.probe.start()

    def on_test_batch_start(self, *_: object) -> None:
        self._start()

    def on_test_batch_end(self, *_: object) -> None:
        self.probe.stop()

    def on_validation_batch_start(self, *_: object) -> None:
        self._start()

    def on_validation_batch_end(self, *_: object) -> None:
        self.probe.stop()


def measure_stages(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, files: Mapping[str, str]
) -> list[Stage]:
    """Load each snapshot into the model, evaluate and time it, on the run's device.

    Args:
        trainer: of the run; its loggers and callbacks are left out of this.
        model: has the last snapshot's structure and weights afterwards.
        datamodule: of the run; None: the model has its own loaders.
        files: name of a snapshot, a key of :data:`TITLES` -> its file; existing ones in the order of the run.

    Returns:
        One stage for each file, in the order of :data:`TITLES`.
    """
    with _quiet():
        watch = _FirstBatch(model)
        evaluator = _evaluator(trainer, watch)
        return [
            _measure(evaluator, watch, model, datamodule, TITLES[name], files[name]) for name in TITLES if name in files
        ]


@contextmanager
def _quiet() -> Iterator[None]:
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


def _evaluator(trainer: Trainer, watch: _FirstBatch) -> Trainer:
    """Return a Trainer that evaluates as the run did, and writes nothing."""
    return type(trainer)(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _measure(
    evaluator: Trainer,
    watch: _FirstBatch,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    title: str,
    file: str,
) -> Stage:
    metrics = _evaluate(evaluator, model, datamodule, file)
    return Stage(
        name=title,
        metrics=metrics,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=watch.probe.observe().multiply_adds(model),
        file_bytes=Path(file).stat().st_size,
        milliseconds=watch.probe.milliseconds(),
    )


def _evaluate(
    evaluator: Trainer, model: LightningModule, datamodule: LightningDataModule | None, file: str
) -> dict[str, float]:
    """Run the test loop where the model has one, else the validation loop; return what it logged."""
    run = evaluator.test if is_overridden("test_step", model) else evaluator.validate
    results = run(model, datamodule=datamodule, ckpt_path=file, verbose=False)
    return {name: float(value) for one in results for name, value in one.items()}
