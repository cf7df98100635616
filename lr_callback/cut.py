"""Cut: one compression of a running Trainer's module, all or nothing.

Layers are built beside the model first. Then everything that holds one of the old parameters follows, step by step,
each with what undoes it: whatever interrupts the cut leaves model, optimizers and host as they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lr_callback.allocation import Allocation
from lr_callback.build import build_layers, check_allocation
from lr_callback.monitors import announce_reset, reset_monitors
from lr_callback.neighbours import follow_averages, held_averages, rename_in_finetuning, retire
from lr_callback.optimizers import unwrapped
from lr_callback.parallel import workers
from lr_callback.surgery import SurgeryReport, replace_layers


def cut(
    trainer: Trainer,
    pl_module: LightningModule,
    allocation: Allocation,
    *,
    averages: Iterable[nn.Module] | None = None,
    begin_anew: bool = True,
) -> SurgeryReport:
    """Carry out an allocation inside ``Trainer.fit``.

    Args:
        trainer: whose optimizers and callbacks follow.
        pl_module: whose layers are replaced.
        allocation: made for this module.
        averages: of the module's weights, which follow; by default those that the Trainer's callbacks hold.
        begin_anew: whether monitors forget the metrics of the model before.

    Returns:
        What was done.

    Raises:
        ValueError: If the allocation is of another model. Nothing was changed.
        MisconfigurationException: If it cannot be told what an average is of. Nothing was changed.
    """
    targets = check_allocation(pl_module, allocation)
    with workers() as crew:
        made = build_layers(targets, allocation, crew)
    followers = follow_averages(pl_module, held_averages(trainer) if averages is None else averages, made)
    names = dict(pl_module.named_parameters())
    anew: list[str] = []
    with ExitStack() as undo:
        report = replace_layers(pl_module, made, unwrapped(trainer.optimizers), undo)
        for average, layers in followers:
            replace_layers(average, layers, undo=undo)
        rename_in_finetuning(trainer, names, report, pl_module, undo)
        if begin_anew and made:
            anew = reset_monitors(trainer, undo)
        retire({name: targets[name] for name in made}, undo)
        forget_graphs()
        undo.pop_all()
    announce_reset(anew)
    return report


def forget_graphs() -> None:
    """Let dynamo compile anew: after eight structures of one network it would stop compiling and say nothing.

    Takes less than a millisecond where nothing is compiled. What is compiled besides the module is compiled again, too.
    """
    torch.compiler.reset()
