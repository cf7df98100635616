"""Cut: one compression of a running Trainer's module, all or nothing.

Layers are built beside the model first, on every process of the run. Then everything that holds one of the old
parameters follows, step by step, each with what undoes it: whatever interrupts the cut, on whichever process, leaves
model, optimizers and host as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lr_callback.allocation import Allocation
from lr_callback.build import build_layers, check_allocation
from lr_callback.ddp import rebuild_wrapper
from lr_callback.host import schedulers_of
from lr_callback.optimizers import optimizers_in
from lr_callback.parallel import workers
from lr_callback.projection import OptimizerState
from lr_callback.rewind import check_schedules, rewind, schedules_of
from lr_callback.strategies import processes_of
from lr_callback.surgery import SurgeryReport, replace_layers
from lr_callback.unmoved import watch_first_step


def cut(
    trainer: Trainer,
    pl_module: LightningModule,
    allocation: Allocation,
    undo: ExitStack,
    *,
    optimizer_state: OptimizerState = "reset",
    start: Mapping[str, Any] | None = None,
) -> SurgeryReport:
    """Carry out an allocation inside ``Trainer.fit``.

    Args:
        trainer: whose optimizers follow; so do those that the module has as attributes.
        pl_module: whose layers are replaced.
        allocation: made for this module.
        undo: given what undoes each step before that step edits anything; the cut stands once the caller takes
            everything off the stack, together with whatever else belongs to it.
        optimizer_state: what factors of dense layers start with, ``reset`` or ``project``.
        start: to where learning rates and schedulers are rewound, see :mod:`lr_callback.rewind`.

    Returns:
        What was done.

    Raises:
        ValueError: If the allocation is of another model, or ``start`` of another run. Nothing was changed.
        RuntimeError: If an optimizer does not let its groups be edited, or another process of the run failed. Nothing
            was changed.
    """
    processes = processes_of(trainer)
    with workers() as crew:
        targets = processes.agree(lambda: check_allocation(pl_module, allocation))
        made = build_layers(targets, allocation, crew, processes)

    def replace() -> SurgeryReport:
        """Do what concerns this process alone."""
        followers = [*trainer.optimizers, *optimizers_in(pl_module)]
        report = replace_layers(pl_module, made, followers, undo, optimizer_state)
        new = [heir for heirs in report.replacements.values() for heir in heirs]
        for optimizer in trainer.optimizers:
            watch_first_step(optimizer, new, undo)
        if start is not None:
            rewind(trainer.optimizers, schedulers_of(trainer), start, undo)
        return report

    report = processes.agree(replace)
    rebuild_wrapper(trainer.strategy, processes, undo)
    return report


def start_of(trainer: Trainer, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return where the learning rates and schedulers of a run begin.

    Args:
        trainer: whose optimizers and schedulers stand there now.
        known: from the file of the run, which may have begun elsewhere than this one.

    Raises:
        ValueError: If what is known is of other optimizers or schedulers.
    """
    schedulers = schedulers_of(trainer)
    start = known or schedules_of(trainer.optimizers, schedulers)
    check_schedules(trainer.optimizers, schedulers, start)
    return start
