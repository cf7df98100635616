"""Rewind: learning rates and schedulers of a run, noted when it begins and put back at a compression.

As the paper retrains a compressed network (arXiv 2107.11442): after every cut the learning rates start again as they
are written in the configuration. Here that is optional, and the epochs of the run are not counted anew.
What is noted is plain data, so that a checkpoint of the run can carry it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lr_callback.edits.optimizers import with_inner

_SCHEDULED = ("lr", "momentum", "betas")
"""What the schedulers of torch change in a group; OneCycleLR and CyclicLR change the momentum with the rate."""


def schedules_of(optimizers: Iterable[Optimizer], schedulers: Sequence[LRScheduler]) -> dict[str, Any]:
    """Return where optimizers and schedulers stand, as plain data that no later step changes.

    Args:
        optimizers: torch optimizers, or wrappers around one.
        schedulers: theirs.

    Example::

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        >>> schedules_of([optimizer], [])
        {'groups': [[{'lr': 0.5, 'momentum': 0}]], 'schedulers': []}
    """
    groups = [[_scheduled(group) for group in each.param_groups] for each in with_inner(optimizers)]
    return {"groups": groups, "schedulers": [copy.deepcopy(one.state_dict()) for one in schedulers]}


def check_schedules(
    optimizers: Iterable[Optimizer], schedulers: Sequence[LRScheduler], noted: Mapping[str, Any]
) -> None:
    """Refuse what was noted of other optimizers and schedulers.

    Raises:
        ValueError: If there were more or fewer of them, or fewer groups.
    """
    groups = [len(each.param_groups) for each in with_inner(optimizers)]
    before = [len(each) for each in noted["groups"]]
    fits = len(before) == len(groups) and all(one <= other for one, other in zip(before, groups, strict=True))
    if not fits or len(noted["schedulers"]) != len(schedulers):
        raise ValueError(
            "`learning_rate_rewind`: the run must have the optimizers, groups and schedulers that it began with, it "
            f"began with groups {before} and {len(noted['schedulers'])} schedulers and has groups {groups} and "
            f"{len(schedulers)} schedulers. Resume with the optimizers and schedulers of the first run, or without "
            "`learning_rate_rewind`. Nothing was changed."
        )


def rewind(
    optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], noted: Mapping[str, Any], undo: ExitStack
) -> None:
    """Put optimizers and schedulers back to where they stood; the objects stay.

    Groups that were added since keep their learning rate.

    Args:
        optimizers: of which was noted.
        schedulers: of which was noted.
        noted: what :func:`schedules_of` returned.
        undo: given what undoes it.

    Raises:
        ValueError: If it was noted of others. Nothing was changed.
    """
    check_schedules(optimizers, schedulers, noted)
    undo.callback(_put_back, optimizers, schedulers, schedules_of(optimizers, schedulers))
    _put_back(optimizers, schedulers, noted)


def _put_back(optimizers: Iterable[Optimizer], schedulers: Sequence[LRScheduler], noted: Mapping[str, Any]) -> None:
    for each, options in zip(with_inner(optimizers), noted["groups"], strict=True):
        for group, values in zip(each.param_groups, options, strict=False):
            _set(group, values)
    for scheduler, state in zip(schedulers, noted["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))


def _scheduled(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: group[name] for name in _SCHEDULED if name in group}
    return {name: value.item() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in values.items()}


def _set(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set options of a group; a rate that is a tensor stays that tensor, which compiled and captured steps read."""
    for name, value in values.items():
        if isinstance(group.get(name), Tensor):
            group[name].fill_(value)
        else:
            group[name] = copy.deepcopy(value)
