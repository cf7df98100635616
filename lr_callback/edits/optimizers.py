"""Optimizers: follow a surgery in place, so that wrappers and schedulers keep what they hold.

The optimizer object, its group dicts and the number and order of its groups stay; only the contents of each group's
``params`` change. The state of parameters that were not replaced is not touched; new ones start without state, or
with what :mod:`lr_callback.edits.projection` makes of the old one. Options of groups stay as they are, weight decay
too: on two factors it pulls at their squared norms, which is not the squared norm of their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lr_callback.common.table import listed
from lr_callback.edits.projection import projected_state
from lr_callback.layers import FactorizedLayer

Replacements = Mapping[nn.Parameter, Sequence[nn.Parameter]]
"""Old parameter -> the new ones that take its place, in order; empty: it goes without one."""


def replace_parameters(
    optimizers: Iterable[Optimizer],
    replacements: Replacements,
    names: Mapping[nn.Parameter, str],
    projected: Mapping[nn.Parameter, FactorizedLayer] | None = None,
    undo: ExitStack | None = None,
) -> None:
    """Let optimizers hold the new parameters where they held the old ones.

    Args:
        optimizers: torch optimizers, or wrappers around one.
        replacements: which parameter gives way to which.
        names: name of each parameter of the new layers, for groups that were made from ``named_parameters()``.
        projected: old weight -> the layer whose factors take over its state, see :mod:`lr_callback.edits.projection`;
            the others start without state.
        undo: given what undoes it, before anything is changed; it is undone unless the caller takes everything off the
            stack.

    Raises:
        RuntimeError: If an optimizer does not let its groups be edited, or is ``SparseAdam``. All of them are as they
            were, once ``undo`` is closed where there is one.
    """
    # A wrapper may share groups and state with what it wraps: what each held must be read before any is edited.
    held = [(optimizer, _held(optimizer, replacements)) for optimizer in with_inner(optimizers)]
    for optimizer, old in held:
        _check_sparse(optimizer, old, replacements, names)
    with ExitStack() as own:
        steps = own if undo is None else undo
        for optimizer, _ in held:
            steps.callback(_remember(optimizer))
        for optimizer, old in held:
            _replace(optimizer, old, replacements, names, projected or {})
        for optimizer, old in held:
            _check(optimizer, old, replacements, names)
        own.pop_all()


def with_inner(optimizers: Iterable[Any]) -> list[Optimizer]:
    """Return optimizers and those that they wrap, each once, what is inside before what is around it.

    A wrapper may share groups and state with the optimizer inside (Lightning's, SAM, Lookahead), or have its own.
    """
    listed: list[Optimizer] = []
    for optimizer in optimizers:
        for one in (*with_inner(optimizers_in(optimizer)), optimizer):
            if not any(one is other for other in listed):
                listed.append(one)
    return listed


def optimizers_in(holder: object) -> list[Optimizer]:
    """Return the torch optimizers that an object has as attributes, or in a list, tuple or dict that is one."""
    found: list[Optimizer] = []
    for value in getattr(holder, "__dict__", {}).values():
        values = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        )
        found += [one for one in values if isinstance(one, Optimizer) and one is not holder]
    return found


def _held(optimizer: Optimizer, replacements: Replacements) -> list[nn.Parameter]:
    """Return the parameters in an optimizer's groups that are to be replaced."""
    held = [one for group in optimizer.param_groups for one in group["params"] if one in replacements]
    other = {type(group["params"]).__name__ for group in optimizer.param_groups} - {"list"}
    if held and other:
        raise _refusal(optimizer, f"they are of type {', '.join(sorted(other))}")
    return held


def _check(
    optimizer: Optimizer, old: Sequence[nn.Parameter], replacements: Replacements, names: Mapping[nn.Parameter, str]
) -> None:
    """Refuse an optimizer whose groups do not hold the heirs of all that they held: those would never be trained."""
    now = {id(one) for group in optimizer.param_groups for one in group["params"]}
    lost = [names[heir] for one in old for heir in replacements[one] if id(heir) not in now]
    if lost:
        raise _refusal(optimizer, f"after the edit they lack {listed(lost)}")


def _check_sparse(
    optimizer: Optimizer, old: Sequence[nn.Parameter], replacements: Replacements, names: Mapping[nn.Parameter, str]
) -> None:
    """Refuse the factors of a sparse table where the next step would stop at the gradient of the decoder."""
    dense = [names[heir] for one in old for heir in replacements[one][1:]]
    if dense and isinstance(optimizer, torch.optim.SparseAdam):
        raise RuntimeError(
            f"SparseAdam: all of its parameters must have sparse gradients, {', '.join(dense[:3])} would not. Nothing "
            "was changed. Name the embedding in `exclude`, or train it with SGD or Adagrad, which take both."
        )


def _refusal(optimizer: Optimizer, found: str) -> RuntimeError:
    return RuntimeError(
        f"{type(optimizer).__name__}: the parameters of its `param_groups` must be lists that can be edited in place, "
        f"{found}; new parameters would never be trained. Nothing was changed. Let `param_groups` hold the lists that "
        "the optimizer steps through, or compress before it is made: `lr_callback.factorize_` in `configure_model`."
    )


def _remember(optimizer: Optimizer) -> Callable[[], None]:
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
            if isinstance(group["params"], list):  # nobody can have edited another kind
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


def _replace(
    optimizer: Optimizer,
    old: Sequence[nn.Parameter],
    replacements: Replacements,
    names: Mapping[nn.Parameter, str],
    projected: Mapping[nn.Parameter, FactorizedLayer],
) -> None:
    for group in optimizer.param_groups:
        _replace_in_group(group, replacements, names)
    for parameter in old:
        state = optimizer.state.pop(parameter, {})
        if parameter in projected:
            optimizer.state.update(projected_state(optimizer, state, projected[parameter]))
    if isinstance(optimizer, torch.optim.LBFGS) and old:
        # Its history is over one flat vector of all parameters, whose length has changed.
        optimizer.state.clear()
        optimizer._numel_cache = None
    new = {heir for parameter in old for heir in replacements[parameter]}
    for group in optimizer.param_groups:
        _give_state(optimizer, group, [one for one in group["params"] if one in new and one not in optimizer.state])


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


def _give_state(optimizer: Optimizer, group: Mapping[str, Any], new: Sequence[nn.Parameter]) -> None:
    """Give new parameters the state that an optimizer does not make at its next step, but needs there."""
    if isinstance(optimizer, torch.optim.SGD):
        # The fused kernel needs a momentum of each parameter, or of none.
        started = any("momentum_buffer" in optimizer.state.get(parameter, {}) for parameter in group["params"])
        for parameter in new if started and group["momentum"] and group.get("fused") else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if type(optimizer) is torch.optim.Adagrad:
        for parameter in new:  # in older releases of torch only its constructor makes state
            start, fused = group["initial_accumulator_value"], group.get("fused")
            made = torch.optim.Adagrad([parameter], initial_accumulator_value=start, fused=fused)
            optimizer.state[parameter] = made.state[parameter]


def moments_of(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return what optimizers remember of parameters, other than counters, in the same order on every process."""
    listed = list(parameters)
    states = [optimizer.state.get(one, {}) for optimizer in with_inner(optimizers) for one in listed]
    found = [state[name] for state in states for name in sorted(state) if name != "step"]
    return list({id(one): one for one in found if isinstance(one, Tensor)}.values())


def names_of(optimizers: Sequence[Optimizer], named: Mapping[str, nn.Parameter]) -> list[list[list[str | None]]]:
    """Return the name of each parameter in each group of each optimizer; None for one that the model does not have."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [[[names.get(id(one)) for one in group["params"]] for group in each.param_groups] for each in optimizers]


def rebind(
    optimizers: Sequence[Optimizer],
    names: Sequence[Sequence[Sequence[str | None]]],
    named: Mapping[str, nn.Parameter],
    schedulers: Sequence[Any] = (),
) -> None:
    """Put the parameters with these names into the optimizers' groups, in this order.

    An optimizer that was made before a checkpoint gave the model its structure holds parameters of layers that are
    gone; one that chose its groups by name may hold the right ones in another order than the file's states.

    Where groups are made one for each parameter there are more of them now than in the file; they become those of the
    file, each with the options of the group that had its first parameter, until the file gives its own.

    Args:
        optimizers: without state yet.
        names: as :func:`names_of` wrote them; an optimizer that does not match in its groups or in what they hold is
            left alone.
        named: the model's parameters.
        schedulers: of these optimizers; those with a function for each group keep the ones of the groups that stay.
    """
    for optimizer, groups in zip(optimizers, names, strict=False):
        if len(groups) != len(optimizer.param_groups):
            _regroup(optimizer, groups, named, schedulers)
        if len(groups) != len(optimizer.param_groups):
            continue
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            known = [(name, named[name]) for name in wanted if name is not None and name in named]
            if len(known) == len(wanted):
                group["params"][:] = [parameter for _, parameter in known]
                if "param_names" in group:
                    group["param_names"][:] = [name for name, _ in known]


def _regroup(
    optimizer: Optimizer,
    names: Sequence[Sequence[str | None]],
    named: Mapping[str, nn.Parameter],
    schedulers: Sequence[Any],
) -> None:
    """Leave of an optimizer's groups one for each that is named, if together they hold the same parameters."""
    place = {id(one): index for index, group in enumerate(optimizer.param_groups) for one in group["params"]}
    wanted = [[id(named[name]) if name is not None and name in named else 0 for name in group] for group in names]
    if sorted(one for group in wanted for one in group) != sorted(place) or not all(wanted):
        return
    kept = [place[group[0]] for group in wanted]
    if len(set(kept)) == len(kept):
        optimizer.param_groups[:] = [optimizer.param_groups[index] for index in kept]
        for scheduler in schedulers:
            _keep_functions(scheduler, optimizer, kept)


def _keep_functions(scheduler: object, optimizer: Optimizer, kept: Sequence[int]) -> None:
    """Leave the rules of the groups that stay; a scheduler restores everything else from a file by itself."""
    for inner in getattr(scheduler, "_schedulers", ()):
        _keep_functions(inner, optimizer, kept)
    rules = getattr(scheduler, "lr_lambdas", None)
    if rules is not None and getattr(scheduler, "optimizer", None) is optimizer:
        rules[:] = [rules[index] for index in kept]
