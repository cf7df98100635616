"""Resume: the turn of an epoch, where compressions are due, as a file tells of it.

Lightning 2.6 does not always call the hooks of an epoch's start, or train its batches, when a run is resumed from a
file of the turn of an epoch; a compression would be left out, or come in another epoch. Here all such files are read as
what they are: one epoch is over, the next has not begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lr_callback.edits.optimizers import names_of, rebind
from lr_callback.host.trainer import schedulers_of

_GROUPS = "lr_callback_optimizer_names"


@dataclass
class Resuming:
    """What a run knows of the file that it goes on from.

    Args:
        expected: whether a file that is read now is that one; later ones are of a search for a rate or a batch size.
    """

    expected: bool = False
    _names: list[list[list[str | None]]] | None = None
    _turns: bool = False

    def read(self, checkpoint: dict[str, Any], max_epochs: int | None) -> None:
        """Note the names of the parameters in each optimizer's groups, and whether an epoch is to begin."""
        self._turns |= self.expected and turn_epoch(checkpoint, max_epochs)
        self._names = checkpoint.get(_GROUPS)

    def check(self, trainer: Trainer) -> None:
        """Refuse to resume from a file of weights alone, of which Lightning says less.

        Raises:
            MisconfigurationException: If the file has no states of optimizers or schedulers.
        """
        read = trainer._checkpoint_connector._loaded_checkpoint
        missing = [name for name in ("optimizer_states", "lr_schedulers") if read and name not in read]
        if missing:
            raise MisconfigurationException(
                f"LowRankCompression: a file that a run is resumed from must hold the states of its optimizers, its "
                f"schedulers and this callback; {trainer.ckpt_path} lacks {', '.join(missing)}, it is one of weights "
                "alone (`save_weights_only=True`, or a snapshot of this callback). To begin a new run with its weights "
                "take `model = lr_callback.load_from_checkpoint(cls, path)` or `lr_callback.restore_(model, path)`, "
                "then `trainer.fit(model)` without `ckpt_path`."
            )

    def order_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizers' parameters in the order of the file, before it gives them their states."""
        self.expected = False
        if self._names is not None:
            rebind(trainer.optimizers, self._names, dict(pl_module.named_parameters()), schedulers_of(trainer))
            self._names = None

    def begin(self, trainer: Trainer) -> None:
        """Begin an epoch that is to begin."""
        if self._turns:
            begin_epoch(trainer)


def note_groups(trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write the names of the parameters in each optimizer's groups into a checkpoint."""
    checkpoint[_GROUPS] = names_of(trainer.optimizers, dict(pl_module.named_parameters()))


def turn_epoch(checkpoint: dict[str, Any], max_epochs: int | None = None) -> bool:
    """Let a run that is resumed from a file of the turn of an epoch begin the new epoch with its hooks and batches.

    The files that are meant were written

    - after an epoch's last batch and before its validation, as with ``every_n_train_steps``: the new epoch's hooks
      would be left out (the validation and the hooks of the epoch's end are, by Lightning itself);
    - at an epoch's end, or after a run: with ``max_steps`` the epoch would be counted twice, and the hooks left out;
    - in the hooks of an epoch's start, as when something fails there and a checkpoint is kept of that moment: the
      batches of the epoch before would count as those of the new one, which would be left out.

    Args:
        checkpoint: as it was read, before the loops take over their part; edited in place.
        max_epochs: of the run. After the last epoch none is to begin: its end is left to come, as Lightning does it.

    Returns:
        Whether the file is one of these; then :func:`begin_epoch` must be called before the epoch begins.

    Example::

        >>> counted = {"ready": 3, "started": 2, "processed": 2, "completed": 2}
        >>> progress = {"total": dict(counted), "current": dict(counted)}
        >>> turn_epoch({"loops": {"fit_loop": {"epoch_progress": progress}}})
        True
        >>> progress["current"]
        {'ready': 2, 'started': 2, 'processed': 2, 'completed': 2}
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loop.get("epoch_progress", {}), loop.get("epoch_loop.batch_progress", {})
    after_last_batch = _is_after_last_batch(epochs, batches)
    if not after_last_batch and not _is_between(epochs):
        return False
    if after_last_batch and epochs["total"]["processed"] + 1 == max_epochs:
        return False
    for counters in epochs.values():
        counters.update(dict.fromkeys(counters, counters["processed"] + after_last_batch))
    if after_last_batch:
        for counters in (batches["total"], batches["current"]):
            counters["completed"] = counters["processed"]
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    return True


def begin_epoch(trainer: Trainer) -> None:
    """Tell the loops that no epoch is to be gone on with; with ``max_steps`` they would take it for granted."""
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def _is_between(epochs: dict[str, Any]) -> bool:
    """Return whether an epoch is over, and no batch of another was trained."""
    total = epochs.get("total", {})
    over = total.get("processed", 0)
    at_start = total == {"ready": over + 1, "started": over, "processed": over, "completed": over}
    at_end = over > 0 and total in [{**dict.fromkeys(total, over), "completed": done} for done in (over - 1, over)]
    return bool(at_start or at_end)


def _is_after_last_batch(epochs: dict[str, Any], batches: dict[str, Any]) -> bool:
    """Return whether an epoch's last batch was trained, and its end or its validation not begun."""
    total, trained = epochs.get("total", {}), batches.get("total", {})
    over, last = total.get("completed", 0), trained.get("ready", 0)
    begun = {"ready": over + 1, "started": over + 1, "processed": over, "completed": over}
    ended = {"ready": last, "started": last, "processed": last, "completed": last - 1}
    return bool(batches.get("is_last_batch") and total == begun and trained == ended)
