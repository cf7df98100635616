"""Validating: the validation of a run, of a copy of its module, in a Trainer of its own.

The run does not notice: its Trainer, loops, callbacks and loggers are not used. The copy is told of the epoch and the
step where the run is, and the batches are those of the run's own validation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lr_callback.common.untouched import as_written
from lr_callback.host.copies import copied_loader
from lr_callback.host.packages import PACKAGES
from lr_callback.host.strategies import processes_of

INSTEAD = "ask for a `keep_ratio` or a `max_error` in its place"
"""What to do where a network's accuracy cannot be measured in a run."""

_HOOKS = ("prepare_data", "setup", "teardown", "on_exception")
"""What a Trainer calls around its loops, and has been called in the run."""


def check_validation(trainer: Trainer) -> None:
    """Refuse a run whose network cannot be validated in its middle.

    Args:
        trainer: in its ``setup``, or later.

    Raises:
        MisconfigurationException: If it has no validation, or several processes.
    """
    if not trainer.enable_validation:
        raise MisconfigurationException(
            "LowRankCompression: `max_accuracy_drop` is measured by the run's own validation, and this run has none: "
            "the module must have a `validation_step`, the run a validation loader, and `limit_val_batches` be above 0 "
            f"(it is {trainer.limit_val_batches}). Add what is missing, or {INSTEAD}."
        )
    processes = processes_of(trainer)
    if processes.size > 1:
        raise MisconfigurationException(
            "LowRankCompression: `max_accuracy_drop` tries networks on one process, and this run has "
            f"{processes.size}. Find the fraction in a run on one process (the callback's `allocation.keep_ratio`) and "
            f"give it as `keep_ratio`, or ask for a `max_error`."
        )


def validate(trainer: Trainer, made: LightningModule) -> dict[str, float]:
    """Return what the validation of a run logs of a copy of its module, by the names that callbacks know.

    Args:
        trainer: of the run; its random numbers go on as if drawn from, so the caller isolates them.
        made: the copy, which is of no use afterwards.

    Raises:
        MisconfigurationException: If the validation raises.
    """
    with ExitStack() as stack:
        loaders = _loaders(trainer, stack)
        _check_mode(loaders)
        other = _validator(trainer)
        vars(made).update(dict.fromkeys((*_HOOKS, "configure_model"), _nothing), configure_callbacks=_no_callbacks)
        module = getattr(trainer, "datamodule", None)
        data = {"dataloaders": loaders} if module is None else {"datamodule": _view(module, loaders)}
        stack.enter_context(as_written())
        try:
            other.validate(made, verbose=False, **data)
        except SystemExit as error:
            # A Trainer makes this of Ctrl-C, and the run's own is to hear of that.
            raise (error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error) from None
        except Exception as error:
            raise MisconfigurationException(
                "LowRankCompression: `max_accuracy_drop` runs the validation of a copy of the module, in a Trainer "
                "that has no optimizers, callbacks and loggers of the run, and it failed "
                f"({type(error).__name__}: {error}). Let the validation do without them, or {INSTEAD}. Nothing was "
                "changed."
            ) from error
    return {name: float(value) for name, value in other.callback_metrics.items()}


def _loaders(trainer: Trainer, stack: ExitStack) -> CombinedLoader:
    """Return copies of the run's validation loaders, which may not have been made yet."""
    loop, training = trainer.fit_loop.epoch_loop.val_loop, trainer.fit_loop._combined_loader
    assert training is not None
    loaders: Any = loop._combined_loader
    if loaders is None:  # the run makes its own when it comes to its first validation
        loaders = loop._data_source.dataloader()
    if not isinstance(loaders, type(training)):
        loaders = type(training)(loaders, "sequential")
    return copied_loader(
        loaders, stack, "`max_accuracy_drop` goes through the validation loader", f"Or {INSTEAD}. Nothing was changed."
    )


def _check_mode(loaders: CombinedLoader) -> None:
    if loaders._mode != "sequential":
        raise MisconfigurationException(
            "LowRankCompression: `max_accuracy_drop` needs validation loaders that are gone through one after the "
            f"other, as `trainer.validate` does, got CombinedLoader(mode={loaders._mode!r}). Give the Trainer a list "
            f"of loaders, or {INSTEAD}. Nothing was changed."
        )


def _validator(trainer: Trainer) -> Trainer:
    """Return a Trainer that validates as the run does, and shows and writes nothing."""
    kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] in PACKAGES]
    kind: type[Trainer] = next(kind for kind in kinds if kind.__name__ == "Trainer")
    device = trainer.strategy.root_device
    other = kind(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        plugins=[trainer.precision_plugin],
        limit_val_batches=trainer.limit_val_batches,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        inference_mode=trainer.validate_loop.inference_mode,
        default_root_dir=trainer.default_root_dir,
        # A module that writes pictures finds a logger, which forgets them.
        logger=[DummyLogger() for _ in trainer.loggers],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    own, of_run = other.fit_loop, trainer.fit_loop
    own.epoch_progress = copy.deepcopy(of_run.epoch_progress)
    auto, manual = of_run.epoch_loop.automatic_optimization, of_run.epoch_loop.manual_optimization  # these count steps
    own.epoch_loop.automatic_optimization.optim_progress = copy.deepcopy(auto.optim_progress)
    own.epoch_loop.manual_optimization.optim_step_progress = copy.deepcopy(manual.optim_step_progress)
    return other


def _view(datamodule: LightningDataModule, loaders: CombinedLoader) -> LightningDataModule:
    """Return a datamodule with the same hooks and data, which another Trainer can have without taking it from its own.

    A Trainer sets itself as an attribute, and would set up and tear down what the run still needs.
    """
    made = copy.copy(datamodule)
    vars(made).update(dict.fromkeys(_HOOKS, _nothing), val_dataloader=lambda: loaders)
    return made


def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""


def _no_callbacks() -> list[Mapping[str, object]]:
    """Return the callbacks that a module brings along: none."""
    return []
