"""Runs: one network after the other, cut, measured, trained on with a real Trainer, measured again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lr_callback.callback import LowRankCompression
from lr_callback.commands.stages import SILENT, FirstBatch, call_of_step, evaluation_of, logged_by
from lr_callback.commands.study.plan import CONTROL, Plan, Run, digest
from lr_callback.commands.study.pruning import prune_filters_
from lr_callback.commands.study.rows import Row
from lr_callback.files.checkpoint import restore_
from lr_callback.model.held import held_parameters
from lr_callback.observation.report import quiet

Make = Callable[[], tuple[LightningModule, LightningDataModule | None]]
"""Makes the network and its data, as they are before any training."""

_ONE_BATCH = {"limit_test_batches": 1, "limit_val_batches": 1}
_ROOM = 1000
"""Epochs that a schedule is made for where none is trained: it may need some for its warm-up."""


@dataclass(frozen=True)
class Measured:
    """A network, measured by its own test loop.

    Args:
        metrics: name -> value.
        parameters: their number.
        multiply_adds: of the first batch.
    """

    metrics: Mapping[str, float]
    parameters: int
    multiply_adds: int


class _StopAtOnce(Callback):
    """End a fit before its first batch, after the callbacks before this one."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class Laboratory:
    """What all runs of a study have in common.

    Args:
        make: the network and the data.
        plan: of the study.
        setting: network, data and Trainer as plain data.
        trainer: arguments of every Trainer.
        folder: for the weights of the dense networks that are trained here.
    """

    def __init__(
        self, make: Make, plan: Plan, setting: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path
    ) -> None:
        self.make, self.plan, self.setting, self.trainer, self.folder = make, plan, setting, trainer, folder

    def metrics(self) -> list[str]:
        """Return the names of the metrics that the network's test logs, as its first batch shows them."""
        return list(self.measure(*self.make(), limits=_ONE_BATCH).metrics)

    def measure(
        self, model: LightningModule, data: LightningDataModule | None, limits: Mapping[str, int] | None = None
    ) -> Measured:
        """Run the test of a network, without one its validation, and count the multiply-adds of the first batch."""
        watch = FirstBatch(model)
        with quiet():
            trainer = self._trainer(1, [watch], limits or {})
            run = evaluation_of(trainer, model, data)
            results = [] if run is None else run(model, datamodule=data, verbose=False)
        model.to(trainer.strategy.root_device)  # a Trainer moves it to the CPU when it is done
        counted = watch.probe.observe().multiply_adds(model) if watch.probe.seen else 0
        metrics = logged_by(results)
        return Measured(metrics, held_parameters(model), counted)

    def run(self, run: Run) -> Row:
        """Carry out a run.

        What cannot be done to a network is a row with the reason. The control, which comes first, is not among that:
        what it stumbles over is wrong with all of them.
        """
        started = time.perf_counter()
        row = Row(self.plan.key(run, self.setting), run.name, run.keep_ratio, run.seed, self.plan.epochs)
        try:
            found = self._run(run, row)
        except (ValueError, MisconfigurationException) as error:
            if run.name == CONTROL:
                raise
            found = replace(row, reason=" ".join(str(error).split()))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return replace(found, seconds=round(time.perf_counter() - started, 1), finished=now)

    def _run(self, run: Run, row: Row) -> Row:
        model, data = self._network(run.seed)
        dense = self.measure(model, data, limits=_ONE_BATCH)
        treatment = self.plan.treatments.get(run.name)
        if treatment is not None and treatment.filter_pruning is None:
            right_after, after = self._compressed(run, model, data)
        else:
            if treatment is not None and treatment.filter_pruning is not None:
                network, example = call_of_step(model, data)
                prune_filters_(model, run.keep_ratio, network, example, treatment.filter_pruning)
            right_after, after = self._as_it_is(run, model, data)
        return replace(
            row,
            parameters=right_after.parameters,
            multiply_adds=right_after.multiply_adds or None,
            kept_parameters=right_after.parameters / dense.parameters,
            kept_multiply_adds=right_after.multiply_adds / dense.multiply_adds if dense.multiply_adds else None,
            right_after=right_after.metrics,
            after={} if after is None else after.metrics,
        )

    def _as_it_is(
        self, run: Run, model: LightningModule, data: LightningDataModule | None
    ) -> tuple[Measured, Measured | None]:
        """Measure a network, train it without the callback, and measure it again."""
        right_after = self.measure(model, data)
        if not self.plan.epochs:
            return right_after, None
        self._fit(run.seed, model, data, self.plan.epochs, [])
        return right_after, self.measure(model, data)

    def _compressed(
        self, run: Run, model: LightningModule, data: LightningDataModule | None
    ) -> tuple[Measured, Measured | None]:
        """Train a network that the callback cuts before the first batch; measure it at the end and as it was cut."""
        options = self.plan.treatments[run.name].options
        compression = LowRankCompression(run.keep_ratio, epochs=0, show_table=False, snapshots=True, **options)
        after = None
        with tempfile.TemporaryDirectory() as scratch:
            last: list[Callback] = [] if self.plan.epochs else [_StopAtOnce()]
            self._fit(run.seed, model, data, self.plan.epochs or _ROOM, [compression, *last], folder=scratch)
            if self.plan.epochs:
                after = self.measure(model, data)
                restore_(model, _cut_of(compression, scratch))
            return self.measure(model, data), after

    def _network(self, seed: int) -> tuple[LightningModule, LightningDataModule | None]:
        """Return the dense network as every run of a seed finds it, and the data."""
        seed_everything(seed, verbose=False)
        model, data = self.make()
        epochs = self.plan.dense_epochs
        if not epochs:
            return model, data
        file = self.folder / f"dense-{digest({**self.setting, 'dense_epochs': epochs, 'seed': seed})}.pt"
        if not file.exists():
            self._fit(seed, model, data, epochs, [])
            part = file.with_suffix(".part")
            torch.save(model.state_dict(), part)
            part.replace(file)
            model, data = self.make()
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model, data

    def _fit(
        self,
        seed: int,
        model: LightningModule,
        data: LightningDataModule | None,
        epochs: int,
        callbacks: list[Callback],
        folder: str | None = None,
    ) -> None:
        seed_everything(seed, verbose=False)
        with quiet():
            self._trainer(epochs, callbacks, {"default_root_dir": folder}).fit(model, datamodule=data)

    def _trainer(self, epochs: int, callbacks: list[Callback], more: Mapping[str, Any]) -> Trainer:
        own: dict[str, Any] = {"devices": 1, "max_epochs": epochs, "callbacks": callbacks}
        return Trainer(**{**self.trainer, **SILENT, **own, **more})


def _cut_of(compression: LowRankCompression, folder: str) -> str:
    """Return the file of the weights right after the cut.

    Raises:
        OSError: If the run could not write it.
    """
    if "cut" in compression.snapshot_files:
        return compression.snapshot_files["cut"]
    raise OSError(
        f"study: the weights right after a cut must be kept until the end of a run, found that {folder} took no file; "
        "make room there, or name another folder by the environment variable TMPDIR, and start the study again: "
        "it goes on with what is missing."
    )
