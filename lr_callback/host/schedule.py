"""Schedule: at the start of which epochs a run compresses, and to what fraction."""

from __future__ import annotations

from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.analysis.settling import PATIENCE, has_settled, stable_ranks
from lr_callback.decisions.goals import Goal
from lr_callback.host.events import check_flags, due, read_events
from lr_callback.host.journal import log_now
from lr_callback.host.record import Record
from lr_callback.host.scope import Scope
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import beyond, is_smoke_test, warn_of_late_events
from lr_callback.observation.metrics import stable_rank_metric

When = Literal["epochs", "auto"]
_NAME = "compression/stable_rank"


class Schedule:
    """When a run compresses: at chosen epochs, or once the spectra of its layers have settled.

    Args:
        keep_ratio: see :func:`lr_callback.host.events.read_events`.
        epochs: likewise.
        ramp: likewise.
        when: ``epochs``, or ``auto``: see :func:`lr_callback.analysis.settling.has_settled`, and at the latest at half
            of ``max_epochs``.

    Attributes:
        events: epoch -> fraction to keep, or another goal; with ``auto`` the latest epoch, once there is a Trainer.

    Raises:
        TypeError: If ``ramp`` is no switch.
        ValueError: If an argument is out of range, or does not go with ``auto``.
    """

    def __init__(self, keep_ratio: object, epochs: object, ramp: bool, when: When) -> None:
        self.ramp = ramp
        check_flags(self, "ramp")
        if when not in ("epochs", "auto"):
            raise ValueError(f"`when` must be 'epochs' or 'auto', got {when!r}.")
        self._is_auto = when == "auto"
        if self._is_auto and (epochs != 1 or ramp or isinstance(keep_ratio, (list, tuple))):
            raise ValueError(
                "when='auto' finds the epoch of one compression itself: it takes one `keep_ratio`, no `epochs` and no "
                f"`ramp`, got keep_ratio={keep_ratio!r}, epochs={epochs!r} and ramp={ramp!r}."
            )
        self.events = read_events(keep_ratio, epochs, ramp)

    def begin(self, trainer: Trainer) -> None:
        """Find the latest epoch, and warn of those that are never reached.

        Raises:
            MisconfigurationException: If it is not known how many epochs there are.
        """
        if self._is_auto and not is_smoke_test(trainer):
            if trainer.max_epochs is None or trainer.max_epochs < 0:
                raise MisconfigurationException(
                    "LowRankCompression: when='auto' leaves half of the epochs for the compressed network, so the "
                    f"Trainer must know how many there are, got max_epochs={trainer.max_epochs}. Set `max_epochs`, or "
                    "choose `epochs`."
                )
            (goal,) = self.events.values()
            self.events = {max(1, trainer.max_epochs // 2): goal}
        warn_of_late_events(trainer, self.events)

    def measure(self, trainer: Trainer, pl_module: LightningModule, scope: Scope, record: Record) -> Record:
        """Measure and log the stable ranks of a run that waits for them to settle; return the record with them."""
        if not self._is_auto or record.applied:
            return record
        layers = (scope.include, scope.exclude, scope.embeddings)
        ranks = processes_of(trainer).first(lambda: stable_ranks(pl_module, *layers))
        metric = stable_rank_metric(ranks.values()).to(pl_module.device)
        pl_module.log(_NAME, metric, on_step=False, on_epoch=True, logger=False, metric_attribute=_NAME)
        log_now(trainer, {_NAME: float(metric.compute())})
        return record.with_ranks(trainer.current_epoch, ranks, PATIENCE + 1)

    def due(self, trainer: Trainer, record: Record) -> Goal | None:
        """Return the goal of the event that is due at the start of an epoch; None if there is none."""
        first = min(self.events)
        if is_smoke_test(trainer) and not record.applied:
            return self.events[first]
        if self._is_auto and record.applied:
            return None
        if self._is_auto and has_settled(list(record.stable_ranks.values())):
            return self.events[first]
        return due(self.events, record.applied, trainer.current_epoch)

    def passed(self, trainer: Trainer) -> set[int]:
        """Return the events that have passed with a compression at the start of this epoch."""
        if self._is_auto and not is_smoke_test(trainer):
            return {trainer.current_epoch}
        last = min(self.events) if is_smoke_test(trainer) else trainer.current_epoch
        return {event for event in self.events if event <= last}

    def end(self, trainer: Trainer, record: Record) -> None:
        """Warn of events that a run has not come to, though it could have: it was stopped before."""
        done, late = trainer.current_epoch, beyond(trainer, self.events)
        left = [epoch for epoch in self.events if epoch >= max(done, record.last + 1) and epoch not in late]
        if left and not is_smoke_test(trainer) and not (self._is_auto and record.applied):
            rank_zero_warn(
                f"LowRankCompression: the run has ended after {done} epochs, before the compression "
                f"{'that was due at the latest ' if self._is_auto else ''}at the start of epoch {min(left)}; the model "
                "has the size that it had. Let the run be longer, compress earlier, or resume from its last checkpoint."
            )

    def left(self, record: Record) -> list[Goal]:
        """Return the goals of the events that have not passed."""
        return [goal for event, goal in self.events.items() if event > record.last]
