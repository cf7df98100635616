"""Checkpointed: what a callback knows of its run, the hooks by which it learns it, and those by which files keep it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lr_callback.decisions.allocation import Allocation
from lr_callback.decisions.costs import Unit
from lr_callback.decisions.curves import Curves
from lr_callback.files.hook import release_structure
from lr_callback.host.counting import Counting
from lr_callback.host.distilling import Distilling
from lr_callback.host.logged import Logged
from lr_callback.host.packages import CallbackBase
from lr_callback.host.record import Record
from lr_callback.host.resume import Resuming, note_groups
from lr_callback.host.snapshots import write_snapshot


class Checkpointed(CallbackBase):
    """A callback with the knowledge of its run.

    Args:
        units: of the budgets.
        monitor: name of the accuracy that validations log, or None.
        distill: weight of the distillation loss, or None.
        temperature: of its softmaxes.
        learning_rate_rewind: whether learning rates are rewound to where they began.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        monitor: str | None,
        distill: float | None,
        temperature: float,
        learning_rate_rewind: bool,
    ) -> None:
        super().__init__()
        self._options, self.learning_rate_rewind = (units, monitor, distill, temperature), learning_rate_rewind
        self._forget()
        self._resuming = Resuming()
        self.snapshots = False

    def _forget(self) -> None:
        """Begin anew: an earlier run of this callback may have been with another model or other batches."""
        units, monitor, weight, temperature = self._options
        self._record, self._counting, self._logged = Record(), Counting(units), Logged(monitor)
        self._distilling = Distilling(weight, temperature)

    @property
    def allocation(self) -> Allocation | None:
        """What the latest compression made of each layer; None before the first."""
        return self._record.allocation

    @property
    def curves(self) -> Curves | None:
        """What figures draw of the latest compression; None before the first, or of an older file."""
        return self._record.curves

    @property
    def snapshot_files(self) -> dict[str, str]:
        """The snapshots that were written: name -> path."""
        return dict(self._record.snapshot_files)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data and tensors."""
        observation, teacher = self._counting.observation, self._distilling.weights
        return replace(self._record, observation=observation, teacher=teacher).to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` wrote.

        Raises:
            ValueError: If a newer version or something else wrote it. Nothing was changed.
        """
        record = Record.from_dict(state_dict).resumed(self.learning_rate_rewind)
        self._counting.observation, self._distilling.written = record.observation, record.teacher
        self._record = replace(record, teacher=None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the names of the parameters in each optimizer's groups."""
        note_groups(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the names of the parameters in each optimizer's groups, and whether an epoch is to begin."""
        self._resuming.read(checkpoint, trainer.max_epochs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Watch the first batch: how the network is called is not known before; distil."""
        self._counting.watch(pl_module)
        self._distilling.watch(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy of the first validation after a compression."""
        self._logged.after(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks of ours behind."""
        release_structure(pl_module)
        self._counting.stop()
        self._distilling.end()

    def _snapshot(self, trainer: Trainer, name: str, again: bool = True) -> None:
        if self.snapshots and (again or name not in self.snapshot_files):
            self._record = self._record.without_files(name).with_files(write_snapshot(trainer, name))
