"""Optimizers: follow a surgery in place, so that wrappers and schedulers keep what they hold.

The optimizer object, its group dicts and the number and order of its groups stay; only the contents of each group's
``params`` change. The state of parameters that were not replaced is not touched; new ones start without state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Replacements = Mapping[nn.Parameter, Sequence[nn.Parameter]]
"""Old parameter -> the new ones that take its place, in order; empty: it goes without one."""


def replace_parameters(
    optimizers: Iterable[Optimizer], replacements: Replacements, names: Mapping[nn.Parameter, str]
) -> Callable[[], None]:
    """Let optimizers hold the new parameters where they held the old ones.

    Args:
        optimizers: torch optimizers, or wrappers that share ``param_groups`` and ``state`` with one.
        replacements: which parameter gives way to which.
        names: name of each parameter of the new layers, for groups that were made from ``named_parameters()``.

    Returns:
        A function that undoes it.
    """
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    try:
        for optimizer in optimizers:
            undo.append(remember(optimizer))
            _replace(optimizer, replacements, names)
    except BaseException:
        undo_all()
        raise
    return undo_all


def remember(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that puts back the parameters of each group and the state of each parameter.

    Args:
        optimizer: as it is to be again; any later edit of its groups and state is undone.
    """
    groups = [(group, list(group["params"]), list(group.get("param_names", ()))) for group in optimizer.param_groups]
    state = dict(optimizer.state)
    inner = {key: dict(value) for key, value in state.items() if isinstance(value, dict)}
    cache = getattr(optimizer, "_numel_cache", None)

    def restore() -> None:
        for group, params, names in groups:
            group["params"][:] = params
            if "param_names" in group:
                group["param_names"][:] = names
        optimizer.state.clear()
        optimizer.state.update(state)
        for key, value in inner.items():
            optimizer.state[key].clear()
            optimizer.state[key].update(value)
        if hasattr(optimizer, "_numel_cache"):
            optimizer._numel_cache = cache

    return restore


def _replace(optimizer: Optimizer, replacements: Replacements, names: Mapping[nn.Parameter, str]) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        _replace_in_group(group, replacements, names)
    if not any(parameter in replacements for parameter in held):
        return
    for old in replacements:
        optimizer.state.pop(old, None)
    if isinstance(optimizer, torch.optim.LBFGS):
        # Its history is over one flat vector of all parameters, whose length has changed.
        optimizer.state.clear()
        optimizer._numel_cache = None
    if isinstance(optimizer, torch.optim.SGD):
        _give_momentum(optimizer, replacements)


def _replace_in_group(group: dict[str, Any], replacements: Replacements, names: Mapping[nn.Parameter, str]) -> None:
    """Edit the lists of a group, which others may share; a bias that stays may have a new name."""
    old_names = group.get("param_names")
    params: list[nn.Parameter] = []
    new_names: list[str] = []
    for index, parameter in enumerate(group["params"]):
        heirs = replacements.get(parameter)
        params += [parameter] if heirs is None else list(heirs)
        if old_names is not None:
            new_names += [names.get(parameter, old_names[index])] if heirs is None else [names[heir] for heir in heirs]
    group["params"][:] = params
    if old_names is not None:
        old_names[:] = new_names


def _give_momentum(optimizer: torch.optim.SGD, replacements: Replacements) -> None:
    """Give new parameters a momentum of zero where others of the group have one; the fused kernel needs it."""
    new = {heir for heirs in replacements.values() for heir in heirs}
    for group in optimizer.param_groups:
        started = any("momentum_buffer" in optimizer.state.get(parameter, {}) for parameter in group["params"])
        for parameter in group["params"]:
            if started and group["momentum"] and group.get("fused") and parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def unwrapped(optimizers: Sequence[Any]) -> list[Optimizer]:
    """Return the torch optimizers inside wrappers that hold them as ``optimizer``, such as Lightning's."""
    return [getattr(one, "optimizer", one) for one in optimizers]


def names_of(optimizers: Sequence[Optimizer], named: Mapping[str, nn.Parameter]) -> list[list[list[str | None]]]:
    """Return the name of each parameter in each group of each optimizer; None for one that the model does not have."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [[[names.get(id(one)) for one in group["params"]] for group in each.param_groups] for each in optimizers]


def rebind(
    optimizers: Sequence[Optimizer],
    names: Sequence[Sequence[Sequence[str | None]]],
    named: Mapping[str, nn.Parameter],
) -> None:
    """Put the parameters with these names into the optimizers' groups, in this order.

    An optimizer that was made before a checkpoint gave the model its structure holds parameters of layers that are
    gone; one that chose its groups by name may hold the right ones in another order than the file's states.

    Args:
        optimizers: without state yet.
        names: as :func:`names_of` wrote them; optimizers or groups that do not match in number are left alone.
        named: the model's parameters.
    """
    for optimizer, groups in zip(optimizers, names, strict=False):
        if len(groups) != len(optimizer.param_groups):
            continue
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            known = [(name, named[name]) for name in wanted if name is not None and name in named]
            if len(known) == len(wanted):
                group["params"][:] = [parameter for _, parameter in known]
                if "param_names" in group:
                    group["param_names"][:] = [name for name, _ in known]
