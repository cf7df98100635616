"""Host: what is asked of a Trainer and its module, and refused where the answer will not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lr_callback.common.table import listed, on_one_line
from lr_callback.decisions.allocation import Allocation
from lr_callback.edits.optimizers import optimizers_in, with_inner
from lr_callback.edits.projection import OptimizerState, can_project
from lr_callback.model.find import factorized_in
from lr_callback.model.observe import Observation, Timed, observe, run_on
from lr_callback.units.latency import Progress

Within: TypeAlias = Callable[[], AbstractContextManager[object]]


def is_smoke_test(trainer: Trainer) -> bool:
    """Return whether the run is a ``fast_dev_run``, which never reaches an epoch after the first."""
    return bool(getattr(trainer, "fast_dev_run", False))


def beyond(trainer: Trainer, events: Iterable[int]) -> list[int]:
    """Return the events that a run of ``max_epochs`` does not reach."""
    limit = trainer.max_epochs
    return [epoch for epoch in events if limit is not None and 0 <= limit <= epoch]


def warn_of_late_events(trainer: Trainer, events: Iterable[int]) -> None:
    """Warn of events that the run does not reach."""
    late = beyond(trainer, events)
    if late and not is_smoke_test(trainer):
        rank_zero_warn(
            f"LowRankCompression: epochs {late} are never reached, max_epochs is {trainer.max_epochs} and epochs count "
            "from 0; what was to be compressed then is not. Let the run be longer, or choose earlier `epochs`."
        )


def lacks(trainer: Trainer, pl_module: LightningModule, allocation: Allocation) -> bool:
    """Return whether a module does not have the layers that a compression before this run gave one.

    It may be another module, or have been given the weights of another structure since.

    Raises:
        MisconfigurationException: If the run is resumed from a file of that compression, without these layers.
    """
    present = factorized_in(pl_module)
    missing = [name for name in allocation.factorized if name not in present]
    if missing and trainer.ckpt_path is not None:
        raise MisconfigurationException(
            f"LowRankCompression: the checkpoint {trainer.ckpt_path} is of a compressed run, and must hold all layers "
            f"that were compressed; it lacks {listed(missing)}, which "
            "would be trained as they are in the code. Let the module's `state_dict` hold them, or name them in "
            "`exclude`."
        )
    return bool(missing)


_SHARDED = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")
"""Optimizers of torch.distributed that keep parameters, or copies of their groups, where no edit reaches them."""


def check_optimizers(trainer: Trainer, optimizer_state: OptimizerState) -> None:
    """Refuse optimizers that would not follow a surgery; warn of those whose momentum cannot be projected.

    Raises:
        MisconfigurationException: If an optimizer of torch.distributed is among them.
    """
    inner = with_inner(trainer.optimizers)
    kinds = {kind.__name__ for one in inner for kind in type(one).__mro__}
    for name in _SHARDED:
        if name in kinds:
            raise MisconfigurationException(
                "LowRankCompression: the optimizer must let its parameters be exchanged while it runs, and "
                f"{name} does not: it keeps them, or how they are shared out over the processes, where new ones are "
                "not seen and would never be trained. Give the optimizer inside it to the Trainer, or compress before "
                "it is made: `lr_callback.factorize_` in `configure_model`."
            )
    reset = sorted({type(one).__name__ for one in inner if not optimizers_in(one) and not can_project(one)})
    if optimizer_state == "project" and reset:
        rank_zero_warn(
            f"LowRankCompression: optimizer_state='project' is for SGD, Adam and AdamW; factors start without state in "
            f"{', '.join(reset)}, as with optimizer_state='reset'. Train with one of these, or leave it at 'reset'."
        )


def schedulers_of(trainer: Trainer) -> list[Any]:
    """Return the learning rate schedulers of a run."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def observe_example(
    trainer: Trainer,
    pl_module: LightningModule,
    timed_for: Timed | None = None,
    progress: Progress | None = None,
    activations: bool = False,
) -> Observation:
    """Observe the module on its own example input, on its device and in the run's precision.

    Args:
        trainer: of the run.
        pl_module: that is run.
        timed_for: see :func:`lr_callback.model.observe.observe`.
        progress: told of each layer that is timed.
        activations: see :func:`lr_callback.model.observe.observe`.

    Raises:
        MisconfigurationException: If the module has none.
        ValueError: If the module cannot be run on it.
    """
    if pl_module.example_input_array is None:
        raise MisconfigurationException(
            "LowRankCompression: multiply_adds, latency or activation_memory at epoch 0 (where fast_dev_run "
            "compresses, too) must know an input before the first batch: the module's `example_input_array` is not "
            "set, and no batch could be had beforehand: the loader is a stream, or has a sampler of its own, or "
            "`training_step` cannot be run in eval mode. Set it, or compress at epoch 1 or later."
        )
    given, named, within = _example_of(trainer, pl_module)
    return observe(pl_module, given, timed_for, progress, activations, named, within)


def run_of_example(trainer: Trainer, pl_module: LightningModule) -> Callable[[], object]:
    """Return a run of the module on its own example input, as :func:`observe_example` makes one.

    Raises:
        ValueError: If it cannot be run; when it is called, if the module raises anything.
    """
    return run_on(pl_module, *_example_of(trainer, pl_module))


def _example_of(trainer: Trainer, pl_module: LightningModule) -> tuple[object, str, Within]:
    """Return the example where and as the run has its batches, what it is called, and what a run is made in."""
    moved = move_data_to_device(pl_module.example_input_array, pl_module.device)
    plugin = trainer.precision_plugin
    return plugin.convert_input(moved), "example_input_array", plugin.forward_context


def why(error: Exception) -> str:
    """Return what became of a run on the example that failed, as the end of a sentence."""
    cause = error.__cause__  # what the network raised, if that is why
    return str(error) if cause is None else f"it raised {type(cause).__name__}: {on_one_line(cause)}"
