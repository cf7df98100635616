"""Cut: one compression of a running Trainer's module, all or nothing.

Layers are built beside the model first. Then everything that holds one of the old parameters follows, step by step,
each with what undoes it: whatever interrupts the cut leaves model, optimizers and host as they were.
"""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer

from lr_callback.allocation import Allocation
from lr_callback.build import build_layers, check_allocation
from lr_callback.optimizers import unwrapped
from lr_callback.parallel import workers
from lr_callback.surgery import SurgeryReport, replace_layers


def cut(trainer: Trainer, pl_module: LightningModule, allocation: Allocation, undo: ExitStack) -> SurgeryReport:
    """Carry out an allocation inside ``Trainer.fit``.

    Args:
        trainer: whose optimizers follow.
        pl_module: whose layers are replaced.
        allocation: made for this module.
        undo: given what undoes each step before that step edits anything; the cut stands once the caller takes
            everything off the stack, together with whatever else belongs to it.

    Returns:
        What was done.

    Raises:
        ValueError: If the allocation is of another model. Nothing was changed.
    """
    targets = check_allocation(pl_module, allocation)
    with workers() as crew:
        made = build_layers(targets, allocation, crew)
    return replace_layers(pl_module, made, unwrapped(trainer.optimizers), undo)
