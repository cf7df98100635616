"""Logged: the accuracies that a run's own validations log before a compression, and next after it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer

from lr_callback.host.journal import log_now


def accuracies_in(logged: Mapping[str, float]) -> list[str]:
    """Return the names of a network's accuracies, each metric by one name.

    Example::

        >>> accuracies_in({"val_acc": 0.9, "val_loss": 0.1, "train_acc": 0.8, "train_acc_epoch": 0.8})
        ['val_acc', 'train_acc']
    """
    own = "compression/"
    found = [name for name in logged if "acc" in name.lower() and not name.startswith(own)]
    return [name for name in found if not _is_fork(name, logged)]


def _is_fork(name: str, logged: Mapping[str, float]) -> bool:
    """Return whether a name is the second one of a metric that is logged by step and by epoch."""
    return any(name == f"{other}{end}" for other in logged for end in ("_step", "_epoch"))


def validated_accuracy(logged: Mapping[str, float], monitor: str | None) -> str | None:
    """Return the name of the accuracy of a validation among all that a run logs; None where it cannot be told.

    Args:
        logged: name -> value, of training and validation.
        monitor: the name, if it was given.

    Example::

        >>> validated_accuracy({"val_acc": 0.9, "train_acc": 0.8}, None)
        'val_acc'
    """
    found = [monitor] if monitor is not None and monitor in logged else accuracies_in(logged)
    found = found if len(found) == 1 else [name for name in found if "val" in name.lower()]
    return found[0] if len(found) == 1 else None


class Logged:
    """What is known of the accuracy around a compression, without measuring it.

    Args:
        monitor: name of the metric; None: the accuracy that a validation logs, if there is one.
    """

    def __init__(self, monitor: str | None) -> None:
        self._monitor = monitor
        self._awaited: str | None = None

    def before(self, trainer: Trainer, measured: tuple[float, float] | None) -> dict[str, float]:
        """Return what is known at a compression; what the next validation logs is told then.

        Args:
            trainer: at the start of an epoch.
            measured: accuracies before and right after the compression, where they were measured for it.
        """
        if measured is not None:
            self._awaited = None
            return dict(zip(("accuracy_before", "accuracy_after"), measured, strict=True))
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._awaited = validated_accuracy(logged, self._monitor)
        return {} if self._awaited is None else {"accuracy_before": logged[self._awaited]}

    def after(self, trainer: Trainer) -> None:
        """Tell the loggers of the first validation after a compression."""
        if self._awaited is None or trainer.sanity_checking:
            return
        name, self._awaited = self._awaited, None
        if name in trainer.callback_metrics:
            log_now(trainer, {"compression/accuracy_after": float(trainer.callback_metrics[name])})
