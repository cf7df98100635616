"""Unmoved: a warning where an optimizer does not train the parameters that it was given in the middle of a run.

That an optimizer's groups hold a parameter does not mean that it steps it: one that shares parameters out, flattens
them or lists them when it is made may not look at its groups again. Nothing but its first step can tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def watch_first_step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], undo: ExitStack) -> None:
    """Warn after an optimizer's next step if it has moved none of the given parameters, though it could have.

    Optimizers of torch are known to step their groups and are not watched. Nor are those that torch's hooks do not
    reach, which have their own ``step`` and did not call ``Optimizer.__init__``.

    Args:
        optimizer: whose groups hold some of the parameters, perhaps.
        parameters: whose values are copied until that step.
        undo: given what ends the watch.
    """
    known = type(optimizer).__module__.startswith("torch.optim")
    if known or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return
    held = {id(one) for group in optimizer.param_groups if float(group.get("lr", 1)) for one in group["params"]}
    before = [(one, one.detach().clone()) for one in parameters if one.requires_grad and id(one) in held]

    def look(stepped: Optimizer, args: object, kwargs: object) -> None:
        could = [(one, value) for one, value in before if one.grad is not None and _is_some(one.grad)]
        before.clear()  # once only; a hook that took itself away here would break torch's walk through the hooks
        if could and all(torch.equal(one, value) for one, value in could):
            warnings.warn(_message(stepped, len(could)), stacklevel=2)

    handle = optimizer.register_step_post_hook(look)
    undo.callback(handle.remove)


def _is_some(gradient: Tensor) -> bool:
    return bool(gradient.isfinite().all()) and bool(gradient.any())


def _message(optimizer: Optimizer, count: int) -> str:
    return (
        f"{type(optimizer).__name__}: its first step after the compression moved none of the {count} new parameters, "
        "although its groups hold them and they have gradients; it may know only those that it was made with, and new "
        "ones are never trained then. Use an optimizer that steps through its `param_groups`, or compress before it is "
        "made: `lr_callback.factorize_` in `configure_model`. If it steps every few calls only, all is well."
    )
