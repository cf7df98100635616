"""Cut: one compression of a running Trainer's module, all or nothing.

Layers are built beside the model first, on every process of the run. Then everything that holds one of the old
parameters follows, step by step, each with what undoes it: whatever interrupts the cut, on whichever process, leaves
model, optimizers and host as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lr_callback.allocation import Allocation
from lr_callback.build import build_layers, check_allocation
from lr_callback.ddp import rebuild_wrapper
from lr_callback.optimizers import unwrapped
from lr_callback.parallel import workers
from lr_callback.strategies import processes_of
from lr_callback.surgery import SurgeryReport, replace_layers


def cut(trainer: Trainer, pl_module: LightningModule, allocation: Allocation) -> SurgeryReport:
    """Carry out an allocation inside ``Trainer.fit``.

    Args:
        trainer: whose optimizers follow.
        pl_module: whose layers are replaced.
        allocation: made for this module.

    Returns:
        What was done.

    Raises:
        ValueError: If the allocation is of another model. Nothing was changed.
        RuntimeError: If another process of the run failed. Nothing was changed.
    """
    processes = processes_of(trainer)
    with workers() as crew:
        targets = processes.agree(lambda: check_allocation(pl_module, allocation))
        made = build_layers(targets, allocation, crew, processes)
    with ExitStack() as undo:
        report = processes.agree(lambda: _replace(trainer, pl_module, made, undo))
        rebuild_wrapper(trainer.strategy, processes, undo)
        undo.pop_all()
    return report


def _replace(
    trainer: Trainer, pl_module: LightningModule, made: Mapping[str, nn.Module], undo: ExitStack
) -> SurgeryReport:
    """Do what concerns this process alone."""
    return replace_layers(pl_module, made, unwrapped(trainer.optimizers), undo)
