"""Stages: measure a run's snapshots side by side, with the model's own test or validation loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lr_callback.probe import Probe
from lr_callback.report import Stage

TITLES = {"dense": "dense, before", "cut": "right after", "final": "at the end"}
"""Snapshot -> what a person calls that moment."""


class _FirstBatch(Callback):
    """Watch the calls of an evaluation's first batch."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def _start(self) -> None:
        if not self._probe.seen:
            self._probe.start()

    def on_test_batch_start(self, *_: object) -> None:
        self._start()

    def on_test_batch_end(self, *_: object) -> None:
        self._probe.stop()

    def on_validation_batch_start(self, *_: object) -> None:
        self._start()

    def on_validation_batch_end(self, *_: object) -> None:
        self._probe.stop()


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
    return [_measure(trainer, model, datamodule, TITLES[name], files[name]) for name in TITLES if name in files]


def _measure(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, title: str, file: str
) -> Stage:
    probe = Probe(model)
    metrics = _evaluate(trainer, model, datamodule, file, probe)
    observation = probe.observe()
    return Stage(
        name=title,
        metrics=metrics,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=observation.multiply_adds(model),
        file_bytes=Path(file).stat().st_size,
        milliseconds=probe.milliseconds(),
    )


def _evaluate(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, file: str, probe: Probe
) -> dict[str, float]:
    """Run the test loop where the model has one, else the validation loop; return what it logged."""
    quiet = type(trainer)(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        callbacks=[_FirstBatch(probe)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run = quiet.test if is_overridden("test_step", model) else quiet.validate
    results = run(model, datamodule=datamodule, ckpt_path=file, verbose=False)
    return {name: float(value) for one in results for name, value in one.items()}
