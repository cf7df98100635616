"""Cut: one compression of a running Trainer's module, all or nothing.

Layers are built beside the model first, on every process of the run. Then everything that holds one of the old
parameters follows, step by step, each with what undoes it: whatever interrupts the cut, on whichever process, leaves
model, optimizers and host as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lr_callback.common.parallel import workers
from lr_callback.decisions.allocation import Allocation
from lr_callback.edits.averages import repaired
from lr_callback.edits.build import build_layers, check_allocation, weights_held
from lr_callback.edits.optimizers import moments_of, optimizers_in
from lr_callback.edits.projection import OptimizerState
from lr_callback.edits.rewind import check_schedules, rewind, schedules_of
from lr_callback.edits.surgery import SurgeryReport, replace_layers
from lr_callback.edits.unmoved import watch_first_step
from lr_callback.host.averaging import followers
from lr_callback.host.ddp import rebuild_wrapper
from lr_callback.host.monitors import announce_reset, reset_monitors
from lr_callback.host.neighbours import rename_in_finetuning, retire
from lr_callback.host.strategies import processes_of
from lr_callback.host.trainer import schedulers_of
from lr_callback.mathematics.importance import Importance
from lr_callback.observation.progress import progress_line

Repair = Callable[[Mapping[str, nn.Module], Mapping[str, nn.Module]], None]


def cut(
    trainer: Trainer,
    pl_module: LightningModule,
    allocation: Allocation,
    undo: ExitStack,
    averages: Iterable[nn.Module] = (),
    begin_anew: bool = True,
    optimizer_state: OptimizerState = "reset",
    start: Mapping[str, Any] | None = None,
    importance: Mapping[str, Importance] | None = None,
    repair: Repair | None = None,
) -> SurgeryReport:
    """Carry out an allocation inside ``Trainer.fit``.

    Args:
        trainer: whose optimizers and callbacks follow; so do optimizers that the module has as attributes.
        pl_module: whose layers are replaced.
        allocation: made for this module.
        undo: given what undoes each step before that step edits anything; the cut stands once the caller takes
            everything off the stack, together with whatever else belongs to it.
        averages: of the module's weights, which follow.
        begin_anew: whether monitors forget the metrics of the model before.
        optimizer_state: what factors of dense layers start with, ``reset`` or ``project``.
        start: to where learning rates and schedulers are rewound, see :mod:`lr_callback.edits.rewind`.
        importance: what the allocation was made with, if its error is weighted.
        repair: called with the layers that stand there and those that were made for their places, before anything
            else follows.

    Returns:
        What was done.

    Raises:
        ValueError: If the allocation is of another model, or ``start`` of another run. Nothing was changed.
        MisconfigurationException: If it cannot be told what an average is of. Nothing was changed.
        RuntimeError: If an optimizer does not let its groups be edited, or another process of the run failed. Nothing
            was changed.
    """
    processes = processes_of(trainer)
    with workers() as crew, progress_line(trainer, "decomposition") as progress:
        targets = processes.agree(lambda: check_allocation(pl_module, allocation))
        made = build_layers(targets, allocation, crew, processes, importance, progress)
    before = repaired(pl_module, targets)
    if repair is not None:
        repair(targets, made)
    copies = processes.agree(lambda: followers(pl_module, averages, targets, made, before), long=True)
    of_averages = [weight for copy in copies for layer in copy.layers.values() for weight in weights_held(layer)]
    processes.share(of_averages, pl_module.device, "the averages of the weights")
    names = dict(pl_module.named_parameters())

    def replace() -> SurgeryReport:
        """Do what concerns this process alone."""
        optimizers = [*trainer.optimizers, *optimizers_in(pl_module)]
        report = replace_layers(pl_module, made, optimizers, undo, optimizer_state)
        for copy in copies:
            copy.follow(undo)
        new = [heir for heirs in report.replacements.values() for heir in heirs]
        for optimizer in trainer.optimizers:
            watch_first_step(optimizer, new, undo)
        if start is not None:
            rewind(trainer.optimizers, schedulers_of(trainer), start, undo)
        rename_in_finetuning(trainer, names, report, pl_module, undo)
        if begin_anew and made:
            announce_reset(reset_monitors(trainer, undo))
        retire({name: targets[name] for name in made}, undo)
        forget_graphs()
        return report

    report = processes.agree(replace)
    if optimizer_state == "project":
        heirs = [heir for one in report.replacements.values() for heir in one]
        processes.share(moments_of(trainer.optimizers, heirs), pl_module.device, "the states of the optimizers")
    rebuild_wrapper(trainer.strategy, processes, undo)
    return report


def forget_graphs() -> None:
    """Let dynamo compile anew: after eight structures of one network it would stop compiling and say nothing.

    Takes less than a millisecond where nothing is compiled. What is compiled besides the module is compiled again, too.
    """
    torch.compiler.reset()


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
